"""`health`: how the instances are, by their own account; `doctor`: what is wrong with a system that misbehaves."""

import http.client
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rollcall import clocks
from rollcall.cli import show
from rollcall.registry import Instance, Registry

TIMEOUT = 2.0  # seconds that an instance has to answer
AT_ONCE = 16  # instances that are asked at the same time
OWN = "consul"
"""What Consul registers itself as: the registry, not a service that stands in it."""


@dataclass(frozen=True)
class Seen:
    """What is seen of an instance from here."""

    instance: Instance
    answer: str
    """What it says, or why it says nothing."""
    well: bool
    reached: bool
    milliseconds: float = 0.0
    clock: float = 0.0
    """Seconds by which its clock is ahead of this machine's."""


def look(instance: Instance) -> Seen:
    """Connect to an instance and ask it how it is: by gRPC's health protocol where it speaks that, else its probes."""
    begun = time.monotonic()
    answer, reached = _connects(instance)
    well, clock = reached, 0.0
    if reached and instance.meta.get("protocol") == "grpc":
        answer, well = _grpc_health(instance)
    took = 1000 * (time.monotonic() - begun)
    if reached and show.has_probes(instance):
        ill, clock = _probed(instance)
        if instance.meta.get("protocol") != "grpc":  # one that hangs can be connected to, and checked so, all the same
            answer, well = ill or answer, not ill
    return Seen(instance, answer, well, reached, took, clock)


def _grpc_health(instance: Instance) -> tuple[str, bool]:
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(instance.target, options=options) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT).status
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                return "it answers, without a health service", True
            return f"{error.code().name}: {error.details()}", False
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return name, status == health_pb2.HealthCheckResponse.SERVING


def _connects(instance: Instance) -> tuple[str, bool]:
    try:
        socket.create_connection((instance.address, instance.port), TIMEOUT).close()
    except OSError as error:
        return f"no connection: {error.strerror or error}", False
    except UnicodeError:
        return f"no connection: {instance.address} can be no host's name", False
    return "it can be connected to", True


def _probed(instance: Instance) -> tuple[str, float]:
    """Return why an instance's probes do not say that it is alive, and by how many seconds its clock is ahead."""
    connection = http.client.HTTPConnection(instance.address, int(instance.meta["http_port"]), timeout=TIMEOUT)
    try:
        asked = time.time()
        connection.request("GET", "/livez")
        answer = connection.getresponse()
        date = answer.headers.get("Date", "")
        clock = clocks.apart(date, asked, time.time()) if date else 0.0
    except TimeoutError:
        return f"it can be connected to, but its probes have not answered within {TIMEOUT:g} s", 0.0
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"it can be connected to, but its probes cannot be asked: {error}", 0.0
    finally:
        connection.close()
    return "" if answer.status == http.HTTPStatus.OK else f"its probes say {answer.status}", clock


def look_at(instances: Iterable[Instance]) -> list[Seen]:
    """Ask many at the same time; the order stays."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(look, instances))


@click.command()
@click.argument("name", required=False, shell_complete=show.complete_service)
@show.as_json
@show.pass_registry
def health(registry: Registry, name: str | None, *, as_json: bool) -> None:
    """Ask each instance how it is.

    Of one service, or of all. Beside it stands what its check in the registry says. Exits with 1 if one is not well.
    """
    names = [show.known(registry, name)] if name else _services(registry)
    listing = show.Listing(registry)
    seen = look_at(each for name in names for each in listing(name))
    if as_json:
        show.document([_fields(each) for each in seen])
    else:
        rows = [
            (
                each.instance.name,
                each.instance.id,
                each.instance.target,
                show.check(each.instance),
                show.state(good=each.well, text=each.answer),
                f"{each.milliseconds:.0f} ms",
            )
            for each in seen
        ]
        show.table(("SERVICE", "INSTANCE", "ADDRESS", "CHECK", "ITSELF", "TOOK"), rows)
    if name and not seen:
        raise show.FoundError(f"{name} has no instance")
    if not all(each.well and each.instance.passing for each in seen):
        raise click.exceptions.Exit(show.NOT_WELL)


@click.command()
@show.as_json
@show.pass_registry
def doctor(registry: Registry, *, as_json: bool) -> None:
    """Look for what is wrong with the system.

    Exits with 1 if something is. What it looks at: the registry's servers and their leader; registrations that lead
    nowhere; instances that pass their checks and cannot be reached from here; two registrations of one address; clocks;
    services without an instance that passes, and of more than one version.
    """
    problems = list(registry.diagnose())
    names = _services(registry)
    listing = show.Listing(registry)
    services = {name: listing(name) for name in names}
    problems += _of_instances(look_at(each for instances in services.values() for each in instances))
    problems += [
        f"{name}: no instance passes its checks, so that nobody can call it: start one, or see what ails those it has"
        for name, instances in services.items()
        if not any(each.passing for each in instances)
    ]
    notes = list(_mixed(services))
    if as_json:
        show.document({"problems": problems, "notes": notes})
    else:
        for problem in problems:
            click.echo(f"{click.style('problem', fg='red')}  {problem}")
        for note in notes:
            click.echo(f"{click.style('note', fg='yellow')}     {note}")
        count = sum(map(len, services.values()))
        looked = f"looked at {registry}, {len(services)} services and {count} instances"
        click.echo(f"{looked}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    if problems:
        raise click.exceptions.Exit(show.NOT_WELL)


def _services(registry: Registry) -> list[str]:
    return [name for name in registry.services() if name != OWN]


def _of_instances(seen: Sequence[Seen]) -> Iterator[str]:
    at = defaultdict(list)
    for each in seen:
        instance = each.instance
        who = f"{instance.id} of {instance.name} at {instance.target}"
        at[instance.target].append(instance.id)
        if not each.reached and instance.passing:
            yield (
                f"{who} passes its check, and cannot be reached from here ({each.answer}): is this its address, and "
                f"does a firewall or a NetworkPolicy stand between?"
            )
        elif not each.reached:
            yield f"{who} leads nowhere ({each.answer}): if it is gone for good, rollcall deregister {instance.id}"
        elif not each.well:
            yield f"{who} says that it is not well ({each.answer}): see its log"
        elif not instance.passing:
            yield f"{who} answers that it is well, and fails its check: can the registry reach it, at this address?"
        if complaint := clocks.complaint(who, each.clock):
            yield complaint
    for target, ids in at.items():
        if len(ids) > 1:
            yield f"{', '.join(ids)} are all registered at {target}, which one of them is: deregister the others"


def _mixed(services: dict[str, tuple[Instance, ...]]) -> Iterator[str]:
    for name, instances in services.items():
        versions = defaultdict(list)
        for each in instances:
            versions[each.version or "none"].append(each.id)
        if len(versions) > 1:
            listed = "; ".join(f"{version}: {', '.join(ids)}" for version, ids in sorted(versions.items()))
            yield f"{name} runs in {len(versions)} versions, as it should only during an update ({listed})"


def _fields(seen: Seen) -> dict[str, object]:
    return {
        "name": seen.instance.name,
        "id": seen.instance.id,
        "address": seen.instance.address,
        "port": seen.instance.port,
        "passing": seen.instance.passing,
        "well": seen.well,
        "answer": seen.answer,
        "milliseconds": round(seen.milliseconds, 1),
    }

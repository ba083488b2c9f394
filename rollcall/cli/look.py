"""What is registered: `services`, `instances`, `watch`; and `deregister`."""

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import click

from rollcall.cli import show
from rollcall.registry import Instance, Registry

GONE_WITHIN = 3.0  # seconds in which a registration that was removed is off the list
PAUSE = 0.1  # seconds between two looks

service = click.argument("name", shell_complete=show.complete_service)
tag = click.option("--tag", default="", help="Those alone that have this tag.")


@click.command()
@show.as_json
@show.pass_registry
def services(registry: Registry, *, as_json: bool) -> None:
    """List the services, and how many pass."""
    listing = show.Listing(registry)
    found = {name: listing(name) for name in registry.services()}
    if as_json:
        show.document([_summary(name, instances) for name, instances in found.items()])
        return
    rows = []
    for name, instances in found.items():
        passing = sum(each.passing for each in instances)
        count = show.state(good=passing == len(instances) > 0, text=f"{passing}/{len(instances)}")
        rows.append((name, count, ", ".join(_versions(instances)), ", ".join(_tags(instances))))
    show.table(("SERVICE", "PASSING", "VERSION", "TAGS"), rows)


@click.command()
@service
@tag
@show.as_json
@show.pass_registry
def instances(registry: Registry, name: str, tag: str, *, as_json: bool) -> None:
    """List the instances of a service."""
    found = show.Listing(registry)(show.known(registry, name), tag)
    if as_json:
        show.document([_fields(each) for each in found])
        return
    rows = [
        (each.id, each.target, show.check(each), each.version, str(each.weight), ", ".join(each.tags)) for each in found
    ]
    show.table(("INSTANCE", "ADDRESS", "CHECK", "VERSION", "WEIGHT", "TAGS"), rows)


@click.command()
@service
@tag
@show.as_json
@show.pass_registry
def watch(registry: Registry, name: str, tag: str, *, as_json: bool) -> None:
    """Follow the instances of a service.

    Prints what there is, then each change, until interrupted. With --json, all of its instances again on a line for
    each change. A service may be watched before it is there.
    """
    before: dict[str, Instance] = {}
    with closing(registry.watch(name, tag, failing=True)) as changes:
        for found in changes:
            now = {each.id: each for each in found}
            if as_json:
                show.document([_fields(each) for each in found])
            else:
                _tell(before, now)
            before = now


def _tell(before: dict[str, Instance], now: dict[str, Instance]) -> None:
    if not before and not now:
        click.echo("no instance yet")
    for id_ in sorted(before.keys() | now.keys()):
        if id_ not in now:
            click.echo(f"- {id_}")
        elif id_ not in before:
            click.echo(f"+ {id_}  {now[id_].target}  {show.check(now[id_])}")
        elif now[id_] != before[id_]:
            click.echo(f"~ {id_}  {now[id_].target}  {show.check(now[id_])}")


@click.command()
@click.argument("instance_id", metavar="ID")
@show.as_json
@show.pass_registry
def deregister(registry: Registry, instance_id: str, *, as_json: bool) -> None:
    """Remove a registration that was left.

    From each agent of Consul that --consul names. For what somebody has left behind: an instance that runs notices
    within about a second, and registers again.
    """
    listing = show.Listing(registry)
    registered = {each.id: each for name in registry.services() for each in listing(name)}
    if instance_id not in registered:
        raise show.unknown("instance", instance_id, sorted(registered))
    name = registered[instance_id].name
    registry.deregister(instance_id)
    deadline = time.monotonic() + GONE_WITHIN
    while any(each.id == instance_id for each in listing(name)):
        if time.monotonic() > deadline:
            raise show.FoundError(
                f"{instance_id} of {name} is listed still, or again: either it runs and has registered anew, or it is "
                f"held by an agent that was not asked: name that one by --consul"
            )
        time.sleep(PAUSE)
    if as_json:
        show.document(_fields(registered[instance_id]))
        return
    click.echo(f"deregistered {instance_id}, of {name}, at {registered[instance_id].target}")


def _versions(instances: Iterable[Instance]) -> list[str]:
    """Return the versions that there are, the one of most instances first."""
    return [version for version, _ in Counter(each.version for each in instances if each.version).most_common()]


def _tags(instances: Iterable[Instance]) -> list[str]:
    return sorted({tag for each in instances for tag in each.tags})


def _summary(name: str, instances: tuple[Instance, ...]) -> dict[str, Any]:
    return {
        "name": name,
        "instances": len(instances),
        "passing": sum(each.passing for each in instances),
        "versions": _versions(instances),
        "tags": _tags(instances),
    }


def _fields(instance: Instance) -> dict[str, Any]:
    return {
        "id": instance.id,
        "name": instance.name,
        "address": instance.address,
        "port": instance.port,
        "passing": instance.passing,
        "version": instance.version,
        "tags": list(instance.tags),
        "meta": dict(instance.meta),
        "weight": instance.weight,
        "datacenter": instance.datacenter,
    }

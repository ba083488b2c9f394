"""The services that `make up` starts. One more service is one more line in TABLE and its example call."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil

import rollcall
from contracts.person.v1 import person_pb2, person_pb2_grpc
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from deploy.local import LocalError, process
from deploy.local.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from deploy.local.cluster import Cluster

ROOT = Path(__file__).parents[2]
CALL_SECONDS = 10.0
READY_SECONDS = 45.0
POLL_SECONDS = 0.1


async def add(channel: grpc.aio.Channel) -> str:
    """Call sum.Add and return the line that says so."""
    call = sum_pb2_grpc.SumServiceStub(channel).Add(sum_pb2.AddRequest(num1=333, num2=666), timeout=CALL_SECONDS)
    reply = await call
    return await _answered(f"sum.Add(333, 666) = {reply.res}", call)


async def do(channel: grpc.aio.Channel) -> str:
    """Call person.Do and return the line that says so."""
    call = person_pb2_grpc.PersonServiceStub(channel).Do(person_pb2.Person(name="李白", age=333), timeout=CALL_SECONDS)
    reply = await call
    return await _answered(f'person.Do(name="李白", age=333) = "{reply.name}", {reply.age}', call)


@dataclass(frozen=True, slots=True)
class Service:
    """A service, how many instances of it run, and a call that shows it at work."""

    name: str
    instances: int
    example: Callable[[grpc.aio.Channel], Awaitable[str]]

    @property
    def ids(self) -> list[str]:
        """The ids of its instances: sum-1, sum-2, ..."""
        return [f"{self.name}-{n}" for n in range(1, self.instances + 1)]


TABLE = (
    Service("sum", 3, add),
    Service("person", 3, do),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of what runs."""

    name: str
    id: str
    address: str
    health: str
    log: str


def missing(run: Path) -> list[str]:
    """Return the ids of the instances that should run but do not."""
    return [instance for service in TABLE for instance in service.ids if not process.running(run, instance)]


def start(cluster: Cluster, ids: Iterable[str]) -> None:
    """Start these instances; each chooses its own port and registers itself."""
    for instance in ids:
        command = [sys.executable, "-m", f"services.{instance.rpartition('-')[0]}", "--id", instance]
        command += ["--consul", ",".join(cluster.addresses)]
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}  # its log should be whole when it is killed
        process.start(instance, command, run=cluster.run, cwd=ROOT, env=env)


def wait_until_passing(cluster: Cluster, timeout: float = READY_SECONDS) -> None:
    """Wait until Consul says that every instance passes; raises LocalError naming one that does not, with its log."""
    deadline = time.monotonic() + timeout
    with Progress("waiting for the services") as progress:
        while waiting := [row for row in rows(cluster) if row.health != "passing"]:
            for row in waiting:
                found = process.recorded(cluster.run, row.id)
                last = found.tail() if found else ""
                if row.health == "not running":
                    raise LocalError(f"{row.id} exited while starting; the last lines of {row.log}:\n{last}")
                if time.monotonic() >= deadline:
                    names = ", ".join(f"{other.id} ({other.health})" for other in waiting)
                    raise LocalError(
                        f"expected every instance to pass within {timeout:g} s, but these do not: {names}; "
                        f"the last lines of {row.log}:\n{last}"
                    )
            progress(", ".join(f"{row.id} {row.health}" for row in waiting))
            time.sleep(POLL_SECONDS)


def rows(cluster: Cluster) -> list[Row]:
    """Return the state of every instance that should run, in the table's order."""
    found = []
    for service in TABLE:
        known = cluster.get(f"/v1/health/service/{service.name}")
        found += [_row(cluster.run, service, instance, known) for instance in service.ids]
    return found


def example_calls(addresses: list[str]) -> list[str]:
    """Call every service once, through discovery, and return a line for each."""

    async def calls() -> list[str]:
        registry = rollcall.ConsulRegistry(addresses)
        lines = []
        for service in TABLE:
            try:
                async with rollcall.dial(service.name, registry=registry) as channel:
                    lines.append(await service.example(channel))
            except rollcall.BadSettingError as error:
                raise LocalError(str(error)) from error
            except grpc.aio.AioRpcError as error:
                found = f"{error.code().name}: {error.details()}"
                raise LocalError(f"expected an answer from {service.name}, found {found}; see make logs") from error
        return lines

    return asyncio.run(calls())


async def _answered(text: str, call: Any) -> str:
    metadata = await call.trailing_metadata()
    who = next((value for key, value in metadata or () if key == "rollcall-instance"), "an instance that did not say")
    return f"{text:<41}    answered by {who}"


def _row(run: Path, service: Service, instance: str, known: list[dict[str, Any]] | None) -> Row:
    """Return the state of one instance, `known` being what Consul says about its service."""
    found = process.running(run, instance)
    log = str(run / "logs" / f"{instance}.log")
    if not found:
        return Row(service.name, instance, "", "not running", log)
    if found.frozen():
        return Row(service.name, instance, "", "frozen", log)
    if known is None:
        return Row(service.name, instance, "", "running, but Consul does not answer", log)
    ports = _listening(found.pid)
    for entry in known:
        # An instance killed a moment ago may still be registered as it was: count only what this process listens on.
        registered = entry["Service"]
        if registered["ID"] == instance and registered["Port"] in ports:
            health = (
                "passing" if all(check["Status"] == "passing" for check in entry["Checks"]) else "failing its check"
            )
            return Row(service.name, instance, f"{registered['Address']}:{registered['Port']}", health, log)
    return Row(service.name, instance, "", "not registered", log)


def _listening(pid: int) -> set[int]:
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return set()
    return {connection.laddr.port for connection in found if connection.status == psutil.CONN_LISTEN}

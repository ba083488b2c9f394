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
import requests

import rollcall
from contracts.greeter.v1 import greeter_pb2, greeter_pb2_grpc
from contracts.hello.v1.hello import HELLO
from contracts.person.v1 import person_pb2, person_pb2_grpc
from contracts.student.v1 import student_pb2, student_pb2_grpc
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from deploy.local import LocalError, process
from deploy.local.progress import Progress
from deploy.local.sites import ConsulSite
from rollcall import jsonrpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from deploy.local.sites import Listed, Site

ROOT = Path(__file__).parents[2]
CALL_SECONDS = 10.0
READY_SECONDS = 45.0
POLL_SECONDS = 0.1
PUBLIC = ("--tags", "public")
"""The flags of a service that the gateway makes reachable from outside."""


async def add(registry: rollcall.Registry) -> str:
    """Call sum.Add and return the line that says so."""
    async with rollcall.dial("sum", registry=registry) as channel:
        call = sum_pb2_grpc.SumServiceStub(channel).Add(sum_pb2.AddRequest(num1=333, num2=666), timeout=CALL_SECONDS)
        return await _answered(f"sum.Add(333, 666) = {(await call).res}", call)


async def do(registry: rollcall.Registry) -> str:
    """Call person.Do and return the line that says so."""
    async with rollcall.dial("person", registry=registry) as channel:
        person = person_pb2.Person(name="李白", age=333)
        call = person_pb2_grpc.PersonServiceStub(channel).Do(person, timeout=CALL_SECONDS)
        reply = await call
        return await _answered(f'person.Do(name="李白", age=333) = "{reply.name}", {reply.age}', call)


async def greet_in_chinese(registry: rollcall.Registry) -> str:
    """Call hello.HelloWorld, by JSON-RPC, and return the line that says so."""
    async with jsonrpc.dial(HELLO, registry=registry, deadline=CALL_SECONDS) as hello:
        reply = await hello.HelloWorld("李白")
        return _line(f'hello.HelloWorld("李白") = "{reply}"', jsonrpc.answered_by.get())


async def add_student(registry: rollcall.Registry) -> str:
    """Call student.AddFunc, which calls sum, and return the line that says so."""
    async with rollcall.dial("student", registry=registry) as channel:
        student = student_pb2.Student(name="李白", age=33, score=[90, 85, 77])
        metadata = (("idempotency-key", "make up"),)  # `make up` again stores no other student
        call = student_pb2_grpc.StudentServiceStub(channel).AddFunc(student, timeout=CALL_SECONDS, metadata=metadata)
        stored = await call
        text = f'student.AddFunc(name="李白", age=33, score=[90, 85, 77]) = id {stored.id}, total {stored.total}'
        return await _answered(text, call)


async def greet(registry: rollcall.Registry) -> str:
    """Call greeter.Call and return the line that says so."""
    async with rollcall.dial("greeter", registry=registry) as channel:
        request = greeter_pb2.CallRequest(name="李白")
        call = greeter_pb2_grpc.GreeterServiceStub(channel).Call(request, timeout=CALL_SECONDS)
        return await _answered(f'greeter.Call("李白") = "{(await call).msg}"', call)


async def add_by_abacus(registry: rollcall.Registry) -> str:
    """Call Add of the service that is not ours and return the line that says so."""
    async with rollcall.dial("abacus", registry=registry) as channel:
        stub = sum_pb2_grpc.SumServiceStub(channel)
        reply = await stub.Add(sum_pb2.AddRequest(num1=333, num2=666), timeout=CALL_SECONDS)
        return _line(f"abacus.Add(333, 666) = {reply.res}", "abacus, which knows nothing of Rollcall")


async def add_by_http(registry: rollcall.Registry) -> str:
    """Call sum.Add through the gateway, as curl would, and return the line that says so."""
    deadline = time.monotonic() + CALL_SECONDS
    while True:
        gateway = min(await asyncio.to_thread(registry.instances, "gateway"), key=lambda each: each.port)
        url = f"http://{gateway.target}/v1/sum/Add"
        answer = await asyncio.to_thread(_post, url, {"num1": 333, "num2": 666})
        if answer.ok:
            return _line(
                f"POST {url} = {answer.text.strip()}", f"{answer.headers['rollcall-instance']}, through {gateway.id}"
            )
        if time.monotonic() >= deadline:  # it learns of what has just been started within a moment
            raise LocalError(f"expected an answer from {url}, found {answer.status_code} {answer.text}; see make logs")
        await asyncio.sleep(POLL_SECONDS)


def _post(url: str, message: dict[str, int]) -> requests.Response:
    try:
        with requests.Session() as session:
            session.trust_env = False  # a proxy has no business on loopback
            return session.post(url, json=message, timeout=CALL_SECONDS)
    except requests.RequestException as error:
        raise LocalError(f"expected an answer from {url}, found: {error}; see make logs") from error


@dataclass(frozen=True, slots=True)
class Service:
    """A service, how many instances of it run, and a call that shows it at work."""

    name: str
    instances: int
    example: Callable[[rollcall.Registry], Awaitable[str]]
    flags: tuple[str, ...] = PUBLIC
    """What its instances are given beside their id and Consul's addresses; {run} stands for the run directory."""
    everywhere: bool = True
    """Whether it runs in each datacenter; otherwise in the first, and is called from there."""

    def ids(self, datacenter: int = 1) -> list[str]:
        """Return the ids of its instances in a datacenter: sum-1, sum-2, ...; in the next one the numbers go on."""
        if datacenter > 1 and not self.everywhere:
            return []
        first = 1 + self.instances * (datacenter - 1)
        return [f"{self.name}-{n}" for n in range(first, first + self.instances)]

    def runs_in(self, site: Site) -> list[str]:
        """Return the ids of its instances at a site."""
        return self.ids(site.number)

    def command(self, instance: str, site: Site) -> list[str]:
        """Return the command that runs one instance; it chooses its own port and registers itself."""
        flags = [flag.format(run=site.run) for flag in self.flags]
        return ["services." + self.name, "--id", instance, *site.flags(), *flags]


class Gateway(Service):
    """The gateway, whose instances are where people look for them."""

    def command(self, instance: str, site: Site) -> list[str]:
        """Return the command that runs one instance at its own port."""
        port = site.gateway + self.ids().index(instance)
        return [*Service.command(self, instance, site), "--port", str(port)]


class Foreign(Service):
    """A service that is not ours: one instance, which Consul has been told of by a file. See abacus.py."""

    def ids(self, datacenter: int = 1) -> list[str]:
        """Return the id that the file gives it."""
        return [self.name] if datacenter == 1 else []

    def runs_in(self, site: Site) -> list[str]:
        """Return its id where there is a Consul that has been told of it."""
        return self.ids(site.number) if site.abacus else []

    def command(self, instance: str, site: Site) -> list[str]:
        """Return the command that runs it where the file says."""
        return [f"deploy.local.{instance}", "--port", str(site.abacus)]


TABLE = (
    Service("hello", 3, greet_in_chinese),
    Service("sum", 3, add),
    Service("person", 3, do),
    Service(
        "student",
        3,
        add_student,
        flags=(*PUBLIC, "--database", "sqlite:///{run}/data/student.db"),
        everywhere=False,  # there is one store
    ),
    Service("greeter", 3, greet),
    Gateway("gateway", 2, add_by_http, flags=(), everywhere=False),
    Foreign("abacus", 1, add_by_abacus),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of what runs."""

    name: str
    id: str
    address: str
    health: str
    log: str


def missing(site: Site) -> list[str]:
    """Return the ids of the instances that should run at a site but do not."""
    wanted = (instance for service in TABLE for instance in service.runs_in(site))
    return [instance for instance in wanted if not process.running(site.run, instance)]


def start(site: Site, ids: Iterable[str]) -> None:
    """Start these instances, side by side."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}  # a log should be whole when its instance is killed
    (site.run / "data").mkdir(parents=True, exist_ok=True)
    services = {instance: service for service in TABLE for instance in service.runs_in(site)}
    for instance in ids:
        command = [sys.executable, "-m", *services[instance].command(instance, site)]
        process.start(instance, command, run=site.run, cwd=ROOT, env=env)


def wait_until_passing(site: Site, timeout: float = READY_SECONDS) -> None:
    """Wait until every instance is listed as passing; raises LocalError naming one that is not, with its log."""
    deadline = time.monotonic() + timeout
    with Progress("waiting for the services") as progress:
        while waiting := [row for row in rows(site) if row.health != "passing"]:
            for row in waiting:
                found = process.recorded(site.run, row.id)
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


def rows(site: Site) -> list[Row]:
    """Return the state of every instance that should run at a site, in the table's order."""
    found = []
    for service in TABLE:
        if ids := service.runs_in(site):
            known = site.listed(service.name)
            found += [_row(site.run, service, instance, known) for instance in ids]
    return found


def example_calls(site: Site) -> list[str]:
    """Call every service once from a site, through discovery, and return a line for each."""

    async def calls() -> list[str]:
        registry = site.registry()
        lines = []
        for service in callable_from(site):
            try:
                lines.append(await service.example(registry))
            except rollcall.BadSettingError as error:
                raise LocalError(str(error)) from error
            except grpc.aio.AioRpcError as error:
                found = f"{error.code().name}: {error.details()}"
                raise LocalError(f"expected an answer from {service.name}, found {found}; see make logs") from error
            except jsonrpc.JsonRpcError as error:
                raise LocalError(f"expected an answer from {service.name}, found: {error}; see make logs") from error
        return lines

    return asyncio.run(calls())


def callable_from(site: Site) -> list[Service]:
    """Return the services that can be called from a site: those elsewhere as well, where there is a Consul."""
    return [service for service in TABLE if service.runs_in(site) or isinstance(site, ConsulSite)]


async def _answered(text: str, call: Any) -> str:
    metadata = await call.trailing_metadata()
    who = next((value for key, value in metadata or () if key == "rollcall-instance"), "an instance that did not say")
    return _line(text, who)


def _line(text: str, who: str) -> str:
    return f"{text:<41}    answered by {who}"


def _row(run: Path, service: Service, instance: str, known: list[Listed] | None) -> Row:
    """Return the state of one instance, `known` being what the registry says about its service."""
    found = process.running(run, instance)
    log = str(run / "logs" / f"{instance}.log")
    if not found:
        return Row(service.name, instance, "", "not running", log)
    if found.frozen():
        return Row(service.name, instance, "", "frozen", log)
    if known is None:
        return Row(service.name, instance, "", "running, but Consul does not answer", log)
    ports = _listening(found.pid)
    # An instance killed a moment ago may still be registered as it was: count only what this process listens on. And it
    # can be listed by more than one server: passing once is passing.
    listed = [each for each in known if each.id == instance and each.port in ports]
    if not listed:
        return Row(service.name, instance, "", "not registered", log)
    address = f"{listed[0].address}:{listed[0].port}"
    passing = any(each.passing for each in listed)
    return Row(service.name, instance, address, "passing" if passing else "failing its check", log)


def _listening(pid: int) -> set[int]:
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return set()
    return {connection.laddr.port for connection in found if connection.status == psutil.CONN_LISTEN}

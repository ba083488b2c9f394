"""What the integration tests work with: instances of services as real processes, and callers that count."""

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

import grpc
import grpc.aio
import httpx
import requests

import rollcall
from deploy.local import process
from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from rollcall import jsonrpc

T = TypeVar("T")

ROOT = Path(__file__).parents[2]

CALLERS = 16
CALLS = 2000
SYNC_SECONDS = 130.0
"""What a Consul agent could not tell its leader, as there was none just then, it tells within two minutes: its interval
for that is one, and up to one more by chance (https://developer.hashicorp.com/consul/docs/concept/consistency)."""
PACE = 0.01  # seconds between two calls of one caller: leaves the machine's cores to those that are called


async def eventually(what: str, found: Callable[[], T], seconds: float = 15.0) -> tuple[T, float]:
    """Ask until the answer is true; return it and the seconds that took. Fails when it does not come in time."""
    begun = time.monotonic()
    while True:
        answer = await asyncio.to_thread(found)
        took = time.monotonic() - begun
        if answer:
            return answer, took
        assert took < seconds, f"{what}: not within {seconds} s"
        await asyncio.sleep(0.01)


class Fleet:
    """Instances of services, each a process, registered in one cluster."""

    def __init__(self, run: Path, cluster: Cluster, guard: Guard) -> None:
        self.run, self.cluster, self.guard = run, cluster, guard
        self.environment = {
            **os.environ,
            "ROLLCALL_CONSUL": ",".join(cluster.entrance),
            "ROLLCALL_CONSUL_FAILOVER": ",".join(cluster.others),
        }
        self.registry: rollcall.Registry = rollcall.ConsulRegistry(cluster.entrance, failover=list(cluster.others))
        self._programs: dict[str, tuple[str, tuple[str, ...]]] = {}

    def start(self, instance: str, *flags: str, module: str = "") -> None:
        """Start an instance, `sum-1` say; or again, with the flags it had."""
        program, flags = self._programs.setdefault(
            instance, (module or f"services.{instance.rpartition('-')[0]}", flags)
        )
        command = [sys.executable, "-m", program, "--id", instance, *flags]
        started = process.start(instance, command, run=self.run, cwd=ROOT, env=self.environment)
        self.guard.watch(started.pid)

    def signal(self, instance: str, number: Signals) -> None:
        self.process(instance).signal(number)

    def kill(self, instance: str) -> None:
        self.process(instance).kill()

    def stop(self, instance: str) -> None:
        """SIGTERM, and wait until it has drained and gone."""
        assert self.process(instance).stop(40), f"{instance} did not end by itself"

    def log(self, instance: str) -> str:
        return Path(self.process(instance).log).read_text()

    def runs(self, instance: str) -> bool:
        return process.running(self.run, instance) is not None

    def served(self, instance: str) -> int:
        """Return how many calls it has answered well, in all its lives."""
        return self.log(instance).count("code=OK")

    def process(self, instance: str) -> process.Process:
        found = process.recorded(self.run, instance)
        assert found, f"{instance} was never started"
        return found

    def passing(self, name: str) -> set[str]:
        """Return the ids of the instances that pass, in the datacenter of this cluster."""
        with contextlib.suppress(rollcall.RegistryError):
            return {instance.id for instance in self.registry.instances(name) if not instance.priority}
        return set()

    async def pass_all(self, name: str, count: int, seconds: float = SYNC_SECONDS) -> float:
        """Wait until this many instances pass; return the seconds it took."""
        begun = time.monotonic()
        try:
            await eventually(f"{count} of {name} pass", lambda: len(self.passing(name)) == count, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; Consul says: {await asyncio.to_thread(self.checks, name)}") from None
        return time.monotonic() - begun

    def checks(self, name: str) -> dict[str, Any]:
        """Return what each of Consul's servers knows of a service's checks, and how its processes are."""
        asked = f"/v1/health/checks/{name}?stale"
        said = {
            address: [(check["Node"], check["ServiceID"], check["Status"], check["Output"]) for check in answer]
            if isinstance(answer, list)
            else answer
            for address, answer in self._ask(asked).items()
        }
        runs = {instance: self.runs(instance) for instance in self._programs if instance.startswith(f"{name}-")}
        return {**said, "leader": self.cluster.leader(), "runs": runs}

    def _ask(self, path: str) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        for address in self.cluster.addresses:
            try:
                answers[address] = requests.get(f"http://{address}{path}", timeout=2).json()
            except requests.RequestException as error:
                answers[address] = type(error).__name__
        return answers

    def close(self) -> None:
        """Leave neither processes behind nor registrations, which the next test on this cluster would find."""
        for instance in self._programs:
            self.process(instance).kill()
        for n in self.cluster.ports:  # one that a test has stopped would come back with what was registered on it
            self.cluster.server(n).signal(Signals.SIGCONT)
            self.cluster.start_server(n)
        self.cluster.wait_for_leader()
        for instance in self._programs:
            self.registry.deregister(instance)


@dataclass
class Tally:
    """What the callers saw."""

    answered: Counter[str] = field(default_factory=Counter)
    """How many calls each instance has answered."""
    first: dict[str, float] = field(default_factory=dict)
    """When each instance first answered, by `time.monotonic`; clear it to watch for one that comes back."""
    failed: list[tuple[float, str, str]] = field(default_factory=list)
    """When, status and details of each failed call."""
    slowest: float = 0.0

    def __str__(self) -> str:
        spread = ", ".join(f"{name} {count:,}" for name, count in sorted(self.answered.items()))
        return f"{self.answered.total():,} calls ({spread}), {len(self.failed)} failed, slowest {self.slowest:.2f} s"


Call = Callable[[], Awaitable[str]]
"""Makes a call, sees that its answer is right, and returns the id of the instance that has given it."""


async def answered_by(call: Any) -> str:
    """Wait for the answer to a gRPC call; return the id of the instance that has given it."""
    await call
    return str(dict(await call.trailing_metadata())["rollcall-instance"])


@contextlib.asynccontextmanager
async def load(call: Call, instances: int = 3) -> AsyncIterator[Tally]:
    """Call from 16 callers, from before the block, when every instance has answered, until there were enough calls."""
    tally, over = Tally(), asyncio.Event()

    async def caller() -> None:
        while not over.is_set() or tally.answered.total() < CALLS:
            begun = time.monotonic()
            try:
                instance = await call()
                tally.answered[instance] += 1
                tally.first.setdefault(instance, time.monotonic())
            except grpc.aio.AioRpcError as error:
                tally.failed.append((time.monotonic(), error.code().name, error.details() or ""))
            except jsonrpc.JsonRpcError as error:
                tally.failed.append((time.monotonic(), type(error).__name__, str(error)))
            except httpx.HTTPStatusError as error:
                tally.failed.append((time.monotonic(), str(error.response.status_code), error.response.text))
            except httpx.HTTPError as error:
                tally.failed.append((time.monotonic(), type(error).__name__, str(error)))
            tally.slowest = max(tally.slowest, time.monotonic() - begun)
            await asyncio.sleep(PACE)

    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(caller())
        try:
            await eventually("every instance is called", lambda: len(tally.answered) == instances)
            yield tally
        finally:
            over.set()


def holders(cluster: Cluster, instance: str) -> set[int]:
    """Return the numbers of the servers whose agents hold a registration under this id; of those that answer."""
    found = set()
    for n, address in enumerate(cluster.addresses, start=1):
        with contextlib.suppress(requests.RequestException):
            if instance in requests.get(f"http://{address}/v1/agent/services", timeout=1).json():
                found.add(n)
    return found

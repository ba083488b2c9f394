"""It keeps answering over HTTP: requests all the while through two gateways, when these or what they call get hurt."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from signal import SIGCONT, SIGKILL, SIGSTOP

import httpx
import pytest

from tests.integration.fleet import CALLS, Call, Fleet, Tally, eventually, holders, load
from tests.waiting import free_port

pytestmark = pytest.mark.trouble

SUMS = ("sum-1", "sum-2", "sum-3")
HELLOS = ("hello-1", "hello-2", "hello-3")
GATEWAYS = ("gateway-1", "gateway-2")
PUBLIC = ("--tags", "public")


class System:
    """Three instances each of a gRPC and a JSON-RPC service, and two gateways at fixed ports."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.ports = [free_port() for _ in GATEWAYS]

    async def start(self) -> None:
        for instance in (*SUMS, *HELLOS):
            self.fleet.start(instance, *PUBLIC)
        for instance, port in zip(GATEWAYS, self.ports, strict=True):
            self.fleet.start(instance, "--port", str(port))
        for name, count in (("sum", 3), ("hello", 3), ("gateway", 2)):
            await self.fleet.pass_all(name, count)

    @asynccontextmanager
    async def posting(self, path: str, message: object, expected: object) -> AsyncIterator[Call]:
        """Post to the gateways in turn; where a connection is refused, to the other one."""
        turn = itertools.count()
        urls = [f"http://127.0.0.1:{port}/v1/{path}" for port in self.ports]
        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:

            async def call() -> str:
                first = next(turn) % len(urls)
                try:
                    answer = await client.post(urls[first], json=message)
                except httpx.ConnectError:
                    answer = await client.post(urls[first - 1], json=message)
                answer.raise_for_status()
                assert answer.json() == expected
                return str(answer.headers["rollcall-instance"])

            yield call

    @asynccontextmanager
    async def load(self) -> AsyncIterator[dict[str, Tally]]:
        """Make calls of both kinds; what becomes of them, by service."""
        await self.start()
        async with (
            self.posting("sum/Add", {"num1": 333, "num2": 666}, {"res": "999"}) as add,
            self.posting("hello/HelloWorld", "李白", "李白 你好") as greet,
        ):
            await eventually("the gateways know both", self.known, 20)
            async with load(add) as sums, load(greet) as hellos:
                yield {"sum": sums, "hello": hellos}

    def known(self) -> bool:
        return all(
            httpx.put(f"http://127.0.0.1:{port}/v1/{path}").status_code == 405
            for port in self.ports
            for path in ("sum/Add", "hello/HelloWorld")
        )


@pytest.fixture
def system(fleet: Fleet) -> System:
    return System(fleet)


def none_failed(report: list[str], tallies: dict[str, Tally], measured: str = "") -> None:
    report.extend(f"{name}: {tally}" for name, tally in tallies.items())
    report.extend([measured] if measured else [])
    for name, tally in tallies.items():
        assert not tally.failed, (name, tally.failed[:3])


async def called_again(tally: Tally, instance: str) -> None:
    tally.first.clear()
    await eventually(f"{instance} is called again", lambda: tally.first.get(instance))


def test_instances_are_killed(system: System, report: list[str]) -> None:
    async def scenario() -> None:
        fleet = system.fleet
        async with system.load() as tallies:
            for name, tally in tallies.items():
                for instance in (f"{name}-1", f"{name}-2"):
                    await asyncio.to_thread(fleet.kill, instance)
                    await fleet.pass_all(name, 2)
                    fleet.start(instance)
                    await fleet.pass_all(name, 3)
                    await called_again(tally, instance)
        none_failed(report, tallies)

    asyncio.run(scenario())


def test_a_rolling_restart_of_what_is_called(system: System, report: list[str]) -> None:
    async def scenario() -> None:
        fleet = system.fleet
        async with system.load() as tallies:
            for name in tallies:
                for instance in (f"{name}-1", f"{name}-2", f"{name}-3"):
                    await asyncio.to_thread(fleet.stop, instance)
                    fleet.start(instance)
                    await fleet.pass_all(name, 3)
        none_failed(report, tallies)

    asyncio.run(scenario())


def test_an_instance_freezes(system: System, report: list[str]) -> None:
    async def scenario() -> None:
        fleet = system.fleet
        async with system.load() as tallies:
            for name in tallies:
                fleet.signal(f"{name}-2", SIGSTOP)
            await asyncio.sleep(3)  # the scenario's own measure, not a wait for anything
            for name in tallies:
                fleet.signal(f"{name}-2", SIGCONT)
            for name, tally in tallies.items():
                await called_again(tally, f"{name}-2")
        none_failed(report, tallies)

    asyncio.run(scenario())


def test_a_rolling_restart_of_the_gateways(system: System, report: list[str]) -> None:
    async def scenario() -> None:
        fleet = system.fleet
        async with system.load() as tallies:
            for instance in GATEWAYS:
                await asyncio.to_thread(fleet.stop, instance)
                fleet.start(instance)
                await fleet.pass_all("gateway", 2)
        none_failed(report, tallies)

    asyncio.run(scenario())


@pytest.mark.parametrize("which", ["leader", "holder"])
def test_a_consul_server_is_killed(system: System, report: list[str], which: str) -> None:
    async def scenario() -> None:
        fleet = system.fleet
        cluster = fleet.cluster
        async with system.load() as tallies:
            hurt = await asyncio.to_thread(cluster.wait_for_leader)
            if which == "holder":
                (hurt,) = holders(cluster, "gateway-1")
            await asyncio.to_thread(cluster.stop_server, hurt, SIGKILL)
            await eventually("a leader", lambda: cluster.leader() not in (0, hurt), 30)
            for name, count in (("sum", 3), ("hello", 3), ("gateway", 2)):
                await fleet.pass_all(name, count)
            fleet.start("sum-4", *PUBLIC)  # discovery works on
            await eventually("one more is called", lambda: tallies["sum"].first.get("sum-4"), 30)
            await asyncio.to_thread(cluster.start_server, hurt)
            await asyncio.to_thread(cluster.wait_for_leader)
        none_failed(report, tallies)

    asyncio.run(scenario())


@pytest.mark.parametrize("data", ["kept", "lost"])
def test_all_of_consul_is_away(system: System, report: list[str], data: str) -> None:
    async def scenario() -> None:
        cluster = system.fleet.cluster
        async with system.load() as tallies:
            await asyncio.gather(*(asyncio.to_thread(cluster.stop_server, n, SIGKILL) for n in (1, 2, 3)))
            if data == "lost":
                for n in (1, 2, 3):
                    cluster.wipe_data(n)
            before = sum(tally.answered.total() for tally in tallies.values())
            await asyncio.sleep(20)  # the scenario's own measure
            during = sum(tally.answered.total() for tally in tallies.values()) - before
            await asyncio.to_thread(cluster.start)
            returned = time.monotonic()
            for name, count in (("sum", 3), ("hello", 3), ("gateway", 2)):
                await system.fleet.pass_all(name, count)
            await eventually("what is kept without Consul is given up", lambda: time.monotonic() - returned > 16, 20)
        none_failed(report, tallies, f"{during:,} calls meanwhile")
        assert during > CALLS / 2

    asyncio.run(scenario())

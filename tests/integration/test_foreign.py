"""A service that is not ours is found and called like any other: Consul knows it from a file, and it knows nothing."""

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

import rollcall
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from deploy.local import process
from deploy.local.cluster import Cluster, free_ports
from deploy.local.guard import Guard
from tests.integration.fleet import ROOT, eventually
from tests.waiting import free_port


class Abacus:
    """The service, and the Consul servers that have been told of it."""

    def __init__(self, cluster: Cluster, guard: Guard) -> None:
        self.cluster = cluster
        self.registry = rollcall.ConsulRegistry(cluster.addresses)
        self._guard = guard

    def start(self) -> None:
        command = [sys.executable, "-m", "deploy.local.abacus", "--port", str(self.cluster.abacus)]
        self._guard.watch(process.start("abacus", command, run=self.cluster.run, cwd=ROOT).pid)

    def kill(self) -> None:
        found = process.recorded(self.cluster.run, "abacus")
        assert found, "it was never started"
        found.kill()

    def instances(self) -> list[str]:
        return [f"{each.id} at {each.target}" for each in self.registry.instances("abacus")]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, consul_binary: Path, guard: Guard) -> Iterator[Cluster]:
    run = tmp_path_factory.mktemp("told")
    with Cluster(run, free_ports(), consul_binary, on_start=guard.watch, abacus=free_port()) as cluster:
        yield cluster
    shutil.rmtree(run / "data", ignore_errors=True)


@pytest.fixture
def abacus(told: Cluster, guard: Guard) -> Iterator[Abacus]:
    abacus = Abacus(told, guard)
    abacus.start()
    yield abacus
    abacus.kill()


async def call(channel: rollcall.Channel) -> str:
    """Return what a call comes to: the sum, or status and details."""
    try:
        reply = await sum_pb2_grpc.SumServiceStub(channel).Add(sum_pb2.AddRequest(num1=333, num2=666))
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return str(reply.res)


async def calls_come_to(channel: rollcall.Channel, expected: str) -> None:
    """Call until a call comes to what is expected, or begins so."""
    deadline = time.monotonic() + 15
    while not (came_to := await call(channel)).startswith(expected):
        assert time.monotonic() < deadline, came_to
        await asyncio.sleep(0.01)


async def found(abacus: Abacus) -> None:
    """Wait until it passes. The servers have an entry each for it; those who ask are told of one instance."""
    await eventually("it passes", lambda: abacus.instances() == [f"abacus at 127.0.0.1:{abacus.cluster.abacus}"])


def test_it_imports_nothing_of_ours(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys, deploy.local.abacus; sys.exit('rollcall' in sys.modules)")
    assert subprocess.run([sys.executable, program], env={"PYTHONPATH": str(ROOT)}, check=False).returncode == 0


def test_it_is_found_and_called(abacus: Abacus) -> None:
    async def scenario() -> None:
        await found(abacus)
        async with rollcall.dial("abacus", registry=abacus.registry) as channel:
            await calls_come_to(channel, "999")

    asyncio.run(scenario())


def test_calls_say_so_when_it_dies_and_reach_it_when_it_is_back(abacus: Abacus) -> None:
    async def scenario() -> None:
        await found(abacus)
        # A service that loses all its instances at once keeps them for a while, as Consul may be at fault: not here.
        async with rollcall.dial("abacus", registry=abacus.registry, deadline=2, empty_grace=0) as channel:
            await calls_come_to(channel, "999")
            await asyncio.to_thread(abacus.kill)
            await calls_come_to(channel, "UNAVAILABLE: no instance of service 'abacus' passes its checks")
            abacus.start()
            await calls_come_to(channel, "999")

    asyncio.run(scenario())


def test_it_stays_found_while_a_server_is_away(abacus: Abacus) -> None:
    async def scenario() -> None:
        await found(abacus)
        leader = await asyncio.to_thread(abacus.cluster.wait_for_leader)
        async with rollcall.dial("abacus", registry=abacus.registry) as channel:
            await asyncio.to_thread(abacus.cluster.stop_server, leader, signal.SIGKILL)
            try:
                await eventually("another leader", lambda: abacus.cluster.leader() not in (0, leader))
                await found(abacus)
                await calls_come_to(channel, "999")
            finally:
                await asyncio.to_thread(abacus.cluster.start_server, leader)

    asyncio.run(scenario())

"""hello through discovery: real processes, registered in a real Consul, called from this one."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests

from contracts.hello.v1.hello import HELLO, Hello
from rollcall import jsonrpc
from tests.integration.fleet import CALLERS, CALLS, PACE, Fleet, eventually

pytestmark = pytest.mark.trouble

HELLOS = ("hello-1", "hello-2", "hello-3")


@dataclass
class Tally:
    """What the callers saw."""

    answered: Counter[str] = field(default_factory=Counter)
    failed: list[jsonrpc.JsonRpcError] = field(default_factory=list)
    slowest: float = 0.0

    def __str__(self) -> str:
        spread = ", ".join(f"{name} {count:,}" for name, count in sorted(self.answered.items()))
        return f"{self.answered.total():,} calls ({spread}), {len(self.failed)} failed, slowest {self.slowest:.2f} s"

    async def again(self, instance: str) -> None:
        """Wait until an instance answers again."""
        before = self.answered[instance]
        await eventually(f"{instance} answers", lambda: self.answered[instance] > before)


@asynccontextmanager
async def load(fleet: Fleet, **settings: Any) -> AsyncIterator[Tally]:
    """Call from 16 callers, from before the block, when all instances have answered, until there were enough calls."""
    tally, over = Tally(), asyncio.Event()

    async def caller(hello: Hello) -> None:
        while not over.is_set() or tally.answered.total() < CALLS:
            begun = time.monotonic()
            try:
                assert await hello.HelloWorld("李白") == "李白 你好"
                tally.answered[jsonrpc.answered_by.get()] += 1
            except jsonrpc.JsonRpcError as error:
                tally.failed.append(error)
            tally.slowest = max(tally.slowest, time.monotonic() - begun)
            await asyncio.sleep(PACE)

    async with jsonrpc.dial(HELLO, registry=fleet.registry, **settings) as hello, asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(caller(hello))
        try:
            await eventually("every instance is called", lambda: len(tally.answered) == len(HELLOS))
            yield tally
        finally:
            over.set()


async def started(fleet: Fleet) -> None:
    for instance in HELLOS:
        fleet.start(instance)
    await fleet.pass_all("hello", len(HELLOS))


def test_an_instance_is_killed(fleet: Fleet, report: list[str]) -> None:
    async def scenario() -> None:
        await started(fleet)
        async with load(fleet) as tally:
            for instance in HELLOS[:2]:
                await asyncio.to_thread(fleet.kill, instance)
                others = [each for each in HELLOS if each != instance]
                await asyncio.gather(*map(tally.again, others))  # long before Consul's check, each 5 s, has noticed
                fleet.start(instance)
                await tally.again(instance)
        report.append(str(tally))
        assert not tally.failed, tally.failed[:3]

    asyncio.run(scenario())


def test_a_rolling_restart(fleet: Fleet, report: list[str]) -> None:
    """Without retries: a drain has to lose nothing by itself, as for a method that must not run twice."""

    async def scenario() -> None:
        await started(fleet)
        async with load(fleet, retries=0) as tally:
            for instance in HELLOS:
                await asyncio.to_thread(fleet.stop, instance)
                fleet.start(instance)
                await fleet.pass_all("hello", 3)
                await tally.again(instance)
        report.append(str(tally))
        assert not tally.failed, tally.failed[:3]

    asyncio.run(scenario())


def test_a_call_is_counted_and_logged(fleet: Fleet) -> None:
    async def scenario() -> None:
        fleet.start("hello-1")
        await fleet.pass_all("hello", 1)
        async with jsonrpc.dial(HELLO, registry=fleet.registry) as hello:
            await hello.HelloWorld("李白")
        (instance,) = fleet.registry.instances("hello")
        page = await asyncio.to_thread(
            requests.get, f"http://127.0.0.1:{instance.meta['http_port']}/metrics", timeout=5
        )
        labels = 'jsonrpc_code="OK",jsonrpc_method="HelloWorld",jsonrpc_service="hello"'
        assert f"jsonrpc_server_handled_total{{{labels}}} 1.0" in page.text
        await eventually("the call's line", lambda: "hello.HelloWorld code=OK" in fleet.log("hello-1"))
        assert "李白" not in fleet.log("hello-1")

    asyncio.run(scenario())


def test_consuls_check_is_not_noticed(fleet: Fleet) -> None:
    """It connects and closes without a byte."""

    async def scenario() -> None:
        fleet.start("hello-1", "--check-interval", "0.1")
        await fleet.pass_all("hello", 1)
        (check,) = fleet.cluster.get("/v1/health/checks/hello")
        assert check["Type"] == "tcp"
        assert (check["Interval"], check["Timeout"]) == ("100ms", "2s")
        (instance,) = fleet.registry.instances("hello")
        for _ in range(10):
            socket.create_connection(("127.0.0.1", instance.port)).close()
        async with jsonrpc.dial(HELLO, registry=fleet.registry) as hello:
            await hello.HelloWorld("李白")
        await eventually("the call's line", lambda: "hello.HelloWorld code=OK" in fleet.log("hello-1"))
        lines = fleet.log("hello-1").splitlines()
        expected = (" serves at ", " is registered in ", " hello.HelloWorld code=OK ")
        assert [sum(each in line for line in lines) for each in expected] == [1, 1, 1]
        assert len(lines) == len(expected)

    asyncio.run(scenario())


def test_a_port_that_is_taken_is_refused_by_name(fleet: Fleet) -> None:
    fleet.start("hello-1")
    asyncio.run(fleet.pass_all("hello", 1))
    (instance,) = fleet.registry.instances("hello")
    fleet.start("hello-2", "--port", str(instance.port))
    assert fleet.process("hello-2").wait(20)
    assert "hello: setting --host, --port (ROLLCALL_HOST, ROLLCALL_PORT): cannot listen" in fleet.log("hello-2")

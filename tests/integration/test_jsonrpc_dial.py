"""hello through discovery: real processes, registered in a real Consul, called from this one."""

import asyncio
import functools
import socket

import pytest
import requests

from contracts.hello.v1.hello import HELLO
from rollcall import jsonrpc
from tests.integration.fleet import Fleet, eventually, load

pytestmark = pytest.mark.trouble

HELLOS = ("hello-1", "hello-2", "hello-3")


def test_a_rolling_restart_without_retries(fleet: Fleet, report: list[str]) -> None:
    """A drain has to lose nothing by itself, as for a method that must not run twice."""

    async def scenario() -> None:
        for instance in HELLOS:
            fleet.start(instance)
        await fleet.pass_all("hello", len(HELLOS))
        async with jsonrpc.dial(HELLO, registry=fleet.registry, retries=0) as hello:

            async def call() -> str:
                assert await hello.HelloWorld("李白") == "李白 你好"
                return jsonrpc.answered_by.get()

            async with load(call) as tally:
                for instance in HELLOS:
                    await asyncio.to_thread(fleet.stop, instance)
                    fleet.start(instance)
                    await fleet.pass_all("hello", len(HELLOS))
                    tally.first.clear()
                    await eventually("it is called again", functools.partial(tally.first.get, instance))
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


def test_consul_checks_as_the_service_says(fleet: Fleet) -> None:
    fleet.start("hello-1")
    asyncio.run(fleet.pass_all("hello", 1))
    (check,) = fleet.cluster.get("/v1/health/checks/hello")
    assert (check["Type"], check["Interval"], check["Timeout"]) == ("tcp", "5s", "2s")


def test_consuls_check_is_not_noticed(fleet: Fleet) -> None:
    """It connects and closes without a byte."""

    async def scenario() -> None:
        fleet.start("hello-1", "--check-interval", "0.1")
        await fleet.pass_all("hello", 1)
        (check,) = fleet.cluster.get("/v1/health/checks/hello")
        assert (check["Type"], check["Interval"], check["Timeout"]) == ("tcp", "100ms", "2s")
        (instance,) = fleet.registry.instances("hello")
        for _ in range(10):
            socket.create_connection(("127.0.0.1", instance.port)).close()
        async with jsonrpc.dial(HELLO, registry=fleet.registry) as hello:
            await hello.HelloWorld("李白")
        expected = (" serves at ", " is registered in ", " hello.HelloWorld code=OK ")
        # It passes before it knows so itself.
        await eventually("all three lines", lambda: all(each in fleet.log("hello-1") for each in expected))
        lines = fleet.log("hello-1").splitlines()
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

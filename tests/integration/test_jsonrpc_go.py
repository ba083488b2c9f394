"""Wire-compatible with Go: a real Go client calls our server, and our client a real Go server."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from contracts.hello.v1.hello import HELLO
from deploy.local import LocalError
from deploy.local.guard import Guard
from rollcall import jsonrpc
from services.hello.handler import Hello
from tests.gojsonrpc.build import program

SECONDS = 60


def built(name: str) -> Path:
    try:
        return program(name)
    except LocalError as error:
        pytest.skip(f"no Go: {error}")


async def go(*command: str | Path) -> dict[str, object]:
    """Run a Go program and return what it prints, as JSON."""
    running = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        said, _ = await asyncio.wait_for(running.communicate(), SECONDS)
    finally:
        if running.returncode is None:
            running.kill()
    assert running.returncode == 0
    found: dict[str, object] = json.loads(said)
    return found


def test_a_go_client_calls_our_server() -> None:
    client = built("client")

    async def scenario() -> dict[str, object]:
        server = jsonrpc.Server()
        server.register(HELLO, Hello())
        port = await server.listen("127.0.0.1", 0)
        await server.start()
        try:
            return await go(client, "check", f"127.0.0.1:{port}")
        finally:
            await server.stop(0)

    assert asyncio.run(scenario()) == {
        "hello 李白": "李白 你好",
        "hello ": " 你好",
        'hello "\\\n\t</>&\u2028': '"\\\n\t</>&\u2028 你好',
        "hello 𝄞 \0 é": "𝄞 \0 é 你好",
        "hello {[}]": "{[}] 你好",
        "big": True,
        # What Go's own server says to these.
        "no method": "error: rpc: can't find method hello.Nothing",
        "no service": "error: rpc: can't find service nobody.HelloWorld",
        "ill-formed": "error: rpc: service/method request ill-formed: HelloWorld",
        # Go speaks of its own types here, and takes null for an empty string.
        "number": "error: hello.HelloWorld: expected str, found a number",
        "object": "error: hello.HelloWorld: expected str, found an object",
        "null": "error: hello.HelloWorld: expected str, found null",
        "concurrent": 1000,
        "after all": "李白 你好",
    }


@pytest.fixture(scope="module")
def go_server(guard: Guard) -> Iterator[str]:
    """The address of a server written in Go."""
    # A session of its own, since the guard kills process groups.
    with subprocess.Popen([built("server")], stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        guard.watch(server.pid)
        try:
            assert server.stdout
            yield f"127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.kill()


@dataclass
class Point:
    X: int
    Y: int


class Trial(Protocol):
    """What the Go server is tried by."""

    async def Fail(self, text: str, /) -> str: ...

    async def Slow(self, milliseconds: int, /) -> int: ...

    async def Mirror(self, point: Point, /) -> Point: ...


TRIAL = jsonrpc.Contract("trial", Trial)


class Missing(Protocol):
    """What the Go server has not, or has otherwise."""

    async def Nothing(self, text: str, /) -> str: ...

    async def Slow(self, text: str, /) -> str: ...


MISSING = jsonrpc.Contract("trial", Missing)


def test_our_client_calls_a_go_server(go_server: str) -> None:
    async def scenario() -> None:
        async with jsonrpc.connect(go_server, HELLO) as hello:
            for name in ("李白", "", '"\\\n\t</>&\u2028', "𝄞 \0 é", "{[}]", "白" * 300_000):
                assert await hello.HelloWorld(name) == f"{name} 你好"
            answers = await asyncio.gather(*(hello.HelloWorld(str(number)) for number in range(1000)))
            assert answers == [f"{number} 你好" for number in range(1000)]

    asyncio.run(scenario())


def test_structs_and_errors_of_a_go_server(go_server: str) -> None:
    async def scenario() -> None:
        async with jsonrpc.connect(go_server, TRIAL) as trial, jsonrpc.connect(go_server, MISSING) as missing:
            assert await trial.Mirror(Point(X=1, Y=2)) == Point(X=2, Y=1)
            with pytest.raises(jsonrpc.RemoteError, match=r"^醉 <了>$"):
                await trial.Fail("醉 <了>")
            with pytest.raises(jsonrpc.RemoteError, match=r"^rpc: can't find method trial\.Nothing$"):
                await missing.Nothing("x")
            with pytest.raises(jsonrpc.RemoteError, match="cannot unmarshal string"):
                await missing.Slow("x")
            assert await trial.Slow(0) == 0

    asyncio.run(scenario())


def test_replies_of_a_go_server_come_in_any_order(go_server: str) -> None:
    async def scenario() -> None:
        ended: list[int] = []

        async with jsonrpc.connect(go_server, TRIAL) as trial:

            async def call(milliseconds: int) -> None:
                ended.append(await trial.Slow(milliseconds))

            await asyncio.gather(call(600), call(300), call(0))
        assert ended == [0, 300, 600]

    asyncio.run(scenario())


def test_a_late_reply_of_a_go_server_is_nobodys(go_server: str) -> None:
    async def scenario() -> None:
        async with jsonrpc.connect(go_server, TRIAL, deadline=1) as trial:
            late = "^trial.Slow was not answered by 127.0.0.1:[0-9]+ in 1 s$"
            with pytest.raises(jsonrpc.DeadlineExceededError, match=late):
                await trial.Slow(1500)
            for _ in range(8):  # while that reply comes
                assert await trial.Slow(100) == 100

    asyncio.run(scenario())

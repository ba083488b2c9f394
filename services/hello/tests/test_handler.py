"""hello, over the wire."""

import asyncio
import json
import os
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable

import pytest

from contracts.hello.v1.hello import HELLO
from rollcall import jsonrpc
from services.hello.handler import Hello
from tests import debian

SECONDS = 10


def serve(talk: Callable[[int], Awaitable[bytes]]) -> bytes:
    """Serve hello, and return what the talk with its port has brought."""

    async def scenario() -> bytes:
        server = jsonrpc.Server()
        server.register(HELLO, Hello())
        port = await server.listen("127.0.0.1", 0)
        await server.start()
        try:
            return await asyncio.wait_for(talk(port), SECONDS)
        finally:
            await server.stop(0)

    return asyncio.run(scenario())


@pytest.mark.parametrize("name", ["李白", "", "World", '"\\', "𝄞\n\0", "x" * 100_000])
def test_hello_world(name: str) -> None:
    async def talk(port: int) -> bytes:
        async with jsonrpc.connect(f"127.0.0.1:{port}", HELLO) as hello:
            return (await hello.HelloWorld(name)).encode()

    assert serve(talk).decode() == f"{name} 你好"


# What a person types: echo '{"method":"hello.HelloWorld","params":["李白"],"id":0}' | nc 127.0.0.1 PORT
TYPED = '{"method":"hello.HelloWorld","params":["李白"],"id":0}\n'
PRINTED = '{"id":0,"result":"李白 你好","error":null}\n'


async def as_nc_does(port: int) -> bytes:
    """All is sent, then the end of it, before there is a reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(TYPED.encode())
    writer.write_eof()
    said = await reader.read()  # until the server closes
    writer.close()
    return said


async def by_nc(port: int) -> bytes:
    """Have the very command run, which needs nc."""
    command = f"echo '{TYPED.strip()}' | nc 127.0.0.1 {port}"
    shell = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE, start_new_session=True)
    try:
        assert shell.stdout
        return await shell.stdout.readline()
    finally:  # OpenBSD's nc tells the server of its input's end only with -N, and waits for the server's
        if shell.returncode is None:
            os.killpg(shell.pid, signal.SIGTERM)
        await shell.wait()


@pytest.mark.parametrize("talk", [as_nc_does, by_nc])
def test_as_typed_in_a_shell(talk: Callable[[int], Awaitable[bytes]]) -> None:
    if talk is by_nc and not shutil.which("nc"):
        debian.install("netcat-openbsd")
        if not shutil.which("nc"):
            pytest.skip("no nc on the PATH, and netcat-openbsd, which has it, could not be installed")
    assert serve(talk).decode() == PRINTED


def test_the_reply_is_plain_json() -> None:
    async def talk(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(TYPED.encode())
            return await asyncio.to_thread(client.makefile("rb").readline)

    assert json.loads(serve(talk)) == {"id": 0, "result": "李白 你好", "error": None}

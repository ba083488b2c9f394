"""An instance whose task is cancelled, as by a test that fails beside it, leaves nothing behind."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import rollcall
from contracts.hello.v1.hello import HELLO
from contracts.sum.v1 import sum_pb2_grpc
from rollcall import jsonrpc, web
from rollcall.life import Life
from rollcall.registry import Instance
from rollcall.settings import ServiceSettings
from services.hello.handler import Hello
from services.sum.handler import Sum
from tests.waiting import eventually


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    """Never called."""


@asynccontextmanager
async def _app(settings: web.Settings) -> AsyncIterator[Any]:  # noqa: ARG001
    yield _answer


def _grpc() -> tuple[Life, ServiceSettings]:
    service = rollcall.Service("cancelled")
    service.add(sum_pb2_grpc.add_SumServiceServicer_to_server, Sum())
    return service, ServiceSettings()


def _jsonrpc() -> tuple[Life, ServiceSettings]:
    service = jsonrpc.Service("cancelled")
    service.register(HELLO, Hello())
    return service, ServiceSettings()


def _http() -> tuple[Life, ServiceSettings]:
    return web.Service("cancelled", _app), web.Settings()


def _holders(instance: Instance) -> list[str]:
    return [each.name for each in threading.enumerate() if instance.id in each.name]


@pytest.mark.parametrize("make", [_grpc, _jsonrpc, _http])
@pytest.mark.parametrize("draining", [False, True])
def test_an_instance_that_is_cancelled(make: Callable[[], tuple[Life, ServiceSettings]], draining: bool) -> None:  # noqa: FBT001
    registry = rollcall.MemoryRegistry()

    async def test() -> Instance:
        up, stop = asyncio.Queue[Instance](), asyncio.Event()
        service, settings = make()
        life = asyncio.create_task(service.live(settings, registry, stop, up.put_nowait))
        instance = await up.get()
        assert _holders(instance)
        if draining:
            stop.set()
            await asyncio.to_thread(eventually, "it drains", lambda: not registry.instances("cancelled"))
        life.cancel()
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await life
        return instance

    instance = asyncio.run(test())
    assert registry.instances("cancelled") == ()
    eventually("nobody holds its registration", lambda: not _holders(instance))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((instance.address, instance.port), timeout=5)

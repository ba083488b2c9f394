"""An instance that ends in a hurry, as one whose task is cancelled by a test that fails beside it, leaves nothing."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
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
from tests.waiting import eventually, free_port


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


@asynccontextmanager
async def _never(settings: ServiceSettings) -> AsyncIterator[Any]:
    opening.set()
    await asyncio.Event().wait()
    yield settings


opening = threading.Event()


def _opening_grpc() -> Life:
    service = rollcall.Service("cancelled")
    service.add(sum_pb2_grpc.add_SumServiceServicer_to_server, _never)
    return service


def _opening_http() -> Life:
    return web.Service("cancelled", _never)


@pytest.mark.parametrize("make", [_opening_grpc, _opening_http])
def test_one_that_is_cancelled_while_it_opens_what_it_needs(make: Callable[[], Life]) -> None:
    port = free_port()

    async def test() -> None:
        opening.clear()
        life = make().live(web.Settings(port=port), rollcall.MemoryRegistry(), asyncio.Event())
        task = asyncio.create_task(life)
        assert await asyncio.to_thread(opening.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        socket.create_server(("127.0.0.1", port)).close()  # in vain while anybody listens there

    asyncio.run(test())


def test_one_whose_handlers_have_taken_all_threads_is_deregistered_all_the_same() -> None:
    registry, over = rollcall.MemoryRegistry(), threading.Event()

    async def test() -> None:
        up, stop = asyncio.Queue[Instance](), asyncio.Event()
        service, _ = _grpc()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        life = asyncio.create_task(service.live(ServiceSettings(drain=0), registry, stop, up.put_nowait))
        await up.get()
        blocking = asyncio.create_task(asyncio.to_thread(over.wait))
        stop.set()
        async with asyncio.timeout(10):
            await life
        over.set()
        await blocking

    asyncio.run(test())
    assert registry.instances("cancelled") == ()

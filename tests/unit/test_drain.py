"""How long an instance goes on answering when it drains: callers may take longer than its setting to hear of it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

import rollcall
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from rollcall.registry import Instance
from rollcall.service import QUIET
from rollcall.settings import ServiceSettings
from services.sum.handler import Sum

DRAIN = 0.2  # seconds


class Draining:
    """An instance to call past all discovery, as a caller does that has not heard of what it registered last."""

    def __init__(self, instance: Instance, stop: asyncio.Event, life: "asyncio.Task[None]") -> None:
        self.stop, self.life = stop, life
        self.channel = grpc.aio.insecure_channel(instance.target)
        self._stub = sum_pb2_grpc.SumServiceStub(self.channel)

    async def call_on(self) -> None:
        while True:
            await self.call()

    async def call(self) -> None:
        assert (await self._stub.Add(sum_pb2.AddRequest(num1=1, num2=2), timeout=10)).res == 3


@asynccontextmanager
async def living(settings: ServiceSettings) -> AsyncIterator[Draining]:
    registry = rollcall.MemoryRegistry()
    up, stop = asyncio.Queue[Instance](), asyncio.Event()
    service = rollcall.Service("sum")
    service.add(sum_pb2_grpc.add_SumServiceServicer_to_server, Sum())
    async with asyncio.timeout(settings.drain + settings.grace + 20), asyncio.TaskGroup() as group:
        life = group.create_task(service.live(settings, registry, stop, up.put_nowait))
        draining = Draining(await up.get(), stop, life)
        async with draining.channel:
            await draining.call()
            yield draining
            await life


def test_it_answers_until_its_callers_have_heard() -> None:
    async def test() -> None:
        async with living(ServiceSettings(drain=DRAIN, grace=20)) as instance:
            instance.stop.set()
            heard = time.monotonic() + DRAIN + 2 * QUIET
            while time.monotonic() < heard:
                await instance.call()
            last = time.monotonic()
            await instance.life
            assert time.monotonic() - last > 0.9 * QUIET
            assert time.monotonic() - last < 0.5 * 20, "it did not wait for as long as it may"

    asyncio.run(test())


def test_callers_that_never_hear_are_not_waited_for_for_ever() -> None:
    async def test() -> None:
        async with living(ServiceSettings(drain=DRAIN, grace=4)) as instance:
            instance.stop.set()
            asked = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError):
                await instance.call_on()
            assert time.monotonic() - asked > DRAIN + 0.5 * 4

    asyncio.run(test())


@pytest.mark.parametrize("drain", [0.0, QUIET])
def test_it_does_not_wait_where_nobody_calls_or_no_drain_is_wanted(
    drain: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with living(ServiceSettings(drain=drain, grace=20)) as instance:
            instance.stop.set()

    with caplog.at_level("INFO"):
        asyncio.run(test())
    assert "those in flight have 20 s" in caplog.text

"""Calls of all four kinds, however they end: counted in, counted out, timed, and logged under their trace."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_status import rpc_status

from rollcall.errors import refuse
from rollcall.instrument import INSTANCE, Instrumented
from rollcall.telemetry import Telemetry
from tests.waiting import eventually

KINDS = {
    "unary_unary": "unary",
    "unary_stream": "server_stream",
    "stream_unary": "client_stream",
    "stream_stream": "bidi_stream",
}
SERVICE = "test.v1.Kinds"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01")
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


class Kinds:
    """A method of each kind; each does what its request says."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.another = ""
        """The target of a server that some requests make it call."""

    async def do(self, request: bytes, context: Any) -> None:
        if request == b"abort":
            await context.abort(grpc.StatusCode.NOT_FOUND, "not here")
        if request == b"raise":
            raise RuntimeError("what nobody outside should read")
        if request == b"set a code":
            context.set_code(grpc.StatusCode.ALREADY_EXISTS)
        if request == b"ask another":
            async with grpc.aio.insecure_channel(self.another) as channel:
                another: Any = channel.unary_unary(f"/{SERVICE}/unary_unary")
                await another(b"refuse")
        if request == b"refuse":
            await refuse(context, {"field": "something better"})
        if request == b"wait":
            self.waiting.set()
            await asyncio.Event().wait()

    async def unary_unary(self, request: bytes, context: Any) -> bytes:
        await self.do(request, context)
        return request

    async def unary_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await self.do(request, context)
        yield request

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        async for request in requests:
            await self.do(request, context)
        return b"done"

    async def stream_stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            await self.do(request, context)
            yield request

    async def written(self, request: bytes, context: Any) -> None:
        """A stream answered by writing, as grpc.aio allows as well."""
        await context.write(b"first")
        await self.do(request, context)


def add_to_server(servicer: Kinds, server: Any) -> None:
    handlers = {kind: getattr(grpc, f"{kind}_rpc_method_handler")(getattr(servicer, kind)) for kind in KINDS}
    handlers["written"] = grpc.unary_stream_rpc_method_handler(servicer.written)
    server.add_registered_method_handlers(SERVICE, handlers)


class Site:
    """A server with telemetry, and a channel to it."""

    def __init__(
        self, channel: grpc.aio.Channel, servicer: Kinds, telemetry: Telemetry, instrumented: Instrumented
    ) -> None:
        self.channel, self.waiting, self.telemetry = channel, servicer.waiting, telemetry
        self.instrumented = instrumented

    def call(self, kind: str, request: bytes, method: str = "", **arguments: Any) -> Any:
        make = getattr(self.channel, kind)(f"/{SERVICE}/{method or kind}")
        return make(iter([request]) if kind.startswith("stream") else request, metadata=(TRACEPARENT,), **arguments)

    def value(self, name: str, kind: str, method: str = "", **labels: str) -> float:
        labels = {"grpc_type": KINDS[kind], "grpc_service": SERVICE, "grpc_method": method or kind, **labels}
        return self.telemetry.metrics.get_sample_value(name, labels) or 0.0

    async def ended(self, kind: str, code: str, method: str = "") -> None:
        """Wait until the server has done with the one call, and see that it was measured as it should be."""
        handled = partial(self.value, "grpc_server_handled_total", kind, method)
        await asyncio.to_thread(eventually, f"it has ended with {code}", partial(handled, grpc_code=code))
        assert self.value("grpc_server_started_total", kind, method) == 1
        assert self.value("grpc_server_in_flight", kind, method) == 0
        assert self.value("grpc_server_handling_seconds_count", kind, method) == 1
        codes = [each.name for each in grpc.StatusCode]
        assert sum(handled(grpc_code=each) for each in codes) == 1


@asynccontextmanager
async def serving() -> AsyncIterator[Site]:
    server, telemetry, servicer = grpc.aio.server(), Telemetry("kinds", "kinds-1", "1.0"), Kinds()
    instrumented = Instrumented(server, telemetry)
    add_to_server(servicer, instrumented)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        servicer.another = f"127.0.0.1:{port}"
        yield Site(channel, servicer, telemetry, instrumented)
    await server.stop(None)


async def answers(call: Any) -> list[bytes]:
    if hasattr(call, "__aiter__"):
        return [answer async for answer in call]
    return [await call]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answers(call)
    return caught.value


def traces(caplog: pytest.LogCaptureFixture, code: str) -> list[str]:
    calls = [record.__dict__.get("call", {}) for record in caplog.records]
    return [call["trace"] for call in calls if call.get("code") == code]


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@EACH_KIND
def test_a_call_that_is_answered(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as site:
            call = site.call(kind, b"a value of no concern to the log")
            assert (await answers(call))[-1] in (b"a value of no concern to the log", b"done")
            assert (INSTANCE, "kinds-1") in [tuple(each) for each in await call.trailing_metadata()]
            await site.ended(kind, "OK")

    asyncio.run(test())
    assert traces(caplog, "OK") == [TRACE]
    assert "no concern" not in caplog.text


@EACH_KIND
def test_a_call_that_is_aborted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as site:
            error = await failure(site.call(kind, b"abort"))
            assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "not here")
            await site.ended(kind, "NOT_FOUND")

    asyncio.run(test())
    assert traces(caplog, "NOT_FOUND") == [TRACE]


@EACH_KIND
def test_a_call_whose_handler_sets_a_code(kind: str) -> None:
    async def test() -> None:
        async with serving() as site:
            assert (await failure(site.call(kind, b"set a code"))).code() == grpc.StatusCode.ALREADY_EXISTS
            await site.ended(kind, "ALREADY_EXISTS")

    asyncio.run(test())


@EACH_KIND
def test_an_exception_is_internal_and_its_text_stays_here(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as site:
            error = await failure(site.call(kind, b"raise"))
            assert error.code() == grpc.StatusCode.INTERNAL
            assert error.details() == f"{SERVICE}/{kind} failed; the log has it under trace {TRACE}"
            assert "nobody outside" not in f"{error.trailing_metadata()} {error.debug_error_string()}"
            await site.ended(kind, "INTERNAL")

    asyncio.run(test())
    assert traces(caplog, "INTERNAL") == [TRACE]
    (logged,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert logged.__dict__["call"] == {"trace": TRACE}
    assert "what nobody outside should read" in caplog.text


@EACH_KIND
def test_a_call_that_its_caller_cancels(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as site:
            call = site.call(kind, b"wait")
            reading = asyncio.ensure_future(answers(call))
            await asyncio.wait_for(site.waiting.wait(), 5)
            assert site.value("grpc_server_in_flight", kind) == 1
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await site.ended(kind, "CANCELLED")

    asyncio.run(test())
    assert traces(caplog, "CANCELLED") == [TRACE]


@EACH_KIND
def test_a_call_that_outlives_its_deadline(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as site:
            error = await failure(site.call(kind, b"wait", timeout=0.3))
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await site.ended(kind, "DEADLINE_EXCEEDED")

    asyncio.run(test())
    assert traces(caplog, "DEADLINE_EXCEEDED") == [TRACE]


@EACH_KIND
def test_the_failure_of_a_call_made_for_another_is_passed_on(kind: str) -> None:
    async def test() -> None:
        async with serving() as site:
            error = await failure(site.call(kind, b"ask another"))
            assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "field: something better")
            status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is asked of it
            assert status
            assert status.details[0].type_url.endswith("BadRequest")
            instances = [value for key, value in error.trailing_metadata() or () if key == INSTANCE]
            assert instances == ["kinds-1"]

    asyncio.run(test())


@EACH_KIND
def test_a_call_that_outlives_the_grace_is_sent_elsewhere(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as site:
            call = site.call(kind, b"wait")
            reading = asyncio.ensure_future(failure(call))
            await asyncio.wait_for(site.waiting.wait(), 5)
            site.instrumented.end()
            error = await reading
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert "others answer the next one" in (error.details() or "")
            await site.ended(kind, "UNAVAILABLE")

    asyncio.run(test())
    assert traces(caplog, "UNAVAILABLE") == [TRACE]


@pytest.mark.parametrize("kind", ["unary_stream", "stream_unary", "stream_stream"])
def test_the_messages_of_streams_are_counted(kind: str) -> None:
    async def test() -> None:
        async with serving() as site:
            make: Any = getattr(site.channel, kind)
            call = make(f"/{SERVICE}/{kind}")(iter([b"1", b"2", b"3"]) if kind.startswith("stream") else b"1")
            count = len(await answers(call))
            await site.ended(kind, "OK")
            assert count == {"unary_stream": 2, "stream_unary": 1, "stream_stream": 3}[kind]
            received, sent = {"unary_stream": (0, 2), "stream_unary": (3, 0), "stream_stream": (3, 3)}[kind]
            assert site.value("grpc_server_msg_received_total", kind) == received
            assert site.value("grpc_server_msg_sent_total", kind) == sent

    asyncio.run(test())


@pytest.mark.parametrize(("request_", "code"), [(b"ok", "OK"), (b"abort", "NOT_FOUND"), (b"raise", "INTERNAL")])
def test_a_stream_answered_by_writing(request_: bytes, code: str) -> None:
    async def test() -> None:
        async with serving() as site:
            call = site.call("unary_stream", request_, "written")
            assert await call.read() == b"first"
            assert (await call.code()).name == code
            await site.ended("unary_stream", code, "written")
            assert site.value("grpc_server_msg_sent_total", "unary_stream", "written") == 1

    asyncio.run(test())


def test_a_call_without_a_trace_begins_one(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as site:
            call: Any = site.channel.unary_unary(f"/{SERVICE}/unary_unary")
            await call(b"ok")
            await site.ended("unary_unary", "OK")

    asyncio.run(test())
    (trace,) = traces(caplog, "OK")
    assert len(trace) == 32
    assert trace != TRACE


def test_a_handler_that_is_not_async_is_refused() -> None:
    async def test() -> None:
        instrumented = Instrumented(grpc.aio.server(), Telemetry("kinds", "kinds-1", ""))
        handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
        with pytest.raises(TypeError, match=r"test\.v1\.Kinds/Add must be `async def`"):
            instrumented.add_registered_method_handlers(SERVICE, {"Add": handler})

    asyncio.run(test())

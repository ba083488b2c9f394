"""What happens around the handler of a gRPC call: its context, its measuring, and how it ends.

Each method's handler is wrapped once, when it is added to the server. A grpc.aio interceptor would be asked again for
every call, and on a call as cheap as an addition that costs several times what the measuring itself does.
"""

import asyncio
import inspect
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import grpc
import grpc.aio

from rollcall import context as contexts
from rollcall.telemetry import Method, Telemetry

log = logging.getLogger(__name__)

INSTANCE = "rollcall-instance"
"""The trailing metadata that tells a caller which instance has answered."""

NEWS = 0.001
"""Seconds from the end of a caller's stream until its handler may take it to be whole.

When a caller cancels or is gone, grpc.aio first ends its stream, as if there were no more to come, and a moment later
cancels the handler. Without the wait the handler would always take half a stream for a whole one.
"""

_DETAILS = "grpc-status-details-bin"
_KINDS = {
    "unary_unary": "unary",
    "unary_stream": "server_stream",
    "stream_unary": "client_stream",
    "stream_stream": "bidi_stream",
}
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
Behaviour = Callable[[Any, Any], Any]


class _Ending(NamedTuple):
    """How a call ends whose handler has raised an exception."""

    code: grpc.StatusCode
    details: str | None
    """What the caller is told; None when the call is over already, and there is nobody to be told."""
    trailer: tuple[tuple[str, str | bytes], ...] = ()


class Instrumented:
    """A grpc.aio server as generated `add_..._to_server` functions see it: every handler added is wrapped."""

    def __init__(self, server: grpc.aio.Server, telemetry: Telemetry) -> None:
        self.services: list[str] = []
        self.called = -math.inf
        """When the last call has come, by `time.monotonic`."""
        self._server, self._telemetry = server, telemetry
        self._running: set[asyncio.Task[Any]] = set()
        self._overdue: set[asyncio.Task[Any]] = set()

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Take what older generated code adds; newer code adds the same handlers a second time, by the method below."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Add a service's handlers to the server."""
        wrapped = {f"/{service}/{name}": self._wrap(service, name, each) for name, each in handlers.items()}
        self.services.append(service)
        self._server.add_generic_rpc_handlers((_Handlers(wrapped),))

    def end(self) -> None:
        """End the calls that still run, and send their callers to other instances."""
        self._overdue = self._running.copy()
        for task in self._overdue:
            task.cancel()

    def _wrap(self, service: str, name: str, handler: Any) -> Any:
        """Return a handler with its behaviour wrapped."""
        asks, answers = handler.request_streaming, handler.response_streaming
        attribute = f"{'stream' if asks else 'unary'}_{'stream' if answers else 'unary'}"
        behave = getattr(handler, attribute)
        if not (inspect.iscoroutinefunction(behave) or inspect.isasyncgenfunction(behave)):
            raise TypeError(f"the handler of {service}/{name} must be `async def`; found {behave!r}")
        method = self._telemetry.grpc(_KINDS[attribute], service, name)
        if asks or answers:
            behave = _streams(behave, method, asks=asks)
        make = getattr(grpc, f"{attribute}_rpc_method_handler")
        return make(self._measured(method, behave), handler.request_deserializer, handler.response_serializer)

    def _measured(self, method: Method, behave: Behaviour) -> Behaviour:
        trailer = ((INSTANCE, self._telemetry.instance),)
        running = self._running

        async def handle(request: Any, context: Any) -> Any:
            begun = self.called = method.begin()
            call = contexts.current.get() or contexts.incoming(None, None)
            left = context.time_remaining()
            if left is not None:
                call.expires = begun + left
            context.set_trailing_metadata(trailer)
            task: Any = asyncio.current_task()
            running.add(task)
            ending: _Ending | None = None
            try:
                return await behave(request, context)
            except grpc.aio.AbortError:
                raise
            except BaseException as error:
                ending = self._ending(error, method, call, context)
                if ending.details is None:
                    raise
            finally:
                running.discard(task)
                method.end(begun, ending.code.name if ending else _name(context.code()), call.trace_id)
            return await context.abort(ending.code, ending.details, (*trailer, *ending.trailer))

        return handle

    def _ending(self, error: BaseException, method: Method, call: contexts.CallContext, context: Any) -> _Ending:
        """Return what a handler's exception means to its caller."""
        if isinstance(error, asyncio.CancelledError):
            if asyncio.current_task() in self._overdue:
                gone = f"{self._telemetry.instance} is going and could not finish this call; others answer the next one"
                return _Ending(grpc.StatusCode.UNAVAILABLE, gone)
            left = context.time_remaining()
            expired = left is not None and left <= 0
            return _Ending(grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED, None)
        if isinstance(error, grpc.aio.AioRpcError | grpc.Call):
            # A call made for this one has failed, and its handler knows nothing better than to pass that on.
            details = error.trailing_metadata() or ()
            return _Ending(error.code(), error.details() or "", tuple(pair for pair in details if pair[0] == _DETAILS))
        log.error("%s failed", method.path, exc_info=error, extra={"call": {"trace": call.trace_id}})
        return _Ending(grpc.StatusCode.INTERNAL, f"{method.path} failed; the log has it under trace {call.trace_id}")


class _Handlers(grpc.GenericRpcHandler):
    """Finds a call's handler by its path, and sets the context that it will run in.

    Not added as registered methods, which grpc.aio would find by itself: here it hands over the metadata that it has
    converted already, and a handler that asked for them would pay for that a second time.
    """

    def __init__(self, handlers: dict[str, Any]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = self._handlers.get(handler_call_details.method)
        if handler:
            traceparent = None
            for key, value in handler_call_details.invocation_metadata or ():
                if key == contexts.TRACEPARENT:
                    traceparent = value
            contexts.current.set(contexts.incoming(traceparent, expires=None))
        return handler


class _Counted:
    """The context of a stream, as its handler sees it: counts what is read and written through it."""

    __slots__ = ("_context", "_method")

    def __init__(self, context: Any, method: Method) -> None:
        self._context, self._method = context, method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        await self._context.write(message)
        self._method.sent += 1

    async def read(self) -> Any:
        message = await self._context.read()
        if message is grpc.aio.EOF:
            await _news()
        else:
            self._method.received += 1
        return message


def _streams(behave: Behaviour, method: Method, *, asks: bool) -> Behaviour:
    """Return the behaviour of a stream as one that counts its messages.

    What a generator yields is written from here, in the handler's own task: grpc.aio would do that outside of it, and
    a generator that is held back by a slow reader would not hear that its call is over.
    """
    generator = inspect.isasyncgenfunction(behave)

    async def counted(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            method.received += 1
            yield request
        await _news()

    async def handle(request: Any, context: Any) -> Any:
        asked = counted(request) if asks else request
        if not generator:
            return await behave(asked, _Counted(context, method))
        async with aclosing(behave(asked, _Counted(context, method))) as answers:
            async for answer in answers:
                await context.write(answer)
                method.sent += 1
        return None

    return handle


async def _news() -> None:
    """Let the news come in that a caller has cancelled, in which case this does not return."""
    await asyncio.sleep(NEWS)
    await asyncio.sleep(0)  # a loop that was held up wakes its sleepers before it looks for news


def _name(status: grpc.StatusCode | int | None) -> str:
    """Return the name of a status as a handler has set it: not at all, or as a number, or properly."""
    if status is None:
        return "OK"
    return status.name if isinstance(status, grpc.StatusCode) else _CODES[status]

"""What is measured and logged of each call that a server handles, and the context it is handled in.

Each method's handler is wrapped once, when it is added to the server. A grpc.aio interceptor would be asked again for
every call, and on a call as cheap as an addition that costs several times what the measuring itself does.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from rollcall import context as contexts

log = logging.getLogger(__name__)

INSTANCE = "rollcall-instance"
"""The trailing metadata that tells a caller which instance has answered."""

_LABELS = ("grpc_type", "grpc_service", "grpc_method")
_CODES = {code.value[0]: code for code in grpc.StatusCode}
Behaviour = Callable[[Any, Any], Any]


class Telemetry:
    """The metrics of one instance. Those of calls are named as the gRPC ecosystem's dashboards expect them."""

    def __init__(self, service: str, instance: str, version: str) -> None:
        self.instance = instance
        self.metrics = CollectorRegistry()
        ProcessCollector(registry=self.metrics)
        PlatformCollector(registry=self.metrics)
        GCCollector(registry=self.metrics)
        self.started = Counter("grpc_server_started", "Calls begun.", _LABELS, registry=self.metrics)
        self.handled = Counter(
            "grpc_server_handled", "Calls ended, by their status.", (*_LABELS, "grpc_code"), registry=self.metrics
        )
        self.latency = Histogram(
            "grpc_server_handling_seconds", "Seconds from a call's begin to its end.", _LABELS, registry=self.metrics
        )
        self.in_flight = Gauge("grpc_server_in_flight", "Calls begun and not ended.", _LABELS, registry=self.metrics)
        self.registered = Gauge("rollcall_registered", "1 while the registration stands.", registry=self.metrics)
        Info("rollcall_build", "What is running.", registry=self.metrics).info(
            {"service": service, "instance": instance, "version": version}
        )

    def instrument(self, server: grpc.aio.Server) -> "Instrumented":
        """Return the server as generated `add_..._to_server` functions see it: every handler added is measured."""
        return Instrumented(server, self)


class Instrumented:
    """A grpc.aio server to which handlers are added wrapped."""

    def __init__(self, server: grpc.aio.Server, telemetry: Telemetry) -> None:
        self._server, self._telemetry = server, telemetry
        self.services: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Take what older generated code adds; newer code adds the same handlers a second time, by the method below."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Add a service's handlers to the server."""
        wrapped = {name: _wrap(self._telemetry, service, name, handler) for name, handler in handlers.items()}
        self.services.append(service)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))
        self._server.add_registered_method_handlers(service, wrapped)


class _Method:
    """What is kept at hand to measure one method's calls."""

    def __init__(self, telemetry: Telemetry, kind: str, service: str, name: str) -> None:
        self.path = f"{service}/{name}"
        self._labels = (kind, service, name)
        self._started = telemetry.started.labels(*self._labels)
        self._in_flight = telemetry.in_flight.labels(*self._labels)
        self._latency = telemetry.latency.labels(*self._labels)
        self._handled = {
            code: telemetry.handled.labels(*self._labels, code.name) for code in grpc.StatusCode
        }
        self._trailer = ((INSTANCE, telemetry.instance),)
        self._instance = telemetry.instance

    def begin(self, context: Any) -> tuple[float, contexts.CallContext]:
        begun = time.perf_counter()
        self._started.inc()
        self._in_flight.inc()
        traceparent = None
        for key, value in context.invocation_metadata() or ():
            if key == contexts.TRACEPARENT:
                traceparent = value
        call = contexts.incoming(traceparent, context.time_remaining())
        contexts.current.set(call)
        context.set_trailing_metadata(self._trailer)
        return begun, call

    def end(self, begun: float, call: contexts.CallContext, context: Any, code: grpc.StatusCode | None = None) -> None:
        seconds = time.perf_counter() - begun
        if code is None:
            code = _CODES.get(context.code() or 0) or context.code()
        self._in_flight.dec()
        self._latency.observe(seconds)
        self._handled[code].inc()
        if log.isEnabledFor(logging.INFO):
            log.info(
                self.path,
                extra={"call": {"code": code.name, "ms": round(seconds * 1000, 2), "trace": call.trace_id}},
            )

    def failed(self, error: BaseException, call: contexts.CallContext, context: Any) -> grpc.StatusCode | None:
        """Return the status that a handler's exception stands for; None if the context has it."""
        if isinstance(error, grpc.aio.AbortError):
            return None
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            left = context.time_remaining()
            expired = left is not None and left <= 0
            return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
        log.error("%s failed", self.path, exc_info=error, extra={"call": {"trace": call.trace_id}})
        return grpc.StatusCode.INTERNAL


def _wrap(telemetry: Telemetry, service: str, name: str, handler: Any) -> Any:
    """Return the handler with its behaviour measured."""
    asks, answers = ("stream" if flag else "unary" for flag in (handler.request_streaming, handler.response_streaming))
    attribute = f"{asks}_{answers}"
    behaviour = getattr(handler, attribute)
    if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
        raise TypeError(f"the handler of {service}/{name} must be `async def`; found {behaviour!r}")
    kinds = {"unary_unary": "unary", "unary_stream": "server_stream", "stream_unary": "client_stream"}
    method = _Method(telemetry, kinds.get(attribute, "bidi_stream"), service, name)
    measured = _generator if inspect.isasyncgenfunction(behaviour) else _coroutine
    make = getattr(grpc, f"{attribute}_rpc_method_handler")
    return make(measured(method, behaviour), handler.request_deserializer, handler.response_serializer)


def _coroutine(method: _Method, behaviour: Behaviour) -> Callable[[Any, Any], Awaitable[Any]]:
    async def handle(request: Any, context: Any) -> Any:
        begun, call = method.begin(context)
        code = None
        try:
            return await behaviour(request, context)
        except BaseException as error:
            code = method.failed(error, call, context)
            if code is not grpc.StatusCode.INTERNAL:
                raise
        finally:
            method.end(begun, call, context, code)
        return await _abort_internal(method, call, context)

    return handle


def _generator(method: _Method, behaviour: Behaviour) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        begun, call = method.begin(context)
        code = None
        try:
            async with aclosing(behaviour(request, context)) as answers:
                async for answer in answers:
                    yield answer
        except BaseException as error:
            code = method.failed(error, call, context)
            if code is not grpc.StatusCode.INTERNAL:
                raise
        finally:
            method.end(begun, call, context, code)
        if code:
            await _abort_internal(method, call, context)

    return handle


async def _abort_internal(method: _Method, call: contexts.CallContext, context: Any) -> None:
    """End a call whose handler has failed. What went wrong is in this instance's log, not in the answer."""
    await context.abort(grpc.StatusCode.INTERNAL, f"{method.path} failed; the log has it under trace {call.trace_id}")

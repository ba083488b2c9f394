"""What is measured and logged of each call that a server handles, and the context it is handled in.

Each method's handler is wrapped once, when it is added to the server. A grpc.aio interceptor would be asked again for
every call, and on a call as cheap as an addition that costs several times what the measuring itself does.

A call adds to plain numbers, which become metrics when somebody asks for them: every handler runs on the event loop's
thread, so the locks inside prometheus_client's own counters would guard nothing. `make bench` measures the price.
"""

import asyncio
import inspect
import logging
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from itertools import accumulate
from typing import Any

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry, Gauge, Histogram, Info
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from rollcall import context as contexts
from rollcall import logs

log = logging.getLogger(__name__)

INSTANCE = "rollcall-instance"
"""The trailing metadata that tells a caller which instance has answered."""

_LABELS = ("grpc_type", "grpc_service", "grpc_method")
_BOUNDS = Histogram.DEFAULT_BUCKETS  # seconds, the last one infinite
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
Behaviour = Callable[[Any, Any], Any]


class Telemetry:
    """The metrics of one instance. Those of calls are named as the gRPC ecosystem's dashboards expect them."""

    def __init__(self, service: str, instance: str, version: str) -> None:
        self.instance = instance
        self.metrics = CollectorRegistry()
        ProcessCollector(registry=self.metrics)
        PlatformCollector(registry=self.metrics)
        GCCollector(registry=self.metrics)
        self.calls = Calls(self.metrics)
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
        wrapped = {f"/{service}/{name}": _wrap(self._telemetry, service, name, each) for name, each in handlers.items()}
        self.services.append(service)
        self._server.add_generic_rpc_handlers((_Handlers(wrapped),))


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


class Calls(Collector):
    """Turns what the methods have counted into metrics, each time it is asked."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.methods: list[_Method] = []
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        started = CounterMetricFamily("grpc_server_started", "Calls begun.", labels=_LABELS)
        handled = CounterMetricFamily(
            "grpc_server_handled", "Calls ended, by their status.", labels=(*_LABELS, "grpc_code")
        )
        latency = HistogramMetricFamily(
            "grpc_server_handling_seconds", "Seconds from a call's begin to its end.", labels=_LABELS
        )
        in_flight = GaugeMetricFamily("grpc_server_in_flight", "Calls begun and not ended.", labels=_LABELS)
        for method in self.methods:
            # Asked on another thread than calls are handled on: what ends is read before what begins, so that no call
            # is seen to have ended that was not seen to begin.
            ended = method.handled.copy()
            begun = method.started
            started.add_metric(method.labels, begun)
            in_flight.add_metric(method.labels, begun - sum(ended.values()))
            for code, count in ended.items():
                handled.add_metric((*method.labels, code), count)
            counts = zip(map(floatToGoString, _BOUNDS), accumulate(method.buckets), strict=True)
            latency.add_metric(method.labels, list(counts), method.seconds)
        yield from (started, handled, latency, in_flight)


class _Method:
    """One method's counts, and what is kept at hand to measure its calls."""

    def __init__(self, instance: str, kind: str, service: str, name: str) -> None:
        self.path = f"{service}/{name}"
        self.labels = (kind, service, name)
        self.started = 0
        self.handled = dict.fromkeys((code.name for code in grpc.StatusCode), 0)
        self.buckets = [0] * len(_BOUNDS)
        self.seconds = 0.0
        self._trailer = ((INSTANCE, instance),)

    def begin(self, context: Any) -> tuple[float, contexts.CallContext]:
        """Count a call in, and complete the context that its handler runs in."""
        self.started += 1
        begun = time.monotonic()
        call = contexts.current.get() or contexts.incoming(None, None)
        left = context.time_remaining()
        if left is not None:
            call.expires = begun + left
        context.set_trailing_metadata(self._trailer)
        return begun, call

    def end(self, begun: float, call: contexts.CallContext, context: Any, code: grpc.StatusCode | None = None) -> None:
        """Count a call out and log it; its status is the one given, else the one that the handler has set."""
        seconds = time.monotonic() - begun
        status = code or context.code()  # as the handler has set it: a StatusCode, its number, or nothing
        name = "OK" if status is None else _name(status)
        self.handled[name] += 1
        self.buckets[bisect_left(_BOUNDS, seconds)] += 1
        self.seconds += seconds
        logs.call(self.path, name, seconds, call.trace_id)

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


def _name(status: grpc.StatusCode | int) -> str:
    return status.name if isinstance(status, grpc.StatusCode) else _CODES[status]


def _wrap(telemetry: Telemetry, service: str, name: str, handler: Any) -> Any:
    """Return the handler with its behaviour measured."""
    asks, answers = ("stream" if flag else "unary" for flag in (handler.request_streaming, handler.response_streaming))
    attribute = f"{asks}_{answers}"
    behaviour = getattr(handler, attribute)
    if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
        raise TypeError(f"the handler of {service}/{name} must be `async def`; found {behaviour!r}")
    kinds = {"unary_unary": "unary", "unary_stream": "server_stream", "stream_unary": "client_stream"}
    method = _Method(telemetry.instance, kinds.get(attribute, "bidi_stream"), service, name)
    telemetry.calls.methods.append(method)
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

"""What is measured and logged of each call that a server handles.

A call adds to plain numbers, which become metrics when somebody asks for them: every handler runs on the event loop's
thread, so the locks inside prometheus_client's own counters would guard nothing. `make bench` measures the price.
"""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate

import grpc
from prometheus_client import CollectorRegistry, Gauge, Histogram, Info
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from rollcall import logs

JSONRPC_CODES = ("OK", "ERROR", "INTERNAL", "CANCELLED")
"""How a JSON-RPC call can end: answered, refused, failed in its handler, or given up on the way."""

_BOUNDS = Histogram.DEFAULT_BUCKETS  # seconds, the last one infinite


class Telemetry:
    """The metrics of one instance. Those of calls are named as the gRPC ecosystem's dashboards expect them."""

    def __init__(self, service: str, instance: str, version: str) -> None:
        self.instance = instance
        self.metrics = CollectorRegistry()
        ProcessCollector(registry=self.metrics)
        PlatformCollector(registry=self.metrics)
        GCCollector(registry=self.metrics)
        self._grpc = _Calls("grpc", ("type", "service", "method"), self.metrics)
        self._jsonrpc = _Calls("jsonrpc", ("service", "method"), self.metrics)
        self._http = _Calls("http", ("method", "route"), self.metrics)
        self.registered = Gauge("rollcall_registered", "1 while the registration stands.", registry=self.metrics)
        self.refused = Gauge(
            "rollcall_setting_refused",
            "1 while the registry has a value for a setting that cannot be, and the last good one stays.",
            ("setting",),
            registry=self.metrics,
        )
        Info("rollcall_build", "What is running.", registry=self.metrics).info(
            {"service": service, "instance": instance, "version": version}
        )

    def grpc(self, kind: str, service: str, name: str) -> "Method":
        """Return what counts the calls of a gRPC method: of a kind (`unary`, `server_stream`, ...), of a service."""
        return self._grpc.method(f"{service}/{name}", (kind, service, name), (code.name for code in grpc.StatusCode))

    def jsonrpc(self, service: str, name: str) -> "Method":
        """Return what counts the calls of a JSON-RPC method."""
        return self._jsonrpc.method(f"{service}.{name}", (service, name), JSONRPC_CODES)

    def http(self, verb: str, route: str) -> "Method":
        """Return what counts the requests of a route, given as its template: /students/{id}, not /students/7.

        Their codes are HTTP statuses, of which those appear that have come: 499 for a client that has gone; for a
        WebSocket 101, or the code that it was closed with when that tells of a problem.
        """
        # Log lines as JSON have it as it is.
        path = "".join(each if each.isprintable() and each not in '"\\' else "_" for each in f"{verb} {route}")
        return self._http.method(path, (verb, route), ())


class Method:
    """One method's counts. For the event loop's thread only."""

    def __init__(self, path: str, labels: tuple[str, ...], codes: Iterable[str]) -> None:
        self.path, self.labels = path, labels
        self.started = 0
        self.handled = defaultdict(int, dict.fromkeys(codes, 0))
        self.sent = 0
        """Messages of streams sent."""
        self.received = 0
        """Messages of streams received."""
        self.buckets = [0] * len(_BOUNDS)
        self.seconds = 0.0

    def begin(self) -> float:
        """Count a call in; return when that was, for `end`."""
        self.started += 1
        return time.monotonic()

    def end(self, begun: float, code: str, trace_id: str) -> None:
        """Count a call out under the code that it has ended with, and log it."""
        seconds = time.monotonic() - begun
        self.handled[code] += 1
        self.buckets[bisect_left(_BOUNDS, seconds)] += 1
        self.seconds += seconds
        logs.call(self.path, code, seconds, trace_id)


class _Calls(Collector):
    """Turns what the methods of one protocol have counted into metrics, each time it is asked."""

    def __init__(self, protocol: str, labels: tuple[str, ...], registry: CollectorRegistry) -> None:
        self._protocol = protocol
        self._labels = tuple(f"{protocol}_{label}" for label in labels)
        self._methods: list[Method] = []
        registry.register(self)

    def method(self, path: str, labels: tuple[str, ...], codes: Iterable[str]) -> Method:
        """Return one more method, to be counted from now on."""
        method = Method(path, labels, codes)
        self._methods.append(method)
        return method

    def collect(self) -> Iterator[Metric]:
        prefix, labels = f"{self._protocol}_server", self._labels
        started = CounterMetricFamily(f"{prefix}_started", "Calls begun.", labels=labels)
        handled = CounterMetricFamily(
            f"{prefix}_handled", "Calls ended, by their status.", labels=(*labels, f"{self._protocol}_code")
        )
        latency = HistogramMetricFamily(
            f"{prefix}_handling_seconds", "Seconds from a call's begin to its end.", labels=labels
        )
        in_flight = GaugeMetricFamily(f"{prefix}_in_flight", "Calls begun and not ended.", labels=labels)
        sent = CounterMetricFamily(f"{prefix}_msg_sent", "Messages of streams sent.", labels=labels)
        received = CounterMetricFamily(f"{prefix}_msg_received", "Messages of streams received.", labels=labels)
        for method in self._methods:
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
            sent.add_metric(method.labels, method.sent)
            received.add_metric(method.labels, method.received)
        if self._methods:
            yield from (started, handled, latency, in_flight, sent, received)

"""What runs now, as the page is told: from a registry, and from instances that tell their metrics, or will not."""

import asyncio
import socketserver
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import rollcall
from rollcall.probes import Probes
from rollcall.registry import Instance, TtlCheck
from rollcall.telemetry import Telemetry
from services.gateway import live
from services.gateway.live import Figures, Live, Sample, parse, quantile
from tests.waiting import eventually

Snapshot = dict[str, Any]

SECONDS = 10.0
INF = float("inf")


def registered(registry: rollcall.MemoryRegistry, id_: str, **more: Any) -> Instance:
    """Register an instance, `sum-1` say, of the service that its id names."""
    instance = Instance(id=id_, name=id_.partition("-")[0], address="127.0.0.1", port=1000, **more)
    registry.register(instance, TtlCheck())
    return instance


def watched(registry: rollcall.MemoryRegistry, look: "Callable[[Viewer], Any]", **more: Any) -> None:
    """Have somebody look at what runs in a registry."""

    async def run() -> None:
        async with Viewer.of(Live(registry, **more)) as viewer:
            await look(viewer)

    asyncio.run(run())


class Viewer:
    """Somebody who looks."""

    def __init__(self, snapshots: AsyncIterator[Snapshot]) -> None:
        self.snapshots = snapshots

    @classmethod
    @asynccontextmanager
    async def of(cls, live: Live) -> "AsyncIterator[Viewer]":
        async with aclosing(live.snapshots()) as snapshots:
            yield cls(snapshots)

    async def next(self) -> Snapshot:
        return await asyncio.wait_for(anext(self.snapshots), SECONDS)

    async def until(self, fits: Callable[[Snapshot], Any]) -> Snapshot:
        async with asyncio.timeout(SECONDS):
            while not fits(snapshot := await anext(self.snapshots)):
                pass
        return snapshot

    async def until_instance(self, id_: str, fits: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        snapshot = await self.until(lambda snapshot: (found := instance(snapshot, id_)) and fits(found))
        return instance(snapshot, id_)


def services(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    return {service["name"]: service for service in snapshot["services"]}


def instance(snapshot: Snapshot, id_: str) -> dict[str, Any]:
    found = [each for service in snapshot["services"] for each in service["instances"] if each["id"] == id_]
    return found[0] if found else {}


def test_tells_of_all_services() -> None:
    registry = rollcall.MemoryRegistry()
    registered(registry, "gateway-1", meta={"protocol": "http"})
    registered(registry, "sum-1", tags=("public",), meta={"protocol": "grpc"}, version="1.2")
    registered(registry, "sum-2", tags=("public",), passing=False)
    registered(registry, "student-1", tags=("public",), meta={"protocol": "grpc", "calls": "sum"})
    registered(registry, "abacus")

    async def look(viewer: Viewer) -> None:
        told = await viewer.next()
        assert told["consul"] == "http://consul.example/ui"
        found = services(told)
        assert list(found) == ["abacus", "gateway", "student", "sum"]
        assert {name: service["public"] for name, service in found.items()} == {
            "abacus": False,
            "gateway": False,
            "student": True,
            "sum": True,
        }
        assert {name: service["calls"] for name, service in found.items()} == {
            "abacus": [],
            "gateway": ["student", "sum"],
            "student": ["sum"],
            "sum": [],
        }
        assert [found[name]["protocol"] for name in found] == ["", "http", "grpc", "grpc"]
        unknown = dict.fromkeys(("rate", "errors", "p50", "p95", "in_flight"))
        assert found["sum"]["instances"] == [
            {"id": "sum-1", "address": "127.0.0.1:1000", "passing": True, "version": "1.2", **unknown},
            {"id": "sum-2", "address": "127.0.0.1:1000", "passing": False, "version": "", **unknown},
        ]

    watched(registry, look, consul="http://consul.example/ui")


def test_tells_of_each_change() -> None:
    registry = rollcall.MemoryRegistry()

    async def look(viewer: Viewer) -> None:
        assert (await viewer.next())["services"] == []
        one = registered(registry, "sum-1")
        await viewer.until_instance("sum-1", lambda found: found["passing"])
        registered(registry, "hello-1")
        await viewer.until_instance("hello-1", lambda found: found["passing"])
        registry.register(replace(one, passing=False), TtlCheck())
        await viewer.until_instance("sum-1", lambda found: not found["passing"])
        registry.deregister("sum-1")
        await viewer.until(lambda snapshot: list(services(snapshot)) == ["hello"])
        registered(registry, "sum-1")
        await viewer.until_instance("sum-1", lambda found: found["passing"])

    watched(registry, look)


def test_says_the_same_again_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BEAT", 0.2)
    registry = rollcall.MemoryRegistry()
    registered(registry, "sum-1")

    async def look(viewer: Viewer) -> None:
        assert await viewer.next() == await viewer.next() == await viewer.next()

    watched(registry, look)


def test_tells_how_instances_are_doing() -> None:
    registry = rollcall.MemoryRegistry()
    telemetry = Telemetry("sum", "sum-1", "")
    method = telemetry.grpc("unary", "sum.v1.SumService", "Add")

    async def look(viewer: Viewer) -> None:
        loop = asyncio.get_running_loop()
        probes = Probes(("127.0.0.1", 0), telemetry.metrics, lambda: True, dict, loop)
        registered(registry, "sum-1", meta={"http_port": str(probes.port)})
        quiet = await viewer.until_instance("sum-1", lambda found: found["rate"] is not None)
        assert quiet | {"rate": 0, "errors": 0, "in_flight": 0, "p50": None, "p95": None} == quiet
        method.begin()
        for _ in range(18):
            method.end(method.begin(), "OK", "")
        method.end(method.begin(), "INTERNAL", "")
        method.end(method.begin(), "CANCELLED", "")
        busy = await viewer.until_instance("sum-1", lambda found: found["rate"])
        assert busy["rate"] == pytest.approx(20, rel=0.6)
        assert busy["errors"] == pytest.approx(1, rel=0.6)
        assert busy["in_flight"] == 1
        assert 0 < busy["p50"] < busy["p95"] <= 0.005
        await asyncio.to_thread(probes.close)
        await viewer.until_instance("sum-1", lambda found: found["rate"] is None)

    watched(registry, look)


class Metrics:
    """An instance that tells its metrics, or does something else."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.asked: list[float] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805
                self.asked.append(time.monotonic())
                try:
                    answer(handler)
                except OSError:  # it had enough
                    handler.close_connection = True

            def log_message(self, *_: object) -> None:
                """Stay quiet."""

        self._server: socketserver.BaseServer = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.meta = {"http_port": str(self._server.server_address[1])}
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def telling(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[Metrics]:
    metrics = Metrics(answer)
    try:
        yield metrics
    finally:
        metrics.close()


def well(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'grpc_server_handled_total{grpc_code="OK"} 1\n')


def without_end(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"# much\n" * 10_000)


def broken(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'grpc_server_handled_total{grpc_code="OK"} many\n\xff\xfe')


def away(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", f"http://127.0.0.1:{handler.headers['Host'].rpartition(':')[2]}/elsewhere")
    handler.end_headers()


@pytest.mark.parametrize("answer", [without_end, broken, away, lambda _: time.sleep(2)])
def test_an_instance_that_does_not_tell_harms_none_that_does(answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
    registry = rollcall.MemoryRegistry()
    with telling(answer) as other, telling(well) as one:
        registered(registry, "sum-1", meta=other.meta)
        registered(registry, "sum-2", meta=one.meta)
        registered(registry, "sum-3", meta={"http_port": "@example.com/"})

        async def look(viewer: Viewer) -> None:
            snapshot = await viewer.until(lambda found: instance(found, "sum-2")["rate"] is not None)
            assert instance(snapshot, "sum-1")["rate"] is None
            assert instance(snapshot, "sum-3")["rate"] is None

        watched(registry, look)
        assert len(other.asked) >= 1


def following() -> bool:
    return any(thread.name == "follow" for thread in threading.enumerate())


def test_is_asked_once_for_all_who_look_and_not_at_all_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LINGER", 0.1)
    registry = rollcall.MemoryRegistry()
    with telling(well) as metrics:
        registered(registry, "sum-1", meta=metrics.meta)

        async def run() -> None:
            shown = Live(registry)
            async with Viewer.of(shown) as one, Viewer.of(shown) as other:
                await one.until_instance("sum-1", lambda found: found["rate"] is not None)
                await other.until_instance("sum-1", lambda found: found["rate"] is not None)
            assert len(metrics.asked) <= 3
            await asyncio.to_thread(eventually, "nothing is followed", lambda: not following())
            asked = len(metrics.asked)
            await asyncio.sleep(live.PERIOD * 1.5)  # in which it would be asked again
            assert len(metrics.asked) == asked
            async with Viewer.of(shown) as again:
                await again.until_instance("sum-1", lambda found: found["rate"] is not None)

        asyncio.run(asyncio.wait_for(run(), 3 * SECONDS))


def test_whoever_comes_back_soon_finds_what_was_known() -> None:
    registry = rollcall.MemoryRegistry()
    with telling(well) as metrics:
        registered(registry, "sum-1", meta=metrics.meta)

        async def run() -> None:
            shown = Live(registry)
            async with Viewer.of(shown) as viewer:
                await viewer.until_instance("sum-1", lambda found: found["rate"] is not None)
            async with Viewer.of(shown) as viewer:
                assert instance(await viewer.next(), "sum-1")["rate"] is not None

        asyncio.run(run())


METRICS = r"""
# TYPE grpc_server_handled_total counter
grpc_server_handled_total{grpc_type="unary",grpc_code="OK"} 5.0
grpc_server_handled_total{grpc_type="server_stream",grpc_code="UNAVAILABLE"} 2.0
jsonrpc_server_handled_total{jsonrpc_code="ERROR"} 1.0
http_server_handled_total{http_code="200",http_route="/v1/sum/Add"} 7.0
http_server_handled_total{http_code="499",http_route="/live"} 1.0
http_server_handled_total{http_code="503",http_route="a \" b"} 1.0
grpc_server_in_flight{grpc_type="unary"} 2.0
http_server_handled_total{http_code="4001",http_route="/v1/greeter/BidiStream"} 1.0
http_server_in_flight{http_route="/live"} 1.0
grpc_server_handling_seconds_bucket{grpc_type="unary",le="0.0025"} 0.0
grpc_server_handling_seconds_bucket{grpc_type="unary",le="0.005"} 4.0
grpc_server_handling_seconds_bucket{grpc_type="unary",le="+Inf"} 5.0
grpc_server_handling_seconds_bucket{grpc_type="server_stream",le="+Inf"} 2.0
grpc_server_msg_sent_total{grpc_type="unary"} 0.0
grpc_server_msg_sent_total{grpc_type="server_stream"} 3.0
jsonrpc_server_handling_seconds_bucket{le="0.005"} 1.0
jsonrpc_server_handling_seconds_bucket{le="+Inf"} 1.0
process_cpu_seconds_total{grpc_code="OK"} 3.0
"""


def test_reads_metrics_of_all_protocols() -> None:
    found = parse(METRICS, 1.0)
    assert found == Sample(at=1, calls=18, errors=4, in_flight=3, buckets={0.0025: 0, 0.005: 5, INF: 6})


def test_an_instance_that_has_begun_again_counts_from_nothing() -> None:
    figures = Figures()
    figures.add(Sample(1, calls=10))
    figures.add(Sample(2, calls=30))
    assert figures.told()["rate"] == 20
    figures.add(Sample(3, calls=5))
    assert figures.told()["rate"] is None
    figures.add(Sample(5, calls=9, errors=3))
    assert (figures.told()["rate"], figures.told()["errors"]) == (2, 1.5)


@pytest.mark.parametrize(
    ("buckets", "share", "seconds"),
    [
        ({}, 0.5, None),
        ({1.0: 0, INF: 0}, 0.5, None),
        ({1.0: 10, 2.0: 10, INF: 10}, 0.5, 0.5),
        ({1.0: 0, 2.0: 10, INF: 10}, 0.5, 1.5),
        ({1.0: 5, 2.0: 10, INF: 10}, 0.95, 1.9),
        ({1.0: 5, 2.0: 5, INF: 10}, 0.95, 2.0),
    ],
)
def test_estimates_latencies_from_a_histogram(buckets: dict[float, float], share: float, seconds: float | None) -> None:
    assert quantile(buckets, share) == (seconds if seconds is None else pytest.approx(seconds))

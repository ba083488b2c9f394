"""An HTTP server over real sockets: what requests bring along, how they are measured, how they end and by whom."""

import asyncio
import contextlib
import json
import logging
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from rollcall import BadSettingError, Instance, MemoryRegistry, context, web
from rollcall.telemetry import Telemetry
from rollcall.web import connection
from tests.waiting import free_port

SECONDS = 20
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
SHORT = 0.2  # seconds
PLENTY = 64 * 1024  # bytes of a message, of which a few are more than sockets hold


class App:
    """Does all that an application may do to a server."""

    def __init__(self) -> None:
        self.waiting: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []
        self.sent = 0
        self.asgi = Starlette(
            routes=[
                Route("/echo", self.echo, methods=["GET", "POST"]),
                Route("/context/{way}", self.context),
                Route("/wait/{name}", self.wait),
                Route("/stubborn/{name}", self.stubborn),
                Route("/events", self.events),
                Route("/flood", self.flood),
                Route("/named", self.named),
                WebSocketRoute("/socket", self.socket),
                WebSocketRoute("/deaf", self.deaf),
                WebSocketRoute("/pour", self.pour),
                WebSocketRoute("/fail", self.fail_socket),
            ]
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/fail" and scope["type"] == "http":  # Starlette would answer by itself
            raise RuntimeError("what nobody outside should read")
        if scope["path"] == "/fail-late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise RuntimeError("what nobody outside should read")
        await self.asgi(scope, receive, send)

    async def echo(self, request: Request) -> Response:
        return PlainTextResponse(await request.body() or "nothing")

    async def context(self, request: Request) -> Response:
        way: web.Exchange = request.scope["rollcall"]
        call = context.current.get() if request.path_params["way"] == "current" else way.context
        assert call
        return JSONResponse({"trace": call.trace_id, "left": call.remaining(), "id": way.request_id})

    async def named(self, request: Request) -> Response:
        request.scope["rollcall.route"] = 'a "name"'
        return PlainTextResponse("")

    async def wait(self, request: Request) -> Response:
        """Answer when the test says so."""
        name = request.path_params["name"]
        try:
            await self.waiting.setdefault(name, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        return PlainTextResponse(name)

    async def stubborn(self, request: Request) -> Response:
        """Do not heed being cancelled."""
        event = self.waiting.setdefault(request.path_params["name"], asyncio.Event())
        while not event.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await event.wait()
        return PlainTextResponse("at last")

    async def events(self, request: Request) -> Response:
        """Stream until the server ends it, and say so."""

        async def stream() -> AsyncIterator[str]:
            yield "data: first\n\n"
            try:
                await self.waiting.setdefault("events", asyncio.Event()).wait()
            except asyncio.CancelledError:
                self.cancelled.append("events")
                if not request.scope["rollcall"].ending.is_set():
                    raise
                yield "data: last\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def flood(self, _: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            while True:
                yield bytes(PLENTY)
                self.sent += 1

        return StreamingResponse(stream())

    async def socket(self, socket: WebSocket) -> None:
        """Echo; when the server ends it, say so."""
        await socket.accept()
        try:
            async for text in socket.iter_text():
                await socket.send_text(text)
        except asyncio.CancelledError:
            self.cancelled.append("socket")
            if not socket.scope["rollcall"].ending.is_set():
                raise
            await socket.send_text("last")
            await socket.close(1012)

    async def deaf(self, socket: WebSocket) -> None:
        """Never listen."""
        await socket.accept()
        await socket.send_text("ready")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append("deaf")
            raise

    async def pour(self, socket: WebSocket) -> None:
        await socket.accept()
        while True:
            await socket.send_bytes(bytes(PLENTY))
            self.sent += 1

    async def fail_socket(self, socket: WebSocket) -> None:
        if socket.query_params.get("when") == "late":
            await socket.accept()
        raise RuntimeError("what nobody outside should read")


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection; what goes over it is for the test to say."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, path: str, verb: str = "GET", body: Any = b"", **headers: str) -> None:
        lines = [f"{verb} {path} HTTP/1.1", "host: here", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        if body:
            lines.append(f"content-length: {len(body)}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        length = int(headers.get("content-length", 0))
        return Answer(int(head[0].split()[1]), headers, await self.reader.readexactly(length))

    async def get(self, path: str, verb: str = "GET", body: Any = b"", **headers: str) -> Answer:
        self.send(path, verb, body, **headers)
        return await self.answer()

    async def closed(self) -> None:
        """See that the server has closed, after nothing more than was read."""
        with contextlib.suppress(ConnectionResetError):
            assert await self.reader.read() == b""

    def reset(self) -> None:
        """Go without a word."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Site:
    def __init__(self, app: App, server: web.Server, telemetry: Telemetry) -> None:
        self.app, self.server, self.telemetry = app, server, telemetry
        self._open: list[asyncio.StreamWriter] = []

    async def client(self, **options: Any) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port, **options)
        self._open.append(writer)
        return Client(reader, writer)

    def socket(self, path: str, **options: Any) -> connect:
        return connect(f"ws://127.0.0.1:{self.server.port}{path}", compression=None, proxy=None, **options)

    async def waits(self, *names: str) -> None:
        await until(lambda: set(names) <= set(self.app.waiting))

    def value(self, name: str, route: str, verb: str = "GET", **labels: str) -> float:
        labels = {"http_method": verb, "http_route": route, **labels}
        return self.telemetry.metrics.get_sample_value(f"http_server_{name}", labels) or 0.0

    async def counted(self, route: str, code: str, verb: str = "GET") -> None:
        """Wait until the one request of a route has ended with a code, and see that all else is in line."""
        await until(lambda: self.value("handled_total", route, verb, http_code=code) == 1)
        assert self.value("started_total", route, verb) == 1
        assert self.value("in_flight", route, verb) == 0
        assert self.value("handling_seconds_count", route, verb) == 1

    def close(self) -> None:
        for writer in self._open:
            writer.transport.abort()
        for event in self.app.waiting.values():
            event.set()


@asynccontextmanager
async def served(**limits: Any) -> AsyncIterator[Site]:
    app = App()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server, telemetry = web.Server(app, listener, **limits), Telemetry("trial", "trial-1", "1")
        server.equip(telemetry)
        await server.start()
        await server.tell(process=True, services=True)
        site = Site(app, server, telemetry)
        try:
            yield site
        finally:
            site.close()
            await server.stop(0)


async def until(met: Callable[[], Any]) -> None:
    while not met():  # noqa: ASYNC110 (a condition of many parts)
        await asyncio.sleep(0.001)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await scenario()

    uvloop.run(bounded())


def calls(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str]]:
    logged = [(each.getMessage(), each.__dict__["call"]) for each in caplog.records if each.name == "rollcall.calls"]
    return [(message, call["code"], call["trace"]) for message, call in logged]


# What a request brings along.


@pytest.mark.parametrize("way", ["scope", "current"])
def test_trace_id_and_deadline_reach_the_application_and_the_answer(way: str) -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            path = f"/context/{way}"
            answer = await client.get(path, traceparent=TRACEPARENT, x_request_id="mine 1", x_request_timeout="60")
            assert answer.json["trace"] == TRACE
            assert answer.json["id"] == answer.headers["x-request-id"] == "mine 1"
            assert 50 < answer.json["left"] <= 60
            assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-01", answer.headers["traceparent"])
            assert answer.headers["traceparent"] != TRACEPARENT

            bare = await client.get(path)
            assert bare.json["left"] is None
            assert bare.json["trace"] != TRACE
            assert bare.json["trace"] in bare.headers["traceparent"]

    run(test)


@pytest.mark.parametrize("bad", ["", "x" * 129, "a\tb", "\xe9"])
def test_a_request_id_out_of_form_is_replaced(bad: str) -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            ids = [
                (await client.get("/echo", x_request_id=bad, traceparent=TRACEPARENT)).headers["x-request-id"]
                for _ in range(2)
            ]
            assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in ids)
            assert ids[0] != ids[1]

    run(test)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"grpc_timeout": "2M"}, 120),
        ({"grpc_timeout": "90S"}, 90),
        ({"grpc_timeout": "1H"}, 3600),
        ({"grpc_timeout": "99000m"}, 99),
        ({"grpc_timeout": "99000000u"}, 99),
        ({"grpc_timeout": "99999999n"}, 0.1),
        ({"x_request_timeout": "90"}, 90),
        ({"x_request_timeout": "90.5s"}, 90.5),
        ({"x_request_timeout": "90500ms"}, 90.5),
        ({"x_request_timeout": "0"}, 0),
        ({"x_request_timeout": "100", "grpc_timeout": "90S"}, 90),
        ({"x_request_timeout": "90", "grpc_timeout": "100S"}, 90),
    ],
)
def test_the_deadline(headers: dict[str, str], seconds: float) -> None:
    async def test() -> None:
        async with served() as site:
            answer = await (await site.client()).get("/context/current", **headers)
            assert seconds - 5 < answer.json["left"] <= seconds

    run(test)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("grpc-timeout", "5"),
        ("grpc-timeout", "5s"),
        ("grpc-timeout", "-5S"),
        ("grpc-timeout", "1.5S"),
        ("grpc-timeout", "123456789S"),
        ("x-request-timeout", "soon"),
        ("x-request-timeout", "-1"),
        ("x-request-timeout", "1e3"),
        ("x-request-timeout", "nan"),
        ("x-request-timeout", "5m"),
        ("x-request-timeout", ""),
    ],
)
def test_a_deadline_out_of_form_is_refused(header: str, value: str) -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            answer = await client.get("/echo", **{header: value})
            assert (answer.status, answer.headers["content-type"]) == (400, "application/problem+json")
            assert answer.json["title"] == "Bad Request"
            assert answer.json["code"] == "INVALID_ARGUMENT"
            assert f"expected the header {header} to be" in answer.json["detail"]
            assert "x-request-id" in answer.headers
            assert (await client.get("/echo")).status == 200
            with pytest.raises(InvalidStatus) as refused:
                await site.socket("/socket", additional_headers={header: value})
            assert refused.value.response.status_code == 400
            assert json.loads(refused.value.response.body)["detail"] == answer.json["detail"]

    run(test)


# What is measured.


def test_requests_are_counted_by_their_route_and_logged_under_their_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rollcall.calls")

    async def test() -> None:
        async with served() as site:
            client = await site.client()
            for way in "ab":
                await client.get(f"/context/{way}", traceparent=TRACEPARENT)
            await client.get("/echo", "POST", b"hello")
            for verb in ("GET", "PROPFIND"):
                assert (await client.get("/no/such/path", verb)).status == 404
            await client.get("/named")
            await until(lambda: len(calls(caplog)) == 6)
            assert site.value("handled_total", "/context/{way}", http_code="200") == 2
            assert site.value("started_total", "/context/{way}") == 2
            await site.counted("/echo", "200", "POST")
            await site.counted("unmatched", "404")
            await site.counted("unmatched", "404", "other")  # else everyone could add metrics
            await site.counted('a "name"', "200")

    run(test)
    assert calls(caplog)[:2] == [("GET /context/{way}", "200", TRACE)] * 2
    assert calls(caplog)[-1][0] == "GET a _name_"


def test_livez_is_answered_whatever_the_application_does() -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            answer = await client.get("/livez")
            assert (answer.status, answer.body) == (200, b"alive\n")
            client.send("/livez", "HEAD")
            assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            assert (await client.get("/livez", "POST")).status == 404
            await site.counted("unmatched", "404", "POST")

    run(test)


def test_what_is_in_flight_is_seen_and_messages_of_streams_are_counted() -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            client.send("/events")
            assert "content-length" not in (await client.answer()).headers
            await until(lambda: site.value("in_flight", "/events") == 1)
            await site.waits("events")
            site.app.waiting["events"].set()
            await site.counted("/events", "200")
            assert site.value("msg_sent_total", "/events") == 1

            client.send("/wait/x")  # the first of its route; where it belongs is known when it is answered
            await site.waits("x")
            site.app.waiting["x"].set()
            await until(lambda: site.value("started_total", "/wait/{name}") == 1)
            site.app.waiting.pop("x")
            client.send("/wait/x")
            await site.waits("x")
            assert site.value("in_flight", "/wait/{name}") == 1

    run(test)


# Exceptions.


def test_an_exception_is_a_500_that_tells_nothing_but_where_to_look(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            answer = await client.get("/fail", traceparent=TRACEPARENT)
            assert (answer.status, answer.json["code"]) == (500, "INTERNAL")
            assert answer.json["detail"] == f"GET /fail failed; the log has it under trace {TRACE}"
            assert (await client.get("/echo")).status == 200
            await site.counted("unmatched", "500")

    run(test)
    (record,) = [each for each in caplog.records if each.exc_info]
    assert record.__dict__["call"]["trace"] == TRACE


def test_an_exception_amid_an_answer_breaks_it_off() -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            client.send("/fail-late")
            await client.answer()
            with contextlib.suppress(ConnectionResetError):
                assert not (await client.reader.read()).endswith(b"0\r\n\r\n")
            await site.counted("unmatched", "500")

    run(test)


# Draining, and the end.


def test_a_client_that_keeps_its_connection_is_sent_elsewhere_while_it_drains() -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            assert "connection" not in (await client.get("/echo")).headers
            await site.server.tell(process=False, services=False)
            answer = await client.get("/echo")
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            await client.closed()
            assert (await (await site.client()).get("/echo")).status == 200  # it may not have heard of it

    run(test)


def test_what_is_in_flight_is_finished_within_the_grace() -> None:
    async def test() -> None:
        async with served() as site:
            idle, busy = await site.client(), await site.client()
            await idle.get("/echo")
            busy.send("/wait/x")
            await site.waits("x")
            stopping = asyncio.ensure_future(site.server.stop(10))
            await idle.closed()
            with pytest.raises(OSError, match=r"111|refused"):
                await site.client()
            assert not stopping.done()
            site.app.waiting["x"].set()
            answer = await busy.answer()
            assert (answer.body, answer.headers["connection"]) == (b"x", "close")
            await stopping
            assert not site.app.cancelled

    run(test)


def test_a_client_that_has_just_come_is_answered() -> None:
    async def test() -> None:
        async with served() as site:
            client, kept, silent = await site.client(), await site.client(), await site.client()
            await kept.get("/echo")
            kept.send("/echo")
            stopping = asyncio.ensure_future(site.server.stop(10))
            await until(site.server.leaving.is_set)
            client.send("/echo")
            for each in (client, kept):
                answer = await each.answer()
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                await each.closed()
            await silent.closed()
            await stopping

    run(test)


def test_what_outlives_the_grace_has_a_last_word() -> None:
    async def test() -> None:
        async with served() as site, site.socket("/socket") as echo, site.socket("/deaf") as deaf:
            unary, events = await site.client(), await site.client()
            unary.send("/wait/x")
            events.send("/events")
            await events.answer()
            await echo.send("hello")
            assert (await echo.recv(), await deaf.recv()) == ("hello", "ready")
            await site.waits("x", "events")
            begun = time.monotonic()
            await site.server.stop(SHORT)
            assert SHORT <= time.monotonic() - begun < SHORT + 1
            assert sorted(site.app.cancelled) == ["deaf", "events", "socket", "x"]

            assert (await events.reader.read()).endswith(b"data: last\n\n\r\n0\r\n\r\n")
            answer = await unary.answer()
            assert (answer.status, answer.json["code"], answer.headers["retry-after"]) == (503, "UNAVAILABLE", "1")
            assert await echo.recv() == "last"
            for each in (echo, deaf):
                with pytest.raises(ConnectionClosed):
                    await each.recv()
                assert each.close_code == 1012
            await site.counted("/socket", "1012")
            await site.counted("/deaf", "1012")
            await site.counted("/events", "200")

    run(test)


def test_the_end_comes_even_to_those_who_do_not_heed_it() -> None:
    async def test() -> None:
        async with served() as site:
            stubborn, reader = await site.client(), await site.client(limit=1)
            stubborn.send("/stubborn/x")
            reader.send("/flood")
            await site.waits("x")
            await until(lambda: site.app.sent)
            begun = time.monotonic()
            await site.server.stop(0)
            assert time.monotonic() - begun < 3
            await stubborn.closed()

    run(test)


def test_stopped_before_it_has_started() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await web.Server(App(), listener).stop(1)

    run(test)


# Clients that go, or are slow, or too many, or not what they should be.


@pytest.mark.parametrize("politely", [True, False])
def test_a_client_that_has_gone(politely: bool) -> None:  # noqa: FBT001
    async def test() -> None:
        async with served() as site:
            for _ in range(2):  # the server knows the route only once it has answered
                client = await site.client()
                client.send("/wait/x")
                await site.waits("x")
                if politely:
                    client.writer.close()
                else:
                    client.reset()
                await until(lambda: site.app.cancelled == ["x"])
                site.app.cancelled.clear()
                site.app.waiting.clear()
            await until(lambda: site.value("handled_total", "/wait/{name}", http_code="499") == 2)

    run(test)


def test_a_client_that_has_gone_amid_pipelined_requests() -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            client.send("/wait/x")
            client.send("/echo")
            await site.waits("x")
            site.app.waiting["x"].set()
            assert [(await client.answer()).body, (await client.answer()).body] == [b"x", b"nothing"]
            await site.counted("/wait/{name}", "200")

            client.send("/wait/y")
            client.send("/wait/z")
            await site.waits("y")
            site.app.waiting["y"].set()
            assert (await client.answer()).body == b"y"
            await site.waits("z")
            client.reset()
            await until(lambda: site.app.cancelled == ["z"])
            await until(lambda: site.value("handled_total", "/wait/{name}", http_code="499") == 1)

    run(test)


@pytest.mark.parametrize("sent", [b"", b"GET /echo HTTP/1.1\r\nhost: h", b"\r\n"])
def test_headers_that_take_too_long(sent: bytes) -> None:
    async def test() -> None:
        async with served(slow=SHORT) as site:
            client, begun = await site.client(), time.monotonic()
            client.writer.write(sent)
            left = await client.reader.read()
            assert SHORT - 0.01 < time.monotonic() - begun < SHORT + 2
            assert left.startswith(b"HTTP/1.1 408 " if b"GET" in sent else b"")
            assert bool(left) == (b"GET" in sent)

    run(test)


def test_headers_that_come_bit_by_bit_after_an_answer() -> None:
    async def test() -> None:
        async with served(slow=SHORT) as site:
            client = await site.client()
            await client.get("/echo")
            await asyncio.sleep(2 * SHORT)  # being idle is no fault
            client.writer.write(b"GET /echo HTTP/1.1\r\n")
            trickle = asyncio.ensure_future(_trickle(client.writer))
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            trickle.cancel()

    run(test)


async def _trickle(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x: y\r\n")
        await asyncio.sleep(0.01)


def test_an_idle_connection_is_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE", SHORT)

    async def test() -> None:
        async with served(slow=SHORT) as site:
            client = await site.client()
            await client.get("/echo")
            await client.closed()

    run(test)


def test_an_answer_that_is_not_read_is_held_back_and_given_up_in_the_end() -> None:
    async def test() -> None:
        async with served(slow=SHORT) as site:
            client = await site.client(limit=1)
            client.send("/flood")
            await until(lambda: site.app.sent)
            await site.counted("/flood", "499")
            assert site.app.sent * PLENTY < 32 * 1024 * 1024
            await until(lambda: not site.server.peers())

    run(test)


def test_a_small_answer_that_is_not_read_does_not_hold_its_connection_for_ever() -> None:
    async def test() -> None:
        async with served(slow=SHORT) as site:
            client = await site.client(limit=1)
            await site.server.tell(process=False, services=False)
            client.send("/echo", "POST", bytes(50_000))
            await site.counted("/echo", "200", "POST")
            await until(lambda: not site.server.peers())

    run(test)


def test_too_many_connections() -> None:
    async def test() -> None:
        async with served(connections=2) as site, site.socket("/socket"):
            client = await site.client()
            await client.get("/echo")
            one_more = await site.client()
            answer = await one_more.answer()
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            assert "2 connections" in answer.json["detail"]
            await one_more.closed()
            assert (await client.get("/echo")).status == 200
            client.writer.close()
            await until(lambda: len(site.server.peers()) == 1)
            assert (await (await site.client()).get("/echo")).status == 200

    run(test)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET /echo HTTP/1.1\r\nhost: h\r\nx: " + b"y" * 100_000, 431),
        (b"GET /" + b"y" * 100_000, 431),
    ],
)
def test_what_is_no_request(sent: bytes, status: int) -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            await client.get("/echo")
            client.writer.write(sent)
            answer = await client.answer()
            assert (answer.status, answer.json["status"]) == (status, status)
            await client.closed()

    run(test)


def test_trailers_without_end() -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            client.send("/echo", "POST", transfer_encoding="chunked")
            client.writer.write(b"3\r\nabc\r\n0\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    client.writer.write(b"x: " + b"y" * 5000 + b"\r\n")
                    await client.writer.drain()
            await client.closed()

    run(test)


def test_a_large_body_may_come() -> None:
    async def test() -> None:
        async with served() as site:
            body = bytes(1_000_000)
            assert (await (await site.client(limit=2_000_000)).get("/echo", "POST", body)).body == body

    run(test)


@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_an_offer_of_http2_is_declined_and_the_body_kept(verb: str) -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2_settings": "AAMAAABkAAQAoAAA"}
            for _ in range(2):
                assert (await client.get("/echo", verb, b"hello", **offer)).body == b"hello"
            client.send("/echo", verb, transfer_encoding="chunked", **offer)
            client.writer.write(b"3\r\nabc\r\n")
            client.writer.write(b"2\r\nde\r\n0\r\n\r\n")
            assert (await client.answer()).body == b"abcde"

    run(test)


# WebSockets.


async def _closed(socket: ClientConnection) -> int | None:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await socket.recv()
    return socket.close_code


def test_a_websocket(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rollcall.calls")

    async def test() -> None:
        async with served() as site:
            headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
            async with site.socket("/socket", additional_headers=headers) as echo:
                assert echo.response
                assert TRACE in echo.response.headers["traceparent"]
                assert echo.response.headers["x-request-id"] == "mine"
                for number in range(3):
                    await echo.send(str(number))
                    assert await echo.recv() == str(number)
                assert site.value("in_flight", "/socket") == 1
            await site.counted("/socket", "101")
            assert site.value("msg_sent_total", "/socket") == site.value("msg_received_total", "/socket") == 3

    run(test)
    assert calls(caplog) == [("GET /socket", "101", TRACE)]


def test_a_websocket_whose_client_has_gone() -> None:
    async def test() -> None:
        async with served() as site:
            for path in ("/socket", "/deaf"):
                socket = await site.socket(path)
                socket.transport.abort()
                await site.counted(path, "499")
            assert site.app.cancelled == ["deaf"]  # the other has heard of it

    run(test)


def test_a_websocket_that_fails() -> None:
    async def test() -> None:
        async with served() as site:
            with pytest.raises(InvalidStatus) as refused:
                await site.socket("/fail")
            assert refused.value.response.status_code == 500
            await site.counted("/fail", "500")
            assert "outside" not in (refused.value.response.body or b"").decode()
            socket = await site.socket("/fail?when=late")
            assert await _closed(socket) == 1011
            assert site.value("handled_total", "/fail", http_code="1011") == 1

    run(test)


def test_a_message_that_is_too_large() -> None:
    async def test() -> None:
        async with served(message=1000) as site:
            socket = await site.socket("/socket")
            await socket.send("x" * 1001)
            assert await _closed(socket) == 1009

    run(test)


def test_a_websocket_that_is_not_read_is_held_back_and_given_up_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with served(slow=SHORT) as site:
            socket = await site.socket("/pour", max_queue=1)
            await site.counted("/pour", "499")
            assert site.app.sent * PLENTY < 32 * 1024 * 1024
            await until(lambda: not site.server.peers())
            await _closed(socket)

    run(test)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_websocket_to_which_nobody_listens_is_held_back() -> None:
    async def test() -> None:
        async with served() as site, site.socket("/deaf") as socket:
            await socket.recv()
            socket.transport.set_write_buffer_limits(high=0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(flood(socket), 0.5)
            (peer,) = site.server.peers()
            assert peer.queue.qsize() < 10  # type: ignore[attr-defined]
            socket.transport.abort()

    async def flood(socket: ClientConnection) -> None:
        for _ in range(1000):
            await socket.send(bytes(PLENTY))

    run(test)


def test_pings_without_end_of_a_client_that_does_not_read() -> None:
    async def test() -> None:
        async with served(slow=SHORT) as site:
            raw = socket.create_connection(("127.0.0.1", site.server.port))
            key = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
            raw.sendall(
                b"GET /deaf HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: websocket\r\n" + key + b"\r\n"
            )
            raw.setblocking(False)  # noqa: FBT003
            pings = (b"\x89\xfd\x00\x00\x00\x00" + bytes(125)) * 500

            async def flood() -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        await asyncio.get_running_loop().sock_sendall(raw, pings)

            flooding = asyncio.ensure_future(flood())
            await until(site.server.peers)
            largest = 0
            while peers := site.server.peers():
                largest = max(largest, peers[0].transport.get_write_buffer_size())
                await asyncio.sleep(0.001)
            assert largest < 2 * 1024 * 1024
            flooding.cancel()
            await asyncio.wait([flooding])
            raw.close()

    run(test)


@pytest.mark.parametrize(
    ("verb", "headers", "status"),
    [
        ("GET", {}, 400),  # no key
        ("POST", {"sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==", "sec_websocket_version": "13"}, 405),
        ("GET", {f"x-{number}": "y" for number in range(200)}, 431),
        ("GET", {"x": "y" * 10_000}, 431),
    ],
)
def test_a_handshake_that_fails_is_answered(verb: str, headers: dict[str, str], status: int) -> None:
    async def test() -> None:
        async with served() as site:
            client = await site.client()
            answer = await client.get("/socket", verb, connection="upgrade", upgrade="websocket", **headers)
            assert answer.status == status
            await client.closed()
            await until(lambda: not site.server.peers())

    run(test)


# The life of an instance.


@asynccontextmanager
async def _app(settings: web.Settings) -> AsyncIterator[App]:  # noqa: ARG001
    yield App()


def _settings(**settings: Any) -> web.Settings:
    return web.Settings(drain=0, grace=0, **settings)


def test_an_instance_registers_as_http_and_is_found() -> None:
    registry, ready = MemoryRegistry(), list[Instance]()

    async def test() -> None:
        stop = asyncio.Event()

        def on_ready(instance: Instance) -> None:
            ready.append(instance)
            assert registry.instances("front") == (instance,)
            stop.set()

        await web.Service("front", _app).live(_settings(), registry, stop, on_ready)

    run(test)
    assert ready[0].meta["protocol"] == "http"
    assert registry.instances("front") == ()


def test_a_port_that_is_taken_is_a_bad_setting() -> None:
    async def test() -> None:
        port = free_port()
        with (
            socket.create_server(("127.0.0.1", port)),
            pytest.raises(BadSettingError, match=re.escape(f"127.0.0.1:{port}")),
        ):
            await web.Service("front", _app).live(_settings(port=port), MemoryRegistry(), asyncio.Event())

    run(test)


def test_it_cannot_be_checked_by_grpc() -> None:
    async def test() -> None:
        with pytest.raises(BadSettingError, match=r"cannot be checked by .* expected one of tcp, http, ttl"):
            await web.Service("front", _app).live(_settings(check="grpc"), MemoryRegistry(), asyncio.Event())

    run(test)


def test_the_library_does_not_need_what_it_stands_on() -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(('uvicorn', 'httptools', 'websockets'))); import rollcall"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

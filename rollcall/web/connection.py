"""`Connection`: one client's requests, one after the other."""

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rollcall import context as contexts
from rollcall.telemetry import Method
from rollcall.web.exchange import ELSEWHERE, exchange, problem
from rollcall.web.socket import Socket

if TYPE_CHECKING:
    from rollcall.web.server import Server

log = logging.getLogger(__name__)

HEAD = 64 * 1024  # most bytes of a request's headers, or of anything else that is not its body
HOP = (b"connection", b"upgrade", b"http2-settings")
IDLE = 75.0  # seconds that a connection may be quiet between two requests
FIRST = 1.0  # seconds that a client which has connected has to begin a request, once no more clients are taken
NEWS = 0.01  # seconds in which what the kernel has received for the instance is read
LIVEZ = "/livez"
CODES = {status: str(status) for status in range(100, 1000)}
ERRORS = 400  # where they begin
GONE = "499"


class Connection(HttpToolsProtocol):
    """uvicorn's protocol for HTTP/1.1, with limits to what a client may do.

    It is the application as well that uvicorn calls: what happens around a request is closest to the connection here.
    """

    def __init__(self, server: "Server") -> None:
        super().__init__(server.config, server.state, {})
        self.app = self._handle
        self.ws_protocol_class = partial(Socket, server)  # type: ignore[assignment]  # all it does is to call it
        self._server = server
        self._running: Any = None
        """What is being answered: uvicorn's `RequestResponseCycle`, and the task."""
        self._task: asyncio.Task[Any] | None = None
        self._since = self.loop.time()  # when it began to wait for a request
        self._begun: float | None = None  # when a request began whose headers are not whole
        self._head = 0  # bytes that have come since the last that were of use
        self._held: float | None = None  # since when the client does not read
        self._closing: float | None = None

    # What the event loop tells.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self._server.most:
            self._refuse(503, f"{self._server.most} connections are open already, the most there may be; try again")

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserError:
            self._refuse(400, "expected a request in HTTP/1.1, found something else")
        if self._head > HEAD and not self.transport.is_closing():
            self._refuse(431, f"expected headers of at most {HEAD} bytes, found more")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True  # which uvicorn has told only the last of those that wait
            if self._task:
                self._task.cancel()  # there is nobody to answer any more
        self._server.lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._held = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._held = None

    # What the parser tells.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = self.loop.time()

    def on_headers_complete(self) -> None:
        self._begun, self._head = None, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        # In place of uvicorn's, which sets a timer anew with each request: `look` sees to that.
        self._since = self.loop.time()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())

    # What the server asks for.

    def look(self, now: float) -> None:
        """Close if nothing has happened for too long."""
        slow = self._server.slow
        if self.transport.is_closing():
            self._closing = self._closing or now
            if now - self._closing > slow:  # it will never read what is to be written
                self.transport.abort()
        elif self._held and now - self._held > slow:
            self.transport.abort()
        elif self._quiet:
            if self._begun and now - self._begun > slow:
                self._refuse(408, f"expected all headers of a request within {slow:g} s")
            elif now - self._since > self._patience():
                self.transport.close()

    def leave(self) -> None:
        """Take no more requests: close as soon as none is being answered. The first one may be on its way still."""
        if self.cycle is not None:
            self.shutdown()

    def _patience(self) -> float:
        """Return the seconds within which the next request has to begin."""
        if self.cycle is not None:
            return IDLE
        return min(self._server.slow, FIRST) if self._server.leaving.is_set() else self._server.slow

    # From request to answer.

    async def _handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Have the application answer a request; see to what it needs, and to how it ends."""
        if scope["path"] == LIVEZ and scope["method"] in ("GET", "HEAD"):
            await _alive(send)
            return
        server = self._server
        running = self._running = receive.__self__
        self._task = asyncio.current_task()
        brought, complaint = exchange(scope["headers"], server.leaving, server.ending)
        scope["rollcall"] = brought
        contexts.current.set(brought.context)
        running.default_headers = [*running.default_headers, *brought.headers()]
        answer = _Answer(server, running, scope, send)
        try:
            if complaint:
                await answer.refuse(400, complaint, "INVALID_ARGUMENT")
            else:
                await server.app(scope, receive, answer.send)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (it is logged)
            await answer.fail(error, brought.context.trace_id)
        finally:
            answer.end(brought.context.trace_id)

    def _feed(self, data: bytes) -> bytes:
        """Have data parsed; return what is to be parsed after it."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._get_upgrade() != b"websocket":
                return self._without_upgrade() + data[upgrade.args[0] :]
            if self._quiet:
                self.handle_websocket_upgrade()
            else:  # a client that did not wait for the answer to an earlier request
                self.transport.close()
        return b""

    def _should_upgrade(self) -> bool:
        return self._get_upgrade() is not None

    def _without_upgrade(self) -> bytes:
        """Return a request's headers without its offer of another protocol than HTTP/1.1, such as h2c.

        To decline it is to ignore it, and the parser takes such a request to have no body: it is parsed once more.
        """
        lines = [self.scope["method"].encode() + b" " + self.url + b" HTTP/" + self.scope["http_version"].encode()]
        for name, value in self.headers:
            if name not in HOP:
                lines.append(name + b": " + value)
            elif b"close" in value.lower():
                lines.append(b"connection: close")
        return b"\r\n".join(lines) + b"\r\n\r\n"

    @property
    def _quiet(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, status: int, detail: str) -> None:
        """Close; with a problem as the last answer, if none is under way."""
        if self._quiet:
            headers, body = problem(status, detail)
            lines = [name + b": " + value + b"\r\n" for name, value in (*headers, (b"connection", b"close"))]
            self.transport.write(b"".join((STATUS_LINE[status], *lines, b"\r\n", body)))
        self.transport.close()


class _Answer:
    """The answer to one request, on its way from the application to uvicorn."""

    __slots__ = ("_begun", "_broken", "_meter", "_running", "_scope", "_send", "_server", "_status")

    def __init__(self, server: "Server", running: Any, scope: Any, send: Any) -> None:
        self._server, self._running, self._scope, self._send = server, running, scope, send
        self._status, self._broken = 500, False
        self._meter = server.known(scope["method"], scope["path"])
        self._begun = self._meter.begin() if self._meter else time.monotonic()

    def send(self, message: Any) -> Any:
        """Return what sends a message of the application's, for it to await."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if self._server.draining:
                self._running.keep_alive = False
            if self._meter is None:
                self._count(good=self._status < ERRORS)
        elif self._meter is not None and message.get("more_body"):
            self._meter.sent += 1
        # For a client that has gone uvicorn does nothing, without a pause in which the cancelling could arrive.
        return asyncio.sleep(0) if self._running.disconnected else self._send(message)

    async def fail(self, error: BaseException, trace: str) -> None:
        """Answer for an application that has raised an exception."""
        cancelled = isinstance(error, asyncio.CancelledError)
        if cancelled and self._running.disconnected:
            return
        if cancelled and self._server.ending.is_set():
            await self.refuse(503, ELSEWHERE, "UNAVAILABLE")
            return
        what = f"{self._scope['method']} {self._scope['path']}"
        log.error("%s failed", what, exc_info=error, extra={"call": {"trace": trace}})
        await self.refuse(500, f"{what} failed; the log has it under trace {trace}", "INTERNAL")

    async def refuse(self, status: int, detail: str, code: str) -> None:
        """Answer with a problem; break off an answer that has begun."""
        if not self._running.response_started:
            headers, body = problem(status, detail, code)
            await self.send({"type": "http.response.start", "status": status, "headers": headers})
            await self.send({"type": "http.response.body", "body": body})
        elif not self._running.response_complete:
            self._status, self._broken = status, not self._running.disconnected
            self._running.disconnected = True
            self._running.transport.abort()

    def end(self, trace: str) -> None:
        """Count the request out, and log it."""
        meter = self._meter or self._count(good=False)
        gone = self._running.disconnected and not self._broken
        meter.end(self._begun, GONE if gone else CODES[self._status], trace)

    def _count(self, *, good: bool) -> Method:
        self._meter = self._server.meter(self._scope["method"], self._scope, good=good)
        self._meter.started += 1
        return self._meter


async def _alive(send: Any) -> None:
    body = b"alive\n"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})

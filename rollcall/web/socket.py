"""`Socket`: one WebSocket.

Of uvicorn's three, the protocol made of websockets' sans-I/O parts: `send` waits while the client does not read, the
client is held back while the application does not receive, and it can be closed at any moment with a code of one's own.
"""

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from uvicorn.config import Config
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from rollcall import context as contexts
from rollcall.telemetry import Method
from rollcall.web.exchange import ELSEWHERE, exchange, problem

if TYPE_CHECKING:
    from rollcall.web.server import Server

log = logging.getLogger(__name__)

NOTICE = 1.0  # seconds from a client's going until what still runs for it is cancelled
SWITCHING, NORMAL, GOING_AWAY, INVALID, INTERNAL, RESTART = 101, 1000, 1001, 1007, 1011, 1012


class Socket(WebSocketsSansIOProtocol):
    """uvicorn's protocol for WebSockets, with limits to what a client may do. It is the application as well."""

    def __init__(self, server: "Server", config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
        super().__init__(config, server_state, app_state)
        self.app = self._handle
        self._server = server
        self._task: asyncio.Task[Any] | None = None
        self._held: float | None = None  # since when the client does not read
        self._closing: float | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.handshake_initiated:  # it comes whole, and was not what it should be
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._task:
            self.loop.call_later(NOTICE, self._task.cancel)
        self._server.lost()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:  # which uvicorn would log as an error of ours
                self.conn.fail(INVALID, "expected UTF-8")
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._held = self.loop.time()
        if not self.read_paused:  # each ping is to be answered
            self.read_paused = True
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._held = None
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self.transport.resume_reading()

    def keepalive_timeout(self) -> None:
        if self.read_paused:  # by the application: the answer to the ping may have come
            self.pong_timer = self.pending_ping_payload = None
            self.schedule_ping()
        else:
            super().keepalive_timeout()

    def look(self, now: float) -> None:
        """Close if nothing has happened for too long."""
        if self.transport.is_closing():
            self._closing = self._closing or now
        since = self._closing or self._held
        if since and now - since > self._server.slow:  # it will never read what is to be written
            self.transport.abort()

    def leave(self) -> None:
        """Go on: until the grace is over, it may end by itself."""

    @property
    def gone(self) -> bool:
        """Whether the client is gone without a word."""
        return self.disconnected and self.conn.close_rcvd is None and self.conn.close_sent is None

    async def _handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Have the application answer a WebSocket; see to what it needs, and to how it ends."""
        server = self._server
        self._task = asyncio.current_task()
        brought, complaint = exchange(scope["headers"], server.leaving, server.ending)
        scope["rollcall"] = brought
        contexts.current.set(brought.context)
        dialogue = _Dialogue(self, server, scope, receive, send)
        try:
            if complaint:
                await dialogue.refuse(400, complaint, "INVALID_ARGUMENT")
            else:
                await server.app(scope, dialogue.receive, dialogue.send)
        except ClientDisconnected:
            pass
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (it is logged)
            await dialogue.fail(error, brought.context.trace_id)
        finally:
            if self.initial_response is not None:
                self.handshake_complete = True  # it was refused, which uvicorn would log as an error
            dialogue.end(brought.context.trace_id)


class _Dialogue:
    """What is said over one WebSocket, on its way between the application and uvicorn."""

    def __init__(self, owner: Socket, server: "Server", scope: Any, receive: Any, send: Any) -> None:
        self._socket, self._server, self._scope, self._receive, self._send = owner, server, scope, receive, send
        self._code, self._started = 500, False
        self._meter = server.known("GET", scope["path"])
        self._begun = self._meter.begin() if self._meter else time.monotonic()

    async def receive(self) -> Any:
        """Return the client's next message."""
        message = await self._receive()
        if self._meter is not None and message["type"] == "websocket.receive":
            self._meter.received += 1
        return message

    def send(self, message: Any) -> Any:
        """Return what sends a message of the application's, for it to await."""
        match message["type"]:
            case "websocket.send":
                if self._meter is not None:
                    self._meter.sent += 1
            case "websocket.accept" | "websocket.http.response.start":
                self._started = True
                self._code = message.get("status", SWITCHING)
                if self._meter is None:
                    self._count(good=self._code == SWITCHING)
                ours = self._scope["rollcall"].headers()
                message = {**message, "headers": [*message.get("headers", ()), *ours]}
            case "websocket.close":
                code = message.get("code", NORMAL)
                if not self._started:
                    self._code = 403  # as which uvicorn answers
                elif code not in (NORMAL, GOING_AWAY):
                    self._code = code
        return self._send(message)

    async def fail(self, error: BaseException, trace: str) -> None:
        """Answer for an application that has raised an exception."""
        code, closing, detail = "INTERNAL", INTERNAL, f"it failed; the log has it under trace {trace}"
        status = 500
        if self._socket.disconnected or self._socket.conn.close_rcvd:
            # Most likely it is how the application has heard of it.
            log.debug("GET %s ended with its client", self._scope["path"], exc_info=error)
            return
        if isinstance(error, asyncio.CancelledError) and self._server.ending.is_set():
            status, code, closing, detail = 503, "UNAVAILABLE", RESTART, ELSEWHERE
        else:
            log.error("GET %s failed", self._scope["path"], exc_info=error, extra={"call": {"trace": trace}})
        with contextlib.suppress(ClientDisconnected):
            if not self._started:
                await self.refuse(status, detail, code)
            elif not self._socket.close_sent:
                await self.send({"type": "websocket.close", "code": closing, "reason": code})

    async def refuse(self, status: int, detail: str, code: str) -> None:
        """Answer the client's wish for a WebSocket with a problem."""
        headers, body = problem(status, detail, code)
        await self.send({"type": "websocket.http.response.start", "status": status, "headers": headers})
        await self.send({"type": "websocket.http.response.body", "body": body})

    def end(self, trace: str) -> None:
        """Count the WebSocket out, and log it."""
        meter = self._meter or self._count(good=False)
        gone = self._code == SWITCHING and self._socket.gone
        meter.end(self._begun, "499" if gone else str(self._code), trace)

    def _count(self, *, good: bool) -> Method:
        self._meter = self._server.meter("GET", self._scope, good=good)
        self._meter.started += 1
        return self._meter

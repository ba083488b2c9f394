"""The methods of the services, as HTTP: one message by POST, answers as events, and WebSockets where clients stream."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from services.gateway.catalog import Catalog
from services.gateway.methods import Metadata, Method, Stream
from services.gateway.problem import ProblemError, of_status
from services.gateway.settings import GatewaySettings

PATH = "/v1/{service}/{method}"
HEADER, HEADERS = 1024, 4096  # most characters of a header that is passed on, and of all; gRPC's servers take 8192
PATIENCE = 1.0  # seconds that a stream has to fail with an HTTP status of its own
HEARTBEAT = 15.0  # seconds without a message after which one that says nothing keeps a stream of events open
NAMED = 10  # most names that an answer lists
ELSEWHERE = "the gateway's instance is going; call again, and another will answer"


class Api:
    """An ASGI application that answers `PATH`, whatever the verb."""

    def __init__(self, catalog: Catalog, settings: GatewaySettings) -> None:
        self._catalog, self._settings = catalog, settings
        self._forward = {name.encode(): name for name in settings.forward}
        self._calls = _Limit(lambda: settings.max_calls, "calls are in flight")
        self._streams = _Limit(lambda: settings.max_streams, "streams are open")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or one WebSocket. Raises `ProblemError` for whatever goes wrong before the answer."""
        method = self._method(scope)
        operation = method.operation
        if scope["type"] == "websocket":
            await self._socket(method, scope, receive, send)
            return
        needed = "GET" if operation.kind in ("client_stream", "bidi_stream") else "POST"
        if scope["method"] != needed:
            name = f"{operation.service}.{operation.method}"
            raise ProblemError(405, f"expected {needed} for {name}, found {scope['method']}", headers={"allow": needed})
        if needed == "GET":
            raise ProblemError(
                426,
                f"{operation.service}.{operation.method} takes a stream of messages: call it by WebSocket, at this URL",
                headers={"upgrade": "websocket", "connection": "upgrade"},
            )
        metadata = self._metadata(scope)
        if operation.kind == "server_stream":
            await self._events(method, metadata, scope, receive, send)
            return
        with self._calls.one_more():
            message = method.parse(await self._body(scope, receive))
            answer = await method.call(message, metadata, self._seconds(scope))
        await _send(send, answer.body, [(b"rollcall-instance", answer.instance.encode())] if answer.instance else [])

    # What a request says beside its message.

    def _method(self, scope: Scope) -> Method:
        names = scope["path_params"]
        service = self._catalog.services.get(names["service"])
        if service is None:
            there = _listed(self._catalog.services)
            raise ProblemError(
                404, f"expected a service that is public, found {names['service']!r}; there are: {there}"
            )
        method = service.methods.get(names["method"])
        if method is None and not service.methods:
            raise of_status(grpc.StatusCode.UNAVAILABLE, f"{service.name} has not told its methods yet; try again")
        if method is None:
            there = _listed(each.operation.method for each in service.methods.values())
            raise ProblemError(404, f"expected a method of {service.name}, found {names['method']!r}; it has: {there}")
        scope["rollcall.route"] = f"/v1/{service.name}/{method.operation.method}"
        return method

    def _metadata(self, scope: Scope) -> Metadata:
        """Return the headers that reach the service: of the client's, those on the list."""
        metadata = [("x-request-id", scope["rollcall"].request_id)] if b"x-request-id" in self._forward else []
        for name, value in scope["headers"]:
            if name in self._forward and name != b"x-request-id":
                text = value.decode("latin-1")
                if len(text) > HEADER or not (text.isascii() and text.isprintable()):
                    raise ProblemError(
                        400,
                        f"expected the header {self._forward[name]} to be at most {HEADER} printable ASCII characters",
                    )
                metadata.append((self._forward[name], text))
        if sum(len(name) + len(value) for name, value in metadata) > HEADERS:
            raise ProblemError(431, f"expected the headers that reach the service to have at most {HEADERS} characters")
        return metadata

    def _seconds(self, scope: Scope) -> float:
        """Return the seconds that a call with one answer gets."""
        left = _left(scope)
        return min(self._settings.deadline if left is None else left, self._settings.longest)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Return the request's body. Raises `ProblemError` for one that is too large, too slow, or no JSON."""
        _refuse_other_media(scope)
        try:
            async with asyncio.timeout(self._settings.slow):
                return await self._read_body(receive)
        except TimeoutError:
            raise ProblemError(
                408, f"expected the whole body within {self._settings.slow:g} s", headers={"connection": "close"}
            ) from None

    async def _read_body(self, receive: Receive) -> bytes:
        most = self._settings.max_body
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ProblemError(499, "the client has gone before its request was whole")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > most:
                raise ProblemError(
                    413, f"expected a body of at most {most} bytes, found more", headers={"connection": "close"}
                )
            if not message.get("more_body"):
                return b"".join(chunks)

    # Streams.

    async def _events(self, method: Method, metadata: Metadata, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with server-sent events, one for each message."""
        with self._streams.one_more():
            message = method.parse(await self._body(scope, receive))
            stream = method.open(message, metadata, _left(scope))
            try:
                await _Events(send).answer(stream, scope)
            finally:
                stream.cancel()

    async def _socket(self, method: Method, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass messages on in both directions, until the service has ended the call or the client has gone."""
        await receive()  # that it wants to connect
        operation = method.operation
        if operation.kind not in ("client_stream", "bidi_stream"):
            raise ProblemError(400, f"{operation.service}.{operation.method} takes one message: call it by POST")
        self._refuse_foreign_page(scope)
        metadata = self._metadata(scope)
        with self._streams.one_more():
            stream = method.open(None, metadata, _left(scope))
            tasks: list[asyncio.Future[None]] = []
            try:
                await send({"type": "websocket.accept"})
                tasks += map(asyncio.ensure_future, (_read(method, stream, receive), _write(stream, send)))
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                await next(each for each in reversed(tasks) if each.done())
                end = {"instance": await stream.instance()}
                await _text(send, b'{"end":' + to_json(end) + b"}")
                await send({"type": "websocket.close", "code": 1000})
            except ProblemError as problem:
                await _ended(tasks)
                await _text(send, b'{"error":' + to_json(problem.document()) + b"}")
                await send({"type": "websocket.close", "code": _close_code(problem), "reason": problem.code})
            except _GoneError:
                pass
            except asyncio.CancelledError:
                if not scope["rollcall"].ending.is_set():
                    raise
                await _ended(tasks)
                await _text(send, b'{"error":' + to_json(_going().document()) + b"}")
                await send({"type": "websocket.close", "code": 1012, "reason": "UNAVAILABLE"})
            finally:
                stream.cancel()
                await _ended(tasks)

    def _refuse_foreign_page(self, scope: Scope) -> None:
        """Refuse a WebSocket to a page of another origin: unlike for requests, browsers do not ask before."""
        headers = dict(scope["headers"])
        origin, host = headers.get(b"origin", b"").decode("latin-1"), headers.get(b"host", b"").decode("latin-1")
        allowed = self._settings.cors_origins
        if origin and origin.partition("://")[2] != host and "*" not in allowed and origin not in allowed:
            raise ProblemError(403, f"pages of {origin} may not call this gateway: see its setting --cors-origins")


def _left(scope: Scope) -> float | None:
    """Return the seconds that a request has left, if its client has said how long it waits.

    Raises `ProblemError` when that is over. gRPC would begin such a call all the same, and may even win.
    """
    left: float | None = scope["rollcall"].context.remaining()
    if left == 0:
        raise of_status(grpc.StatusCode.DEADLINE_EXCEEDED, "the time was over before the call could be made")
    return left


def _refuse_other_media(scope: Scope) -> None:
    """Refuse a body that does not call itself JSON, or is compressed."""
    media_type = b""
    for name, value in scope["headers"]:
        if name == b"content-type":
            media_type = value
        elif name == b"content-encoding" and value != b"identity":
            raise ProblemError(415, "expected a body that is not compressed", headers={"accept-encoding": "identity"})
    if media_type.partition(b";")[0].strip().lower() != b"application/json":
        # Besides, this makes browsers ask before a page of another origin may send it.
        wanted = {"accept": "application/json"}
        raise ProblemError(415, "expected the header content-type: application/json", headers=wanted)


class _Limit:
    """How many of something there may be at a time."""

    def __init__(self, most: Callable[[], int], are: str) -> None:
        self._most, self._are = most, are
        self._count = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Count one for as long as the block lasts. Raises `ProblemError` when there are too many already."""
        if self._count >= self._most():
            raise ProblemError(429, f"{self._count} {self._are} already, the most there may be; try again")
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


class _GoneError(Exception):
    """The client has gone."""


class _Events:
    """An answer that is a stream of server-sent events.

    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._last = 0.0

    async def answer(self, stream: Stream, scope: Scope) -> None:
        """Send each message of a stream, then how it has ended. Raises `ProblemError` when it fails at once."""
        answers = aiter(stream)
        first = asyncio.ensure_future(anext(answers, None))
        heartbeat = None
        try:
            await asyncio.wait([first], timeout=PATIENCE)
            if first.done() and isinstance(problem := first.exception(), ProblemError):
                raise problem
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            heartbeat = asyncio.create_task(self._keep_open())
            try:
                answer = await first
                while answer is not None:
                    await self._write(b"data: " + answer + b"\n\n")
                    answer = await anext(answers, None)
                end = to_json({"instance": await stream.instance()})
                await self._write(b"event: end\ndata: " + end + b"\n\n")
            except ProblemError as problem:
                await self._write(b"event: error\ndata: " + to_json(problem.document()) + b"\n\n")
            except asyncio.CancelledError:
                if not scope["rollcall"].ending.is_set():
                    raise
                await self._write(b"event: error\ndata: " + to_json(_going().document()) + b"\n\n")
            await self._send({"type": "http.response.body", "body": b""})
        finally:
            first.cancel()
            if heartbeat:
                heartbeat.cancel()

    async def _write(self, event: bytes) -> None:
        self._last = time.monotonic()
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def _keep_open(self) -> None:
        """Say now and then that the stream is alive, to whatever on the way closes connections that are idle."""
        while True:
            await asyncio.sleep(HEARTBEAT)
            if time.monotonic() - self._last >= HEARTBEAT:
                await self._write(b":\n\n")


async def _read(method: Method, stream: Stream, receive: Receive) -> None:
    """Hand what the client sends to the service. Ends with `ProblemError` or `_GoneError`, never by itself."""
    over = False
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            raise _GoneError
        text = message.get("text")
        if text is None:
            raise ProblemError(400, "expected messages of text, found one of bytes", "INVALID_ARGUMENT")
        if over:
            raise ProblemError(400, "expected no more messages after the empty one", "INVALID_ARGUMENT")
        if text:
            await stream.write(method.parse(text))
        else:
            over = True
            await stream.done()


async def _write(stream: Stream, send: Send) -> None:
    """Hand what the service sends to the client."""
    async for answer in stream:
        await _text(send, b'{"result":' + answer + b"}")


async def _ended(tasks: list[asyncio.Future[None]]) -> None:
    """End tasks that may have ended already, however they did."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _text(send: Send, text: bytes) -> None:
    await send({"type": "websocket.send", "text": text.decode()})


async def _send(send: Send, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    body += b"\n"  # for terminals
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _going() -> ProblemError:
    return of_status(grpc.StatusCode.UNAVAILABLE, ELSEWHERE)


def _close_code(problem: ProblemError) -> int:
    """Return a WebSocket's close code: 4000 and the gRPC status, or that something unexpected was met."""
    return 4000 + int(grpc.StatusCode[problem.code].value[0]) if problem.code else 1011


def _listed(names: Any) -> str:
    found = sorted(set(names))
    return ", ".join(found[:NAMED]) + (", ..." if found[NAMED:] else "") or "none"

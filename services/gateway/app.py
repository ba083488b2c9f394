"""The gateway as an ASGI application: the methods, what describes them, and the web page."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from services.gateway import openapi
from services.gateway.api import PATH, Api
from services.gateway.catalog import Catalog, Service
from services.gateway.live import Live
from services.gateway.problem import ProblemError
from services.gateway.settings import GatewaySettings

PAGE = Path(__file__).parent / "page"
SWAGGER = Path(fastapi_offline.__file__).parent / "static"

READ = ["GET", "HEAD"]
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""What every answer tells browsers to be strict about. https://owasp.org/www-project-secure-headers/"""


_PORT = re.compile(r":[0-9]*$")
_ADDRESS = re.compile(r"[0-9]{1,3}([.][0-9]{1,3}){3}|\[[0-9a-f:.]+\]")


@asynccontextmanager
async def app(settings: GatewaySettings) -> AsyncIterator[ASGIApp]:
    """Yield the application, once it knows what there is to call."""
    registry = settings.open_registry()
    async with Catalog.open(registry, settings) as catalog:
        yield build(catalog, settings, Live(registry, settings.consul_page, public_tag=settings.public_tag))


def build(catalog: Catalog, settings: GatewaySettings, live: Live) -> ASGIApp:
    """Return the application."""
    app = FastAPI(title="Rollcall", openapi_url=None, docs_url=None, redoc_url=None)
    api = Api(catalog, settings)
    app.router.routes += [Route(PATH, api), WebSocketRoute(PATH, api)]
    described = _Described(catalog)

    @app.api_route("/openapi.json", methods=READ)
    async def describe() -> Response:
        return Response(described.document(), media_type="application/json", headers={"cache-control": "no-cache"})

    @app.api_route("/docs", methods=READ)
    async def docs() -> Response:
        return FileResponse(PAGE / "docs.html")

    app.mount("/swagger", StaticFiles(directory=SWAGGER))
    app.mount("/page", StaticFiles(directory=PAGE))
    if settings.page:

        @app.api_route("/", methods=READ)
        async def page() -> Response:
            return FileResponse(PAGE / "index.html")

        @app.get("/live")
        async def follow(request: Request) -> Response:
            return StreamingResponse(_events(live, request.scope["rollcall"].leaving), media_type="text/event-stream")

    answer: Any = _answer  # its type would have to say which kind of argument leads to which kind of result
    for kind in (ProblemError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=[
                *("content-type", "traceparent", "grpc-timeout", "x-request-timeout", "x-request-id"),
                *settings.forward,
            ],
            expose_headers=["rollcall-instance", "traceparent", "x-request-id", "retry-after"],
        )
    return _Strict(app, settings.hosts)


class _Described:
    """The OpenAPI document of what is served now."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._version = -1
        self._document = b""

    def document(self) -> bytes:
        if self._version != self._catalog.version:
            self._version = self._catalog.version
            services = sorted(self._catalog.services.values(), key=lambda each: each.name)
            found = openapi.document("Rollcall", "1", *openapi.merge(map(_described, services)))
            self._document = json.dumps(found, ensure_ascii=False).encode()
        return self._document


def _described(service: Service) -> tuple[list[openapi.Operation], Mapping[str, Any]]:
    """Return the operations of a service, each once though it goes by two names, and what their schemas refer to."""
    operations = {id(method): method.operation for method in service.methods.values()}
    return list(operations.values()), service.components


class _Strict:
    """Adds the headers that make browsers strict, and refuses names that are not the gateway's."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def strictly(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        if (host := self._foreign(scope)) is None:
            await self._app(scope, receive, strictly)
        else:
            refusal = ProblemError(421, f"{host!r} is no name of this gateway: see its setting --hosts").response()
            if scope["type"] == "websocket":
                await WebSocket(scope, receive, strictly).send_denial_response(refusal)
            else:
                await refusal(scope, receive, strictly)

    def _foreign(self, scope: Scope) -> str | None:
        """Return the name that a request calls the gateway by, if that is none of its own.

        A browser takes a page for the gateway's own that has come from the same name, wherever that leads to by now.
        """
        for name, value in scope["headers"]:
            if name == b"host":
                host = _PORT.sub("", value.decode("latin-1").lower())
                if not (_ADDRESS.fullmatch(host) or host in self._hosts or "*" in self._hosts):
                    return host[:100]
        return None


async def _answer(request: Request | WebSocket, error: Exception) -> Response | None:
    """Answer with the problem that an error is."""
    if isinstance(error, HTTPException):
        found = ProblemError(error.status_code, error.detail, headers=error.headers)
    elif isinstance(error, ProblemError):
        found = error
    else:
        found = ProblemError(500, "the gateway failed; its log has more under the trace that the answer's header names")
    if isinstance(request, WebSocket):
        await request.send_denial_response(found.response())
        return None
    return found.response()


async def _events(live: Live, leaving: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield what runs as events, until this instance takes no more requests: who looks then asks another one."""
    left = asyncio.ensure_future(leaving.wait())
    async with aclosing(live.snapshots()) as snapshots:
        try:
            while not left.done():
                following = asyncio.ensure_future(anext(snapshots))
                try:
                    await asyncio.wait([following, left], return_when=asyncio.FIRST_COMPLETED)
                    if following.done():
                        yield b"data: " + json.dumps(following.result(), ensure_ascii=False).encode() + b"\n\n"
                finally:
                    following.cancel()
                    await asyncio.wait([following])
        finally:
            left.cancel()

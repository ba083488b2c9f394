"""`Server`: serves an ASGI application by uvicorn's protocols, and ends in order.

uvicorn's own server would do the rest in ways of its own: it takes the process's signals, waits in steps of a tenth of
a second, and leaves streams to their clients. Here it is its protocols that are used, each with what they lack:
`rollcall.web.connection`, and `rollcall.web.socket` for WebSockets.

Nothing here waits without bound. Connections are limited in number; a client that does not send its request, or does
not read its answer, is left after `slow` seconds; between requests it may be quiet for `connection.IDLE`.
"""

import asyncio
import contextlib
import socket
import time
from email.utils import formatdate
from typing import Any, Protocol

from uvicorn.config import Config
from uvicorn.server import ServerState

from rollcall.telemetry import Method, Telemetry
from rollcall.web.connection import Connection

BACKLOG = 1024  # connections that may wait to be accepted
KNOWN = 1024  # most paths whose counts are remembered
LAST_WORD = 1.0  # seconds that what outlives the grace has to tell its clients so
UNMATCHED = "unmatched"
_VERBS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Peer(Protocol):
    """A connection, of either kind."""

    transport: asyncio.Transport

    def look(self, now: float) -> None:
        """Close if nothing has happened for too long; `now` is the event loop's time."""

    def leave(self) -> None:
        """Take no more requests: close as soon as none is being answered."""


class Server:
    """Serves an ASGI application on a socket that listens already, once started.

    `slow` is in seconds, `connections` the most there may be, `message` the most bytes of one over a WebSocket.
    """

    def __init__(
        self, app: Any, listener: socket.socket, *, slow: float = 10.0, connections: int = 1024, message: int = 1 << 20
    ) -> None:
        self.app, self.slow, self.most = app, slow, connections
        self.port: int = listener.getsockname()[1]
        self.draining = False
        """Whether clients are told to go elsewhere."""
        self.leaving, self.ending = asyncio.Event(), asyncio.Event()
        """Whether no more requests are taken, and whether those that still run are being cancelled."""
        self.state = ServerState()
        self.config = Config(
            app,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level="error",  # the rest is about what clients do
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ws_max_size=message,
            ws_per_message_deflate=False,  # which would cost a few hundred kB for each
        )
        self.config.load()
        self._listener = listener
        self._accepting: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._telemetry = Telemetry("", "", "")  # whose counts nobody asks for
        self._meters: dict[tuple[str, str], Method] = {}
        self._known: dict[tuple[str, str], Method] = {}

    def equip(self, telemetry: Telemetry) -> None:
        """Count requests there."""
        self._telemetry = telemetry

    async def start(self) -> None:
        """Answer requests from now on."""
        loop = asyncio.get_running_loop()
        self._sweep(loop)
        self._accepting = await loop.create_server(lambda: Connection(self), sock=self._listener, backlog=BACKLOG)

    async def tell(self, *, process: bool, services: bool) -> None:  # noqa: ARG002 (it is the process that goes)
        """Close each connection after its next answer, so that clients come back to another instance, if it drains."""
        self.draining = not process

    async def quiet(self, patience: float) -> None:
        """Do nothing: whoever has a connection is told with an answer that it is the last."""

    async def stop(self, grace: float) -> None:
        """Take no more requests, finish those in flight within `grace` seconds, and end the others."""
        self.draining = True
        self.leaving.set()
        await self._stop_accepting()
        for peer in self.peers():
            peer.leave()
        if not await self._emptied(grace):
            self.ending.set()
            for task in tuple(self.state.tasks):
                task.cancel()
            if not await self._emptied(LAST_WORD):
                for peer in self.peers():
                    peer.transport.abort()
                await self._emptied(LAST_WORD)  # of tasks that heed being cancelled only now
        if self._sweeper:
            self._sweeper.cancel()

    async def _stop_accepting(self) -> None:
        """Close the listener, with those accepted who came before."""
        if not self._accepting:
            return
        # Who waits to be accepted believes to be connected already: the kernel would answer what they send by a reset.
        waiting = []
        with contextlib.suppress(OSError):  # that there are no more
            while True:
                waiting.append(self._listener.accept()[0])
        self._accepting.close()
        self._accepting = None
        for client in waiting:
            client.setblocking(False)  # noqa: FBT003 (Python's)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: Connection(self), client)

    def peers(self) -> tuple[Peer, ...]:
        """Return all connections."""
        connections: Any = tuple(self.state.connections)
        return connections  # type: ignore[no-any-return]

    def lost(self) -> None:
        """Hear that a connection is closed."""
        if not self.state.connections:
            self._empty.set()

    def known(self, verb: str, path: str) -> Method | None:
        """Return what counts the requests of a path, if an answer to one has told already."""
        return self._known.get((verb, path))

    def meter(self, verb: str, scope: Any, *, good: bool) -> Method:
        """Return what counts a request that the application has seen. `good` tells whether it was what it should be."""
        verb = verb if verb in _VERBS else "other"
        route = scope.get("rollcall.route") or getattr(scope.get("route"), "path", None) or UNMATCHED
        meter = self._meters.get((verb, route))
        if meter is None:
            meter = self._meters[verb, route] = self._telemetry.http(verb, route)
        if good:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[verb, scope["path"]] = meter
        return meter

    async def _emptied(self, seconds: float) -> bool:
        """Wait until all connections are closed and all is done for them; say whether that is so in time."""
        until = time.monotonic() + seconds
        while self.state.connections or self.state.tasks:
            left = until - time.monotonic()
            if left <= 0:
                return False
            if self.state.connections:
                self._empty.clear()
                waiting = asyncio.ensure_future(self._empty.wait())
                await asyncio.wait([waiting], timeout=left)
                waiting.cancel()
            else:
                await asyncio.wait(tuple(self.state.tasks), timeout=left)
        return True

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at all connections now and then: cheaper than a timer for each that every request would set anew."""
        self.state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        now = loop.time()
        for peer in self.peers():
            peer.look(now)
        self._sweeper = loop.call_later(min(1.0, self.slow / 4), self._sweep, loop)

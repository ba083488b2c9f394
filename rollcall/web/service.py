"""`Service`: a service that answers HTTP and WebSockets."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from rollcall.life import Life, cannot_listen
from rollcall.registry import Check, HttpCheck, Instance, TcpCheck, TtlCheck
from rollcall.settings import ServiceSettings
from rollcall.web.server import BACKLOG, Server
from rollcall.web.settings import Settings

CHECK = HttpCheck()
"""What Consul checks instances by, unless the service or its settings say otherwise: their own /livez."""

Open = Callable[[Any], AbstractAsyncContextManager[Any]]


class Service(Life):
    """An HTTP service that registers itself and can be found.

        service = web.Service("front", app, settings=FrontSettings)
        service.run()

    `name` is what it is found by. `app` gets the settings, and returns an async context manager of the ASGI
    application: what it needs is opened before the first request, and closed after the last one. Lifespan events are
    not sent. `check` is how Consul finds out whether an instance is well, unless its settings say otherwise.
    `settings` may be a subclass of `web.Settings` with more fields.

    `GET /livez` is answered here. What each request brings along is in `scope["rollcall"]`, an `Exchange`. Metrics and
    log lines name a request by the template of the route that has matched, or by `scope["rollcall.route"]` where the
    application sets it, to one of a limited number of values.
    """

    checks = (HttpCheck, TcpCheck, TtlCheck)
    protocol = "http"

    def __init__(
        self, name: str, app: Open, *, check: Check = CHECK, settings: type[ServiceSettings] = Settings
    ) -> None:
        super().__init__(name, check=check, settings=settings)
        self._app = app

    @asynccontextmanager
    async def listen(self, settings: Settings) -> AsyncIterator[Server]:
        """See `Life.listen`."""
        try:
            listener = socket.create_server(
                (settings.host, settings.port),
                family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET,
                backlog=BACKLOG,
            )
        except OSError:
            raise cannot_listen(settings) from None
        with listener:
            listener.settimeout(0)
            async with self._app(settings) as app:
                server = Server(
                    app, listener, slow=settings.slow, connections=settings.connections, message=settings.max_body
                )
                try:
                    yield server
                finally:
                    await server.stop(0)  # where something else that the instance needs could not be had

    def alive_at(self, instance: Instance, http_port: int) -> str:  # noqa: ARG002 (others are asked there)
        """See `Life.alive_at`."""
        return super().alive_at(instance, instance.port)

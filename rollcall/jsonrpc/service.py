"""`Service`: a service that answers JSON-RPC calls."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from rollcall.jsonrpc.contract import Contract
from rollcall.jsonrpc.server import Server
from rollcall.jsonrpc.wire import LIMITS, Limits
from rollcall.life import Life, cannot_listen
from rollcall.registry import Check, HttpCheck, TcpCheck, TtlCheck
from rollcall.settings import ServiceSettings

T = TypeVar("T")

CHECK = TcpCheck(interval=5, timeout=2)
"""What Consul checks instances by, unless the service or its settings say otherwise."""


class Service(Life):
    """A JSON-RPC service that registers itself and can be found.

        service = jsonrpc.Service("hello")
        service.register(HELLO, Hello())
        service.run()

    `name` is what callers dial. `check` is how Consul finds out whether an instance is well, unless its settings say
    otherwise. `settings` may be a subclass of `ServiceSettings` with more fields.
    """

    checks = (TcpCheck, HttpCheck, TtlCheck)
    protocol = "jsonrpc"

    def __init__(
        self,
        name: str,
        *,
        check: Check = CHECK,
        settings: type[ServiceSettings] = ServiceSettings,
        limits: Limits = LIMITS,
    ) -> None:
        super().__init__(name, check=check, settings=settings)
        self._limits = limits
        self._handlers: list[tuple[Contract[Any], Any]] = []

    def register(self, contract: Contract[T], handler: T) -> None:
        """Have instances answer the calls of a contract by an object with its methods. See `Server.register`."""
        self._handlers.append((contract, handler))
        self._server()  # which refuses what does not fit now, rather than when an instance starts

    @asynccontextmanager
    async def listen(self, settings: Any) -> AsyncIterator[Server]:
        """See `Life.listen`."""
        server = self._server()
        try:
            await server.listen(settings.host, settings.port)
        except OSError:
            raise cannot_listen(settings) from None
        try:
            yield server
        finally:
            await server.stop(0)  # where something else that the instance needs could not be had

    def _server(self) -> Server:
        server = Server(self._limits)
        for contract, handler in self._handlers:
            server.register(contract, handler)
        return server

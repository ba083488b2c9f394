"""`Service`: a service that answers gRPC calls."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from grpc_channelz.v1 import channelz, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as aio_health
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from rollcall.instrument import Instrumented
from rollcall.life import OVERALL, Life, cannot_listen
from rollcall.registry import Check, GrpcCheck, target
from rollcall.settings import ServiceSettings
from rollcall.telemetry import Telemetry

STANDARD = ("grpc.health.v1.Health", "grpc.channelz.v1.Channelz", reflection.SERVICE_NAME)
"""What every instance serves beside its own services."""

CHECK = GrpcCheck(OVERALL)
"""What Consul checks instances by, unless the service or its settings say otherwise."""

QUIET = 1.0  # seconds without a new call after which all callers seem to have heard that an instance is going
LAST_WORD = 1.0  # seconds that calls which outlive the grace have to tell their callers so

AddToServer = Callable[[Any, Any], None]


class Service(Life):
    """A gRPC service that registers itself and can be found.

        service = rollcall.Service("sum")
        service.add(add_SumServiceServicer_to_server, Sum())
        service.run()

    `name` is what callers dial. `check` is how Consul finds out whether an instance is well, unless its settings say
    otherwise. `settings` may be a subclass of `ServiceSettings` with more fields; `--help` of a program that runs a
    service lists them all.
    """

    protocol = "grpc"

    def __init__(self, name: str, *, check: Check = CHECK, settings: type[ServiceSettings] = ServiceSettings) -> None:
        super().__init__(name, check=check, settings=settings)
        self._servicers: list[tuple[AddToServer, Any]] = []

    def add(self, add_to_server: AddToServer, servicer: Any) -> None:
        """Have instances serve a contract: its generated `add_..._to_server`, and a servicer of `async def` methods.

        For a servicer that needs something opened first and closed in the end, a store or a channel, give a function
        instead: it gets the settings, and returns an async context manager of the servicer.
        """
        self._servicers.append((add_to_server, servicer))

    @asynccontextmanager
    async def listen(self, settings: ServiceSettings) -> "AsyncIterator[_Server]":
        """See `Life.listen`."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])  # else two instances could share a port unnoticed
        try:
            port = server.add_insecure_port(target(settings.host, settings.port))
        except RuntimeError:
            raise cannot_listen(settings) from None
        own = _Server(server, port)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(own.stop, 0)  # also where something that a servicer needs cannot be had
            for add_to_server, servicer in self._servicers:
                ready = await stack.enter_async_context(servicer(settings)) if callable(servicer) else servicer
                own.servicers.append((add_to_server, ready))
            stack.push_async_callback(own.stop, 0)  # before that is closed
            yield own


class _Server:
    """A grpc.aio server with all that a client may ask of it."""

    def __init__(self, server: grpc.aio.Server, port: int) -> None:
        self.port = port
        self.servicers: list[tuple[AddToServer, Any]] = []
        self._server = server
        self._started = False
        self._end_calls: Callable[[], None] = lambda: None

    def equip(self, telemetry: Telemetry) -> None:
        self._instrumented = Instrumented(self._server, telemetry)
        self._end_calls = self._instrumented.end
        services = self._instrumented.services
        for number, (add_to_server, servicer) in enumerate(self.servicers, start=1):
            add_to_server(servicer, self._instrumented)
            if len(services) < number:
                raise TypeError(
                    f"expected {add_to_server} to add a contract's methods; generate it by grpcio-tools >= 1.66"
                )
        self._health = aio_health.HealthServicer()
        seldom: Any = _Seldom(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, seldom)
        channelz_pb2_grpc.add_ChannelzServicer_to_server(channelz.aio.ChannelzServicer(), seldom)
        reflected = reflection.aio.ReflectionServicer([*services, *STANDARD])
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, seldom)

    async def start(self) -> None:
        self._started = True
        await asyncio.shield(self._server.start())  # which, cancelled, would leave a server that cannot be stopped

    async def tell(self, *, process: bool, services: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        for name, well in {OVERALL: process, **dict.fromkeys(self._instrumented.services, services)}.items():
            await self._health.set(name, statuses.SERVING if well else statuses.NOT_SERVING)

    async def quiet(self, patience: float) -> None:
        # Of the calls that come while grpc.aio's server stops, some are cancelled, which tells nobody to try again.
        end = time.monotonic() + patience
        while (left := min(self._instrumented.called + QUIET, end) - time.monotonic()) > 0:  # noqa: ASYNC110 (an event would cost each call)
            await asyncio.sleep(left)

    async def stop(self, grace: float) -> None:
        if not self._started:  # grpc.aio would keep the port of a server that never has
            await self.start()
        # grpc.aio would end what outlives the grace with a status that sounds like the caller's own doing.
        stopped = asyncio.ensure_future(self._server.stop(grace + LAST_WORD))
        await asyncio.wait([stopped], timeout=grace)
        self._end_calls()
        await stopped


class _Seldom:
    """A grpc.aio server as those see it who add methods that are hardly ever called: to be looked up when they are.

    Of a registered method grpc.aio awaits the next call beforehand, and begins anew to await all of them with each call
    of any: the dozen methods that every instance serves beside its own would cost each call a few hundredths.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Leave it at the generic handlers."""

"""`Service`: the life of an instance, from its settings to its exit status."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
import uvloop
from grpc_channelz.v1 import channelz, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as aio_health
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from rollcall import logs
from rollcall.probes import Probes
from rollcall.registration import Registration
from rollcall.registry import (
    Check,
    DuplicateInstanceError,
    GrpcCheck,
    HttpCheck,
    Instance,
    Registry,
    RegistryError,
    TcpCheck,
    TtlCheck,
)
from rollcall.settings import PREFIX, BadSettingError, ServiceSettings, load
from rollcall.telemetry import Telemetry

T = TypeVar("T")
log = logging.getLogger(__name__)

OVERALL = ""
"""The name under which grpc.health.v1 tells of the server as a whole."""
STANDARD = ("grpc.health.v1.Health", "grpc.channelz.v1.Channelz", reflection.SERVICE_NAME)
"""What every instance serves beside its own services."""


class Service:
    """A gRPC service that registers itself and can be found.

        service = rollcall.Service("sum")
        service.add(add_SumServiceServicer_to_server, Sum())
        service.run()

    `name` is what callers dial. `--help` of a program that runs one lists the settings of its instances.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._servicers: list[tuple[Callable[[Any, Any], None], Any]] = []

    def add(self, add_to_server: Callable[[Any, Any], None], servicer: Any) -> None:
        """Have instances serve a contract: its generated `add_..._to_server`, and a servicer of `async def` methods."""
        self._servicers.append((add_to_server, servicer))

    def run(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Run one instance until SIGTERM or SIGINT, then exit: 0 when it ended well, 2 for a bad setting.

        Settings come from `argv` (default: the command line), the environment, and defaults. A second signal ends the
        process at once with 128 + its number.
        """
        try:
            settings = load(ServiceSettings, sys.argv[1:] if argv is None else argv, program=self.name)
            logs.configure(settings.log_format, settings.log_level, settings.id or self.name)
            # uvloop takes a sixth off the price of a call that grpc.aio handles.
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._until_signalled(settings))
        except BadSettingError as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            sys.exit(2)
        except RegistryError as error:
            log.error("%s", error)  # noqa: TRY400 (its message says it all)
            sys.exit(1)
        sys.exit(0)

    async def _until_signalled(self, settings: ServiceSettings) -> None:
        stop = asyncio.Event()

        def on_signal(number: int) -> None:
            if stop.is_set():
                os._exit(128 + number)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        await self.live(settings, settings.registry(), stop)

    async def live(
        self,
        settings: ServiceSettings,
        registry: Registry,
        stop: asyncio.Event,
        on_ready: Callable[[Instance], None] = lambda _: None,
    ) -> None:
        """Live the life of one instance: serve, register, hold the registration, and on `stop` drain.

        `on_ready` is called once it is registered. Raises `BadSettingError` for an address that cannot be listened on,
        and `DuplicateInstanceError` when another instance that is alive has the id.
        """
        # Serve, with all that a client may ask of a server. The service is not ready yet, but the process is alive.
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])  # else two instances could share a port unnoticed
        port = _listen(server, settings)
        instance_id = settings.id or f"{self.name}-{socket.gethostname()}-{port}"
        telemetry = Telemetry(self.name, instance_id, settings.version)
        instrumented = telemetry.instrument(server)
        for number, (add_to_server, servicer) in enumerate(self._servicers, start=1):
            add_to_server(servicer, instrumented)
            if len(instrumented.services) < number:
                raise TypeError(
                    f"expected {add_to_server} to add a contract's methods; generate it by grpcio-tools >= 1.66"
                )
        health = _Health(instrumented.services)
        seldom: Any = _Seldom(server)
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, seldom)
        channelz_pb2_grpc.add_ChannelzServicer_to_server(channelz.aio.ChannelzServicer(), seldom)
        names = [*instrumented.services, *STANDARD]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), seldom)
        await health.tell(process=True, services=False)
        address = settings.advertised()

        # Register, and hold on to the registration. Ready means: registered once. Losing Consul later costs no call.
        changes: asyncio.Queue[bool | DuplicateInstanceError] = asyncio.Queue()
        ready = asyncio.Event()
        async with _probes(settings, telemetry, ready) as probes:
            await server.start()  # last of all that can be refused: a server that has started must be stopped
            instance = Instance(
                id=instance_id,
                name=self.name,
                address=address,
                port=port,
                version=settings.version,
                tags=settings.tags,
                meta={"http_port": str(probes.port)},
                weight=settings.weight,
            )
            loop = asyncio.get_running_loop()
            registration = Registration(
                registry,
                instance,
                _check(settings, instance, probes.port),
                lambda change: _hand_over(loop, changes, change),
            )
            registration.start()
            log.info("%s serves at %s, probes at port %d", instance.id, instance.target, probes.port)
            refusal = None
            while not stop.is_set() and refusal is None:
                change = await _first(changes.get(), stop.wait())
                if isinstance(change, DuplicateInstanceError):
                    refusal = change
                elif change is not None:
                    telemetry.registered.set(change)
                if change is True and not ready.is_set():
                    await health.tell(process=True, services=True)
                    ready.set()
                    on_ready(instance)

            # Drain: tell everybody, give callers time to hear of it, finish what is in flight.
            log.info("%s drains: %s", instance.id, "asked to stop" if refusal is None else "its id is taken")
            ready.clear()
            await health.tell(process=False, services=False)
            if refusal is None:  # an id that is somebody else's is not ours to remove
                await asyncio.to_thread(registration.close)
                telemetry.registered.set(0)
                await asyncio.sleep(settings.drain)
            await server.stop(settings.grace)
            log.info("%s has ended", instance.id)
        if refusal:
            raise refusal


class _Health:
    """grpc.health.v1 for the process as a whole, under the empty name, and for each of its services."""

    def __init__(self, services: Sequence[str]) -> None:
        self.servicer = aio_health.HealthServicer()
        self._services = services

    async def tell(self, *, process: bool, services: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        for name, serving in {OVERALL: process, **dict.fromkeys(self._services, services)}.items():
            await self.servicer.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)


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


def _hand_over(loop: asyncio.AbstractEventLoop, changes: "asyncio.Queue[T]", change: T) -> None:
    """Put a change from another thread into a queue of this loop's."""
    loop.call_soon_threadsafe(changes.put_nowait, change)


async def _first(change: Any, stopped: Any) -> Any:
    """Wait for a change or for the stop, whichever is first; return the change, or None."""
    tasks = [asyncio.ensure_future(change), asyncio.ensure_future(stopped)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


def _listen(server: grpc.aio.Server, settings: ServiceSettings) -> int:
    target = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
    try:
        return server.add_insecure_port(target)
    except RuntimeError:
        raise BadSettingError(
            f"setting --host, --port ({PREFIX}HOST, {PREFIX}PORT): cannot listen on {target}: it is taken, or not an "
            f"address of this machine; stop what has it, or choose another (port 0: any that is free)"
        ) from None


@contextlib.asynccontextmanager
async def _probes(settings: ServiceSettings, telemetry: Telemetry, ready: asyncio.Event) -> AsyncIterator[Probes]:
    address = (settings.host, settings.http_port)
    try:
        probes = Probes(address, telemetry.metrics, ready.is_set, asyncio.get_running_loop())
    except OSError as error:
        raise BadSettingError(
            f"setting --http-port ({PREFIX}HTTP_PORT): cannot listen on {address[0]}:{address[1]}: {error.strerror}"
        ) from None
    try:
        yield probes
    finally:
        await asyncio.to_thread(probes.close)


def _check(settings: ServiceSettings, instance: Instance, http_port: int) -> Check:
    # Consul asks whether the server is alive, not whether it is ready: what makes it ready is to be registered.
    interval, timeout = settings.check_interval, settings.check_timeout
    match settings.check:
        case "grpc":
            return GrpcCheck(OVERALL, interval, timeout)
        case "tcp":
            return TcpCheck(interval, timeout)
        case "http":
            host = instance.target.rpartition(":")[0]
            return HttpCheck(f"http://{host}:{http_port}/livez", interval, timeout)
        case "ttl":
            return TtlCheck(3 * interval)

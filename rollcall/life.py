"""`Life`: the life of an instance, from its settings to its exit status, whatever it answers calls with."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from typing import Any, NoReturn, Protocol, TypeVar

import uvloop

from rollcall import logs
from rollcall.discovery.membership import all_answered, dialled
from rollcall.live import LiveSettings
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
    target,
)
from rollcall.settings import META_VALUE, PREFIX, BadSettingError, ServiceSettings, load
from rollcall.telemetry import Telemetry
from rollcall.threads import DaemonThreads

T = TypeVar("T")
log = logging.getLogger(__name__)

OVERALL = ""
"""The name under which grpc.health.v1 tells of the server as a whole."""


class Server(Protocol):
    """What an instance answers calls with. It has its port already, and answers nobody yet."""

    port: int

    def equip(self, telemetry: Telemetry) -> None:
        """Add the handlers, each of them measured. Called once, before `start`."""

    async def start(self) -> None:
        """Answer calls from now on."""

    async def tell(self, *, process: bool, services: bool) -> None:
        """Tell clients who ask for its health whether the process is well, and whether its services are ready."""

    async def quiet(self, patience: float) -> None:
        """Wait up to `patience` seconds until calls have ceased to come, where one that comes too late may be lost."""

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give those in flight `grace` seconds to finish, and end the rest."""


class Life(ABC):
    """A service that registers itself and can be found: what every kind of server shares."""

    checks: tuple[type[Check], ...] = (GrpcCheck, TcpCheck, HttpCheck, TtlCheck)
    """The kinds of check that its instances can be registered with."""

    protocol: str
    """What its instances are called by, as they register it: `grpc`, `jsonrpc` or `http`."""

    def __init__(self, name: str, *, check: Check, settings: type[ServiceSettings] = ServiceSettings) -> None:
        self.name = name
        self._check, self._settings = check, settings

    @abstractmethod
    def listen(self, settings: Any) -> AbstractAsyncContextManager[Server]:
        """Return a context manager that listens where the settings say, and sets up what the handlers need.

        Entering raises `BadSettingError` for what cannot be had as the settings say. Leaving stops the server, where
        nobody has done so.
        """

    def alive_at(self, instance: Instance, http_port: int) -> str:
        """Return the URL at which an instance, with its probes at this port, says that it is alive."""
        return f"http://{instance.target.rpartition(':')[0]}:{http_port}/livez"

    def run(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Run one instance until SIGTERM or SIGINT, then exit: 0 when it ended well, 2 for a bad setting.

        Settings come from `argv` (default: the command line), the environment, and defaults. A second signal ends the
        process at once with 128 + its number.
        """
        try:
            settings = load(self._settings, sys.argv[1:] if argv is None else argv, program=self.name)
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
        await self.live(settings, settings.open_registry(), stop)

    async def live(
        self,
        settings: ServiceSettings,
        registry: Registry,
        stop: asyncio.Event,
        on_ready: Callable[[Instance], None] = lambda _: None,
    ) -> None:
        """Live the life of one instance: serve, register, hold the registration, and on `stop` drain.

        `on_ready` is called once it is registered. Raises `BadSettingError` for an address that cannot be listened on,
        and `DuplicateInstanceError` when another instance that is alive has the id. Cancelled, it ends without
        a drain, and leaves no registration behind.
        """
        address = settings.advertised()
        async with AsyncExitStack() as stack:
            # Listen, and set up what the handlers need. The process is alive, and nobody can call it yet.
            server: Server | None = await _first(stack.enter_async_context(self.listen(settings)), stop.wait())
            if server is None:  # asked to stop before it could begin
                return
            instance_id = settings.id or f"{self.name}-{socket.gethostname()}-{server.port}"
            telemetry = Telemetry(self.name, instance_id, settings.version)
            server.equip(telemetry)
            await server.tell(process=True, services=False)
            ready = asyncio.Event()
            live = LiveSettings(self.name, instance_id, settings, telemetry.refused)
            probes = await stack.enter_async_context(_probes(settings, telemetry, ready, live))
            stack.enter_context(live.following(registry))
            instance = Instance(
                id=instance_id,
                name=self.name,
                address=address,
                port=server.port,
                version=settings.version,
                tags=settings.tags,
                meta={
                    **settings.extra_meta(),
                    "http_port": str(probes.port),
                    "protocol": self.protocol,
                    **_calls(),
                },
                weight=settings.weight,
            )
            check = self._chosen_check(settings, instance, probes.port)

            # Serve. Last of all that can be refused.
            await server.start()
            log.info("%s serves at %s, probes at port %d", instance.id, instance.target, probes.port)

            # Register, and hold on to the registration. Ready means: registered once. Losing Consul later costs no
            # call.
            loop = asyncio.get_running_loop()
            changes: asyncio.Queue[bool | DuplicateInstanceError] = asyncio.Queue()
            registration = Registration(
                registry,
                instance,
                check,
                lambda change: _hand_over(loop, changes, change),
                fit=all_answered,  # who is called before its own questions have been answered knows nobody to call
            )
            registration.start()
            stack.push_async_callback(_apart, registration.close)  # for one that is cancelled
            refusal = None
            while not stop.is_set() and refusal is None:
                change = await _first(changes.get(), stop.wait())
                if isinstance(change, DuplicateInstanceError):
                    refusal = change
                elif change is not None:
                    telemetry.registered.set(change)
                if change is True and not ready.is_set():
                    await server.tell(process=True, services=True)
                    ready.set()
                    on_ready(instance)

            # Drain: tell everybody, give callers time to hear of it, finish what is in flight.
            log.info("%s drains: %s", instance.id, "asked to stop" if refusal is None else "its id is taken")
            ready.clear()
            await server.tell(process=False, services=False)
            await _apart(registration.close)
            grace = settings.grace
            if refusal is None:
                telemetry.registered.set(0)
                await asyncio.sleep(settings.drain)
                begun = loop.time()
                await server.quiet(grace / 2 if settings.drain else 0)
                grace -= loop.time() - begun
            log.info("%s takes no more calls; those in flight have %.3g s", instance.id, grace)
            await server.stop(grace)
            log.info("%s has ended", instance.id)
        if refusal:
            raise refusal

    def _chosen_check(self, settings: ServiceSettings, instance: Instance, http_port: int) -> Check:
        """Return the service's own check, or the one that the settings choose, with the times they give."""
        # Consul asks whether the server is alive, not whether it is ready: what makes it ready is to be registered.
        kinds: dict[str, Check] = {
            "grpc": GrpcCheck(OVERALL),
            "tcp": TcpCheck(),
            "http": HttpCheck(),
            "ttl": TtlCheck(),
        }
        chosen = self._check
        if settings.check and not isinstance(chosen, type(kinds[settings.check])):
            chosen = kinds[settings.check]
        if not isinstance(chosen, self.checks):
            fit = ", ".join(name for name, each in kinds.items() if isinstance(each, self.checks))
            raise BadSettingError(
                f"setting --check ({PREFIX}CHECK): {self.name} cannot be checked by {chosen}; expected one of {fit}"
            )
        if isinstance(chosen, HttpCheck) and not chosen.url:
            chosen = replace(chosen, url=self.alive_at(instance, http_port))
        interval, timeout = settings.check_interval, settings.check_timeout
        if isinstance(chosen, TtlCheck):
            return replace(chosen, ttl=3 * interval) if interval else chosen
        return replace(chosen, interval=interval or chosen.interval, timeout=timeout or chosen.timeout)


def cannot_listen(settings: ServiceSettings) -> BadSettingError:
    """Return the error for a server that cannot listen where the settings say."""
    wanted = target(settings.host, settings.port)
    return BadSettingError(
        f"setting --host, --port ({PREFIX}HOST, {PREFIX}PORT): cannot listen on {wanted}: it is taken, or not an "
        f"address of this machine; stop what has it, or choose another (port 0: any that is free)"
    )


def _calls() -> dict[str, str]:
    """Return whom this process calls by now, as an instance registers it; nothing when that is nobody."""
    calls = ""
    for name in dialled():
        more = f"{calls},{name}" if calls else name
        if "," not in name and len(more.encode()) <= META_VALUE:
            calls = more
    return {"calls": calls} if calls else {}


def _hand_over(loop: asyncio.AbstractEventLoop, changes: "asyncio.Queue[T]", change: T) -> None:
    """Put a change from another thread into a queue of this loop's."""
    loop.call_soon_threadsafe(changes.put_nowait, change)


async def _first(wanted: Any, stopped: Any) -> Any:
    """Wait for what is wanted or for the stop, whichever is first; return what was wanted, or None."""
    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(stopped)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _apart(work: Callable[[], None]) -> None:
    """Do what blocks, on a thread of its own: handlers may have taken all those of asyncio. Cancelled, it goes on."""
    await asyncio.get_running_loop().run_in_executor(DaemonThreads(thread_name_prefix="closing"), work)


@contextlib.asynccontextmanager
async def _probes(
    settings: ServiceSettings, telemetry: Telemetry, ready: asyncio.Event, live: LiveSettings
) -> AsyncIterator[Probes]:
    address = (settings.host, settings.http_port)
    try:
        probes = Probes(address, telemetry.metrics, ready.is_set, live.report, asyncio.get_running_loop())
    except OSError as error:
        raise BadSettingError(
            f"setting --http-port ({PREFIX}HTTP_PORT): cannot listen on {address[0]}:{address[1]}: {error.strerror}"
        ) from None
    try:
        yield probes
    finally:
        await _apart(probes.close)

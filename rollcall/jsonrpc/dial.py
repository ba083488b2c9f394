"""`dial`: the methods of a contract at whatever instances a service has at the moment.

What gRPC's C core does for gRPC's channels is done here for JSON-RPC, by the same settings and to the same ends: a
connection to each instance, round robin, retries, ejection, a circuit breaker.
"""

import asyncio
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from rollcall.channel import default_registry
from rollcall.discovery.membership import Membership
from rollcall.jsonrpc.client import Connection, client, time_for
from rollcall.jsonrpc.contract import Contract, Method
from rollcall.jsonrpc.errors import DeadlineExceededError, RemoteError, UnavailableError
from rollcall.policy import Policy
from rollcall.registry import Instance, Registry

T = TypeVar("T")
log = logging.getLogger(__name__)

answered_by: ContextVar[str] = ContextVar("rollcall_answered_by", default="")
"""The id of the instance that has answered the last dialled call of this task; empty before there was one."""

RECONNECT = (0.1, 1.0)  # seconds: the first and the longest pause between two attempts to connect to an instance
RETRY = (0.025, 0.25)  # the same, before a call that may have run is made again
OUTLIER = 5
"""Calls in a row that an instance must have failed to be ejected."""
EJECTION_STEPS = 3
"""How often the time of an instance's ejection doubles until it is the longest."""

_CALLER = uuid.uuid4().hex


@asynccontextmanager
async def dial(
    contract: Contract[T], *, name: str = "", tag: str = "", registry: Registry | None = None, **settings: Any
) -> AsyncIterator[T]:
    """Yield the methods of a contract, called at the passing instances of a service.

        async with jsonrpc.dial(HELLO) as hello:
            print(await hello.HelloWorld("李白"))

    The service is the one of the contract's name, or of `name`; instances are looked up in `registry` (default: Consul
    as the environment says), with a tag only those that have it. Raises `BadSettingError`. A call raises a
    `JsonRpcError`: see `rollcall.jsonrpc.errors`.

    `settings` are those of `CallSettings`. Of these `failure_percent` means something else than for gRPC: 0 turns
    ejection off, and with any other value an instance is ejected after five failures in a row. A failure is an error as
    the answer, no answer by the deadline, or a connection that breaks. Instances' weights are not looked at.
    """
    pool = _Pool(name or contract.name, tag, registry or default_registry(), Policy(settings))
    try:
        yield client(contract, pool.call)
    finally:
        pool.close()


class _Pool:
    """The instances of a service, and the calls that are made at them."""

    def __init__(self, name: str, tag: str, registry: Registry, policy: Policy) -> None:
        self._name, self._policy = name, policy
        self._members: dict[tuple[str, str], _Member] = {}
        self._known = self._closed = False
        self._turn = 0
        self._in_flight = 0
        self._changed = asyncio.Event()  # replaced each time it is set
        loop = asyncio.get_running_loop()

        def on_change(instances: tuple[Instance, ...]) -> None:  # on a thread of the membership's
            loop.call_soon_threadsafe(self._update, instances)

        self._membership = Membership(name, tag, registry, policy, _CALLER, on_change)

    def close(self) -> None:
        """Close all connections. Calls in flight fail, as do those that are made later."""
        self._membership.close()
        self._closed = True
        for member in self._members.values():
            member.close(gently=False)
        self._announce()

    async def call(self, method: Method, argument: Any) -> Any:
        """Make a call at one of the instances and, where that is safe, at another when it breaks."""
        request = method.request(argument)
        if self._in_flight >= self._policy.settings.max_requests:
            raise UnavailableError(f"{method.path}: {self._in_flight} calls to {self._name!r} are in flight already")
        seconds = time_for(self._policy.settings.deadline)
        problems: list[str] = []
        self._in_flight += 1
        try:
            async with asyncio.timeout(seconds) as deadline:
                return await self._attempts(method, request, problems, deadline)
        except TimeoutError:
            found = problems or [member.problem for member in self._members.values() if member.problem]
            why = f": {found[-1]}" if found else ""
            raise DeadlineExceededError(f"{method.path} was not answered in {seconds:.3g} s{why}") from None
        finally:
            self._in_flight -= 1

    async def _attempts(self, method: Method, request: bytes, problems: list[str], deadline: asyncio.Timeout) -> Any:
        """Call until there is an answer; `problems` gets what went wrong on the way."""
        tried: set[_Member] = set()
        retries = 0
        while True:
            member, connection = await self._next(tried)
            tried.add(member)
            try:
                return await self._try(member, connection, method, request, deadline)
            except UnavailableError as error:
                problems.append(str(error))
                if not error.may_have_run:  # as good as new, elsewhere
                    continue
                if not method.idempotent:
                    raise UnavailableError(f"{method.path} may have run: {error}", may_have_run=True) from None
                if retries >= self._policy.settings.retries:
                    raise UnavailableError(f"{method.path}, tried {retries + 1} times: {error}") from None
                await asyncio.sleep(_pause(RETRY, retries))
                retries += 1

    async def _try(
        self, member: "_Member", connection: Connection, method: Method, request: bytes, deadline: asyncio.Timeout
    ) -> Any:
        """Call an instance, and count it for or against the instance how that ends."""
        try:
            result = await connection.call(method, request)
        except RemoteError:
            answered_by.set(member.instance.id)
            self._count_failure(member)
            raise
        except UnavailableError as error:
            if error.may_have_run and not connection.leaving:  # to go, and to say so, is no failure
                self._count_failure(member)
            raise
        except asyncio.CancelledError:
            if deadline.expired():  # else the caller has given the call up
                self._count_failure(member)
            raise
        answered_by.set(member.instance.id)
        member.failures = member.ejections = 0
        return result

    async def _next(self, tried: "set[_Member]") -> "tuple[_Member, Connection]":
        """Return an instance to call, with its connection. Waits while there are instances but none is connected."""
        while True:
            if self._closed:
                raise UnavailableError(f"the channel to {self._name!r} is closed")
            now = time.monotonic()
            usable = [(each, each.connection) for each in self._members.values() if each.connection]
            usable = [(each, connection) for each, connection in usable if connection.usable]
            fit = [pair for pair in usable if pair[0].ejected_until <= now]
            if best := [pair for pair in fit if pair[0] not in tried] or fit or usable:
                first = min(each.instance.priority for each, _ in best)
                best = [pair for pair in best if pair[0].instance.priority == first]
                self._turn += 1
                return best[self._turn % len(best)]
            if self._known and not self._members:
                raise UnavailableError(await asyncio.to_thread(self._membership.explanation))
            await self._changed.wait()

    def _count_failure(self, member: "_Member") -> None:
        """Eject an instance that has only failed of late, unless too many are ejected already."""
        settings, now = self._policy.settings, time.monotonic()
        member.failures += 1
        if member.failures < OUTLIER or member.ejected_until > now or not settings.failure_percent:
            return
        ejected = sum(each.ejected_until > now for each in self._members.values())
        if len(self._members) > 1 and 100 * ejected < settings.ejection_percent * len(self._members):
            member.ejected_until = now + settings.ejection / 2 ** max(0, EJECTION_STEPS - member.ejections)
            member.ejections += 1
            member.failures = 0
            log.info("%s is ejected: %d calls in a row have failed there", member.instance.id, OUTLIER)

    def _update(self, instances: tuple[Instance, ...]) -> None:
        """Take over who is there to be called."""
        if self._closed:
            return
        before, self._members = self._members, {}
        for instance in instances:
            key = (instance.id, instance.target)  # under an old id at a new address, it is another process
            self._members[key] = before.pop(key) if key in before else _Member(instance, self._announce)
        for gone in before.values():
            gone.close(gently=True)
        self._known = True
        self._announce()

    def _announce(self) -> None:
        """Have the calls that wait for an instance look again."""
        self._changed.set()
        self._changed = asyncio.Event()


class _Member:
    """An instance, and the connection to it, which is made again whenever it is lost."""

    def __init__(self, instance: Instance, on_connected: Callable[[], None]) -> None:
        self.instance = instance
        self.connection: Connection | None = None
        self.problem = ""
        """Why there is no connection."""
        self.failures = 0
        """Calls in a row that it has answered with an error, or not at all."""
        self.ejections = 0
        self.ejected_until = 0.0
        self._on_connected = on_connected
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def close(self, *, gently: bool) -> None:
        """Give the connection up, at once or when the calls in flight are over."""
        self._keeper.cancel()
        if self.connection:
            self.connection.close(gently=gently)

    async def _keep(self) -> None:
        attempts = 0
        while True:
            try:
                self.connection = await Connection.open(self.instance.target)
            except UnavailableError as error:
                self.problem = str(error)
            else:
                begun = time.monotonic()
                self._on_connected()
                self.problem = await self.connection.lost
                self.connection = None
                if time.monotonic() - begun > RECONNECT[1]:  # else it was accepted only to be closed
                    attempts = 0
            await asyncio.sleep(_pause(RECONNECT, attempts))
            attempts += 1


def _pause(bounds: tuple[float, float], before: int) -> float:
    """Return the seconds to wait after so many waits before: twice as long each time, and spread."""
    longest: float = min(bounds[0] * 2 ** min(before, 10), bounds[1])
    return longest * random.uniform(0.5, 1)  # noqa: S311 (spreads attempts, guards nothing)

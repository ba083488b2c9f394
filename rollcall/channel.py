"""`dial`: a channel to whatever instances a service has at the moment.

The channel is gRPC's own, on an `xds:` target that `rollcall.discovery` keeps supplied: balancing, retries, ejection
and circuit breaking happen in the C core. What is added here to each call are its default deadline and its trace.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import MethodOptions

from rollcall import context
from rollcall.discovery import xds
from rollcall.discovery.bridge import Service, bridge
from rollcall.policy import Policy
from rollcall.registry import Registry
from rollcall.settings import RegistrySettings, load

OPTIONS = (
    # An instance that restarts is called again sooner than after gRPC's usual second to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def dial(name: str, *, tag: str = "", registry: Registry | None = None, **settings: Any) -> "Channel":
    """Return a grpc.aio channel to the passing instances of a service; any generated stub takes it.

        async with rollcall.dial("sum") as channel:
            reply = await SumServiceStub(channel).Add(AddRequest(num1=333, num2=666))

    Instances are looked up in `registry` (default: Consul as the environment says), with a tag only those that have it.
    `settings` are those of `CallSettings`, each with its ROLLCALL_ environment variable. A service without instances
    fails its calls with UNAVAILABLE and says what was looked for and what is registered. Raises `BadSettingError`.
    """
    return Channel(_subscribe(name, tag, registry, settings))


def dial_sync(name: str, *, tag: str = "", registry: Registry | None = None, **settings: Any) -> "SyncChannel":
    """Return the same channel for callers without asyncio: a grpc.Channel for ordinary stubs. See `dial`."""
    return SyncChannel(_subscribe(name, tag, registry, settings))


@cache
def default_registry() -> Registry:
    """Return the registry that the environment describes, one for the process."""
    return load(RegistrySettings).open_registry()


def _subscribe(name: str, tag: str, registry: Registry | None, settings: dict[str, Any]) -> Service:
    if not name:
        raise ValueError("expected the name of a service to dial; found an empty string")
    return bridge().subscribe(name, tag, registry or default_registry(), Policy(settings))


def _is_idempotent(path: str) -> bool:
    """Say whether the proto of a method, given as /package.Service/Method, allows to run it more than once."""
    try:
        method = descriptor_pool.Default().FindMethodByName(path.strip("/").replace("/", "."))
    except KeyError:  # a method called without its generated code
        return False
    level = method.GetOptions().idempotency_level
    return level in (MethodOptions.NO_SIDE_EFFECTS, MethodOptions.IDEMPOTENT)


class _Metadata(grpc.aio.Metadata):
    """Metadata of a call, as grpc.aio reads them: once, from front to back.

    Its own class files them in an ordered dictionary first, which costs a few hundredths of a cheap call.
    """

    def __init__(self, *pairs: tuple[str, str | bytes]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[tuple[str, str | bytes]]:
        return iter(self._pairs)


_METHOD = re.compile(r"/[^/]+/[^/]+")
_POSITIONS = ("timeout", "metadata", "credentials", "wait_for_ready", "compression")


class _Method:
    """A method of a stub, of any of the four kinds: fills in what a call was not given, and makes it."""

    __slots__ = ("_asynchronous", "_method", "_policy")

    def __init__(self, method: Any, policy: Policy | None, *, asynchronous: bool) -> None:
        self._method = method
        self._policy = policy
        self._asynchronous = asynchronous

    def __call__(self, *request: Any, **arguments: Any) -> Any:
        request = self._complete(request, arguments)
        return self._method(*request, **arguments)

    def with_call(self, *request: Any, **arguments: Any) -> Any:
        """Make the call and return the answer with the call itself; of sync channels only."""
        request = self._complete(request, arguments)
        return self._method.with_call(*request, **arguments)

    def future(self, *request: Any, **arguments: Any) -> Any:
        """Start the call and return a future; of sync channels only."""
        request = self._complete(request, arguments)
        return self._method.future(*request, **arguments)

    def _complete(self, request: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[Any, ...]:
        if len(request) > 1:  # gRPC takes the others by position as well
            arguments.update(zip(_POSITIONS, request[1:], strict=False))
            request = request[:1]
        timeout = arguments.get("timeout")
        if timeout is None and self._policy:
            timeout = self._policy.settings.deadline
        call = context.current.get()
        if call is not None:  # this one is made for another: it gets no more time, and belongs to the same trace
            left = call.remaining()
            if left is not None:
                timeout = left if timeout is None else min(timeout, left)
            pairs = tuple(arguments.get("metadata") or ())
            if all(key != context.TRACEPARENT for key, _ in pairs):
                pairs = (*pairs, (context.TRACEPARENT, context.outgoing(call)))
            arguments["metadata"] = _Metadata(*pairs) if self._asynchronous else pairs
        arguments["timeout"] = timeout
        if arguments.get("wait_for_ready") is None:
            # A call that has reached no server yet can still be sent to any: it waits for one until its deadline.
            arguments["wait_for_ready"] = timeout is not None
        return request


class _Dialled:
    """What both kinds of channel share: each method of a stub is made on gRPC's channel and wrapped."""

    def __init__(self, service: Service, make: Callable[..., Any]) -> None:
        self._service = service
        self._released = False
        try:
            self._channel = make(f"xds://{xds.AUTHORITY}/{service.key}", options=OPTIONS)
        except BaseException:
            self._release()
            raise

    def unary_unary(self, method: str, *serializers: Any, **named: Any) -> Any:
        return self._wrap("unary_unary", method, serializers, named, self._service.policy)

    def stream_unary(self, method: str, *serializers: Any, **named: Any) -> Any:
        return self._wrap("stream_unary", method, serializers, named, self._service.policy)

    # An answer that streams may go on for as long as its caller likes: no default deadline.

    def unary_stream(self, method: str, *serializers: Any, **named: Any) -> Any:
        return self._wrap("unary_stream", method, serializers, named, None)

    def stream_stream(self, method: str, *serializers: Any, **named: Any) -> Any:
        return self._wrap("stream_stream", method, serializers, named, None)

    def idempotent(self, method: str) -> None:
        """Allow that a method, given as /package.Service/Method, is tried again: see `CallSettings.retries`.

        For callers without its generated code, whose proto would say so. The channel may be in use already: calls made
        from now on are tried again as soon as gRPC has heard of it, a few milliseconds later. Raises ValueError.
        """
        if not _METHOD.fullmatch(method):
            raise ValueError(f"expected a method as /package.Service/Method, found {method!r}")
        self._service.idempotent(method)

    def _wrap(
        self, kind: str, method: str, serializers: tuple[Any, ...], named: dict[str, Any], policy: Policy | None
    ) -> Any:
        if _is_idempotent(method):
            self._service.idempotent(method)
        made = getattr(self._channel, kind)(method, *serializers, **named)
        return _Method(made, policy, asynchronous=isinstance(self._channel, grpc.aio.Channel))

    def _release(self) -> None:
        if not self._released:
            self._released = True
            bridge().release(self._service)


class Channel(_Dialled, grpc.aio.Channel):
    """A grpc.aio channel to a service. See `dial`."""

    def __init__(self, service: Service) -> None:
        super().__init__(service, grpc.aio.insecure_channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        try:
            await self._channel.close(grace)
        finally:
            self._release()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 (gRPC's)
        state: grpc.ChannelConnectivity = self._channel.get_state(try_to_connect)
        return state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()


class SyncChannel(_Dialled, grpc.Channel):
    """A grpc.Channel to a service. See `dial_sync`."""

    def __init__(self, service: Service) -> None:
        super().__init__(service, grpc.insecure_channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()
        self._release()

    def subscribe(self, callback: Any, try_to_connect: bool | None = False) -> None:  # noqa: FBT001, FBT002 (gRPC's)
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

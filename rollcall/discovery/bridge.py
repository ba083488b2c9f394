"""The xDS server inside each process: it turns watches on the registry into what gRPC's C core balances over.

gRPC Python has no resolver that could be plugged in, and round robin over a fixed list never learns of an instance that
is added. xDS is the one way to change a channel's endpoints while it lives; so there is a small aggregated discovery
service (ADS) on a unix socket of this process, and the C core subscribes to it.

Everything here runs on threads of its own: an event loop that the application blocks must not stop discovery.
"""

import itertools
import json
import logging
import os
import queue
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from envoy.service.discovery.v3.ads_pb2_grpc import (
    AggregatedDiscoveryServiceServicer,
    add_AggregatedDiscoveryServiceServicer_to_server,
)
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from google.protobuf.message import Message

from rollcall.discovery import xds
from rollcall.discovery.membership import Membership
from rollcall.policy import Policy
from rollcall.registry import Instance, Registry
from rollcall.threads import DaemonThreads

log = logging.getLogger(__name__)

EXPLAINED_WITHIN = 15.0  # seconds that the registry may take to say what there is
LINGER = 2.0  # seconds in which the C core hears of a change, and sends its calls elsewhere


class Bridge:
    """The xDS server, and the services that this process has dialled. One per process: see `bridge`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._services: dict[str, Service] = {}
        self._streams: set[queue.SimpleQueue[str | None]] = set()
        self._caller = uuid.uuid4().hex
        self._numbers, self._versions = itertools.count(1), itertools.count(1)
        address = _socket_address()
        # The discovery stream lasts as long as the process, which has to end.
        self._server = grpc.server(DaemonThreads(thread_name_prefix="xds"))
        add_AggregatedDiscoveryServiceServicer_to_server(_Ads(self), self._server)
        self._server.add_insecure_port(address)
        self._server.start()
        _bootstrap(address)

    def subscribe(self, name: str, tag: str, registry: Registry, policy: Policy) -> "Service":
        """Return the service to make a channel for, watched from now on. To be released when the channel is closed."""
        with self._lock:
            for service in self._services.values():
                if service.channels and service.is_for(name, tag, registry, policy):
                    break
            else:
                # A key of its own: the C core may still know a former service of this name, and call where that was.
                key = f"{xds.key_of(name, tag)}~~~{next(self._numbers)}"
                service = Service(key, name, tag, registry, policy, self._caller, self._changed)
                self._services[key] = service
            service.channels += 1
            return service

    def release(self, service: "Service") -> None:
        """End the watch when the last channel is closed."""
        with self._lock:
            service.channels -= 1
            last = not service.channels
            if last and not service.asked:
                del self._services[service.key]
        if last:
            service.close()  # what is known of it goes on being told until the C core has let go of it: see `forget`

    def forget(self, names: set[str]) -> None:
        """Drop the services without channels whose Listener is not among those that the C core still asks for."""
        with self._lock:
            for key, service in list(self._services.items()):
                if not service.channels and xds.resource_name(xds.LISTENER, key) not in names:
                    del self._services[key]

    def answer(self, type_url: str, names: set[str]) -> DiscoveryResponse:
        """Return all that is known of the resources with these names."""
        with self._lock:
            wanted = [service for key, service in self._services.items() if xds.resource_name(type_url, key) in names]
            for service in wanted:
                service.asked = True
            version = str(next(self._versions))
        resources = [resource for service in wanted if (resource := service.resource(type_url))]
        return DiscoveryResponse(
            version_info=version, nonce=version, type_url=type_url, resources=map(xds.pack, resources)
        )

    def open_stream(self) -> "queue.SimpleQueue[str | None]":
        """Return a queue that gets the type of each resource that changes; None ends it."""
        changes: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with self._lock:
            self._streams.add(changes)
        return changes

    def close_stream(self, changes: "queue.SimpleQueue[str | None]") -> None:
        """Forget a stream's queue, and end it."""
        with self._lock:
            self._streams.discard(changes)
        changes.put(None)

    def _changed(self, type_url: str) -> None:
        with self._lock:
            for changes in self._streams:
                changes.put(type_url)


class Service:
    """A service that this process calls, and what is known of its instances."""

    def __init__(
        self,
        key: str,
        name: str,
        tag: str,
        registry: Registry,
        policy: Policy,
        caller: str,
        changed: Callable[[str], None],
    ) -> None:
        self.key, self.name, self.tag = key, name, tag
        self.registry, self.policy = registry, policy
        self.channels = 0
        self.asked = False  # whether the C core has asked for it; it does not before there is a call to make
        self._changed = changed
        self._idempotent: frozenset[str] = frozenset()
        self._localities: list[_Locality] | None = None  # None until there is something to tell
        self._explainer: _Explainer | None = None
        self._closed = False
        self._lock = threading.Lock()
        policy.on_change = self._treat_otherwise
        self._members = Membership(name, tag, registry, policy, caller, self._update)

    def is_for(self, name: str, tag: str, registry: Registry, policy: Policy) -> bool:
        """Say whether a channel that is dialled like this would have the same instances, and treat its calls alike."""
        wanted = (name, tag) == (self.name, self.tag) and registry is self.registry
        return wanted and self.policy.agrees_with(policy)

    def idempotent(self, path: str) -> None:
        """Learn that a method, given as /package.Service/Method, may be tried again."""
        with self._lock:
            if path in self._idempotent:
                return
            self._idempotent |= {path}
        self._changed(xds.LISTENER)

    def resource(self, type_url: str) -> Message | None:
        """Return a resource that describes the service, or None while it is not known."""
        found: Message | None = None
        with self._lock:
            if type_url == xds.LISTENER:
                found = xds.listener(self.key, self._idempotent, self.policy.settings)
            elif type_url == xds.CLUSTER:
                found = xds.cluster(self.key, self.policy.settings)
            elif type_url == xds.ENDPOINTS and self._localities is not None:
                found = xds.endpoints(self.key, self._localities)
        return found

    def close(self) -> None:
        """Stop watching."""
        self._members.close()
        with self._lock:
            self._closed = True
            self._explain(needed=False)

    def _treat_otherwise(self) -> None:
        self._changed(xds.LISTENER)
        self._changed(xds.CLUSTER)

    def _update(self, instances: tuple[Instance, ...]) -> None:
        localities = _localities(instances)
        with self._lock:
            if self._closed:
                return
            self._explain(needed=not localities)
            if localities:
                self._localities = localities
        self._changed(xds.ENDPOINTS)

    def _explanation(self) -> str:
        return self._members.explanation()  # asked for when a call has come in, by which time they are there

    def _explain(self, *, needed: bool) -> None:
        if needed and not self._explainer:
            self._explainer = _Explainer(self._explanation)
            self._localities = [("nowhere", [("127.0.0.1", self._explainer.port, 1)])]
        elif self._explainer and not needed:
            self._explainer.close()
            self._explainer = None


_Locality = tuple[str, list[tuple[str, int, int]]]


def _localities(instances: tuple[Instance, ...]) -> list[_Locality]:
    """Return the endpoints of instances by their priority: see `xds.endpoints`."""
    found: dict[int, _Locality] = {}
    taken = set()
    for instance in sorted(instances, key=lambda each: each.priority):
        endpoint = (instance.address, instance.port)
        # gRPC refuses a list that has an endpoint twice, as when an instance got the address of one that still passes.
        if endpoint not in taken:
            taken.add(endpoint)
            name = f"{instance.priority} {instance.datacenter}"
            found.setdefault(instance.priority, (name, []))[1].append((*endpoint, instance.weight))
    return list(found.values())


class _Explainer(grpc.GenericRpcHandler):
    """Stands in for a service without instances: answers every call with what was looked for, where, and what there is.

    The C core by itself would let a call wait until its deadline, and then say no more than that.
    """

    def __init__(self, explanation: Callable[[], str]) -> None:
        self._explanation = explanation
        self._closed = False
        self._server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[self], options=[("grpc.so_reuseport", 0)])
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":  # noqa: ARG002
        return grpc.stream_stream_rpc_method_handler(self._abort)

    def _abort(self, _: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        explanation = self._explanation()  # which asks the registry, and may take seconds
        if self._closed:
            context.abort(grpc.StatusCode.UNAVAILABLE, "instances have come while it was asked why there are none")
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "-1"),))  # trying again would be told the same
        context.abort(grpc.StatusCode.UNAVAILABLE, explanation)
        yield b""  # never reached: makes this the generator that a stream's handler has to be

    def close(self) -> None:
        """Explain no more; the calls that wait for that, and those on their way, are told to come again."""
        self._closed = True
        # Not at once: a call that comes to a server while it stops is not refused, but cancelled.
        stopping = threading.Timer(LINGER, self._server.stop, [EXPLAINED_WITHIN])
        stopping.daemon = True
        stopping.start()


class _Ads(AggregatedDiscoveryServiceServicer):  # type: ignore[misc]
    """The aggregated discovery service: each request names what a type is wanted for, each response has all of it."""

    def __init__(self, owner: Bridge) -> None:
        self._bridge = owner

    def StreamAggregatedResources(
        self, requests: Iterator[DiscoveryRequest], context: grpc.ServicerContext
    ) -> Iterator[DiscoveryResponse]:
        subscribed: dict[str, set[str]] = {}
        changes = self._bridge.open_stream()

        def read() -> None:
            try:
                for request in requests:
                    if request.error_detail.message:
                        log.error("gRPC refused %s: %s", request.type_url, request.error_detail.message)
                    elif subscribed.get(request.type_url) != set(request.resource_names):  # else it acknowledges
                        subscribed[request.type_url] = set(request.resource_names)
                        if request.type_url == xds.LISTENER:
                            self._bridge.forget(subscribed[request.type_url])
                        changes.put(request.type_url)
            except grpc.RpcError:  # how a stream ends that its client has dropped
                log.debug("the C core has closed its discovery stream")
            finally:
                self._bridge.close_stream(changes)

        threading.Thread(target=read, name="xds requests", daemon=True).start()
        context.add_callback(lambda: self._bridge.close_stream(changes))
        while type_url := changes.get():
            if subscribed.get(type_url):
                yield self._bridge.answer(type_url, subscribed[type_url])


_bridge: Bridge | None = None
_bridge_lock = threading.Lock()


def bridge() -> Bridge:
    """Return this process's bridge, started at the first call."""
    global _bridge  # noqa: PLW0603 (gRPC reads its bootstrap once per process, so there can be but one)
    with _bridge_lock:
        if _bridge is None:
            _bridge = Bridge()
        return _bridge


def _socket_address() -> str:
    unique = f"rollcall-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    if sys.platform == "linux":
        return f"unix-abstract:{unique}"
    return f"unix:{Path(tempfile.gettempdir()) / unique}"


def _bootstrap(address: str) -> None:
    """Tell the C core where its xDS server is, keeping what the user has told it (gRFCs A27 and A47)."""
    theirs = os.environ.pop("GRPC_XDS_BOOTSTRAP", "")  # a file, which would win over what is set below
    text = Path(theirs).read_text() if theirs else os.environ.get("GRPC_XDS_BOOTSTRAP_CONFIG", "{}")
    config = json.loads(text)
    ours = [{"server_uri": address, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}]
    config.setdefault("xds_servers", ours)
    config.setdefault("node", {"id": f"rollcall-{os.getpid()}"})
    config.setdefault("authorities", {})[xds.AUTHORITY] = {"xds_servers": ours}
    os.environ["GRPC_XDS_BOOTSTRAP_CONFIG"] = json.dumps(config)

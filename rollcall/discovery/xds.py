"""What gRPC's C core is told about a service, in the language it understands: xDS resources.

A Listener says which calls go to which Cluster, and which of them may be retried; a Cluster says how to balance over
its endpoints, when to eject one, and how many calls may be in flight; a ClusterLoadAssignment lists the endpoints.
Only what grpc.github.io/grpc/core/md_doc_grpc_xds_features.html lists as supported is used.

Pure functions: state is in `rollcall.discovery.bridge`.
"""

from collections.abc import Iterable
from urllib.parse import quote

from envoy.config.cluster.v3.circuit_breaker_pb2 import CircuitBreakers
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.cluster.v3.outlier_detection_pb2 import OutlierDetection
from envoy.config.core.v3.address_pb2 import Address, SocketAddress
from envoy.config.core.v3.base_pb2 import Locality
from envoy.config.core.v3.config_source_pb2 import AggregatedConfigSource, ApiVersion, ConfigSource
from envoy.config.endpoint.v3.endpoint_components_pb2 import Endpoint, LbEndpoint, LocalityLbEndpoints
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.api_listener_pb2 import ApiListener
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_components_pb2 import RetryPolicy, Route, RouteAction, RouteMatch, VirtualHost
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.http.router.v3.router_pb2 import Router
from envoy.extensions.filters.network.http_connection_manager.v3.http_connection_manager_pb2 import (
    HttpConnectionManager,
    HttpFilter,
)
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import UInt32Value

from rollcall.settings import CallSettings

AUTHORITY = "rollcall"
"""Resources are named under an authority of their own, so that a process may use another xDS server beside this one."""

_TYPE = "type.googleapis.com/envoy.config."
LISTENER = f"{_TYPE}listener.v3.Listener"
CLUSTER = f"{_TYPE}cluster.v3.Cluster"
ENDPOINTS = f"{_TYPE}endpoint.v3.ClusterLoadAssignment"


def key_of(name: str, tag: str = "") -> str:
    """Spell any service's name, and a tag, in characters that a URI carries unchanged: letters, digits and `-._~`."""
    plain = [quote(text, safe="").replace("~", "%7E").replace("%", "~") for text in (name, tag) if text]
    return "~~".join(plain)


def resource_name(type_url: str, key: str) -> str:
    """Return the name of the resource of this type that describes the service under this key."""
    return f"xdstp://{AUTHORITY}/{type_url.rpartition('/')[2]}/{key}"


def listener(key: str, idempotent: Iterable[str], settings: CallSettings) -> Listener:
    """Send every call to the service's cluster. `idempotent` are the paths of methods that may be tried again.

    A call that never left this process waits for a connection, and one that the server refused before it looked at it
    is sent again by the C core itself; neither needs a policy. A gRPC server that is asked to stop cancels what comes
    before its callers have heard of that.
    """
    retry = RetryPolicy(
        retry_on="cancelled,unavailable",
        num_retries=UInt32Value(value=settings.retries),
        retry_back_off=RetryPolicy.RetryBackOff(base_interval=duration(0.025), max_interval=duration(0.25)),
    )
    cluster_name = resource_name(CLUSTER, key)
    routes = [
        Route(match=RouteMatch(path=path), route=RouteAction(cluster=cluster_name, retry_policy=retry))
        for path in (sorted(idempotent) if settings.retries else ())
    ]
    routes.append(Route(match=RouteMatch(prefix=""), route=RouteAction(cluster=cluster_name)))
    manager = HttpConnectionManager(
        route_config=RouteConfiguration(name=key, virtual_hosts=[VirtualHost(name=key, domains=["*"], routes=routes)]),
        http_filters=[HttpFilter(name="router", typed_config=pack(Router()))],
    )
    return Listener(name=resource_name(LISTENER, key), api_listener=ApiListener(api_listener=pack(manager)))


def cluster(key: str, settings: CallSettings) -> Cluster:
    """Balance round robin over the endpoints; eject one whose calls fail while others' succeed (gRFC A50)."""
    return Cluster(
        name=resource_name(CLUSTER, key),
        type=Cluster.EDS,
        lb_policy=Cluster.ROUND_ROBIN,
        eds_cluster_config=Cluster.EdsClusterConfig(
            eds_config=ConfigSource(ads=AggregatedConfigSource(), resource_api_version=ApiVersion.V3),
            service_name=resource_name(ENDPOINTS, key),
        ),
        circuit_breakers=CircuitBreakers(
            thresholds=[CircuitBreakers.Thresholds(max_requests=UInt32Value(value=settings.max_requests))]
        ),
        outlier_detection=OutlierDetection(
            interval=duration(1),
            base_ejection_time=duration(settings.ejection / 2),
            max_ejection_time=duration(settings.ejection),
            max_ejection_percent=UInt32Value(value=settings.ejection_percent),
            failure_percentage_threshold=UInt32Value(value=settings.failure_percent),
            enforcing_failure_percentage=UInt32Value(value=100),
            failure_percentage_minimum_hosts=UInt32Value(value=2),
            failure_percentage_request_volume=UInt32Value(value=5),
        )
        if settings.failure_percent
        else None,
    )


def endpoints(key: str, localities: Iterable[tuple[str, Iterable[tuple[str, int, int]]]]) -> ClusterLoadAssignment:
    """List the endpoints, each as address, port and weight, of each locality, given by its name.

    Those of a locality are called while none of an earlier one can be reached. gRPC refuses priorities with a gap, so
    there must be no locality without endpoints; by its name it knows one again whose priority has changed.
    """
    return ClusterLoadAssignment(
        cluster_name=resource_name(ENDPOINTS, key),
        endpoints=[
            LocalityLbEndpoints(
                locality=Locality(region=name),
                priority=priority,
                load_balancing_weight=UInt32Value(value=1),
                lb_endpoints=[
                    LbEndpoint(
                        endpoint=Endpoint(
                            address=Address(socket_address=SocketAddress(address=address, port_value=port))
                        ),
                        load_balancing_weight=UInt32Value(value=weight),
                    )
                    for address, port, weight in targets
                ],
            )
            for priority, (name, targets) in enumerate(localities)
        ],
    )


def pack(message: Message) -> Any:
    """Wrap a message with its type."""
    packed = Any()
    packed.Pack(message)
    return packed


def duration(seconds: float) -> Duration:
    """Return seconds as protobuf has them."""
    whole = int(seconds)
    return Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))

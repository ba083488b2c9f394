"""The registry that Kubernetes keeps: who is behind its Services, as its EndpointSlices tell.

For clusters without Consul. There is nothing to run beside the cluster, and nothing for an instance to do: it is
registered when its pod is ready, and gone when that is not, or about to go. What that costs:

- What passes is the kubelet's to find out, by the pod's readiness probe. The check that an instance registers with is
  not made, and `register` cannot fail, for Kubernetes alone says who is listed.
- An id is a pod's name. A registration is removed by deleting the pod.
- A name can be what a label's value can be (at most 63 of A-Z, a-z, 0-9, -, _ and .), and all are of one namespace.
- An instance has no version and no weight, and of what it wants to tell there is what its Service says in labels.
- It keeps no keys, and there are no datacenters.

A Service is known here by the label `rollcall/service`, whose value is the name to dial. `tag.rollcall/NAME` gives
its instances a tag, and `calls.rollcall/NAME` says that they call a service. What is looked at are its
EndpointSlices: those of a Service that selects its pods have its labels (setEndpointSliceLabels, in
k8s.io/endpointslice), and those that somebody makes by hand need them too. Its TCP port named grpc, jsonrpc or http,
in this order, else the first of another name in the alphabet's, is where instances are called, and `metrics` is where
their probes are. Whoever looks up needs to get, list and watch endpointslices in that namespace, and nothing else.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlsplit

import requests

from rollcall import clocks
from rollcall.registry import Check, Instance, RegistryError, RegistryUnavailableError, http, target

T = TypeVar("T")
log = logging.getLogger(__name__)

SERVICE = "rollcall/service"
TAG = "tag.rollcall/"
CALLS = "calls.rollcall/"
METRICS = "metrics"
PROTOCOLS = ("grpc", "jsonrpc", "http")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""What a label's value, and the latter part of its name, can be."""
NOBODY = f"{SERVICE},!{SERVICE}"
"""A selector that nothing can meet."""

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds who it is: https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CONNECT_TIMEOUT = 2.0  # seconds
ANSWER_TIMEOUT = 5.0  # seconds, on top of what a watch asks the server to wait
WATCH_WAIT = 10  # seconds; bounds how long a server that hangs can keep a watch in the dark
CONFIRM_WAIT = 1.0  # seconds
AT_ONCE = 1.0  # seconds; an answer to a watch that ends sooner, and tells nothing, is none

Slices = Mapping[str, Any]
"""EndpointSlices by their uid."""


class _AwayError(RegistryUnavailableError):
    """The server has not answered, or has no time now: the same question again is a good one."""


class _ExpiredError(RegistryError):
    """What has happened since is not known to the server any more: ask for what there is."""


class KubernetesRegistry:
    """A `Registry` of the Services in one namespace, by the API server's account.

    `api` is the server's URL and `namespace` where to look; by default both are those of the pod that this runs in,
    whose token is read anew at each request, for it is replaced now and then; it is sent by https, or to this machine
    itself, alone. Elsewhere, `kubectl proxy` gives an address. Raises ValueError for what cannot be one, and where
    there is none to be found.

        registry = KubernetesRegistry("http://127.0.0.1:8001", "default")
        registry.instances("sum")
    """

    def __init__(self, api: str = "", namespace: str = "", account: Path = ACCOUNT) -> None:
        self._where = (_url(api or own_api()), namespace, account)
        self._api = _Api(*self._where)
        self._own: dict[str, threading.Event] = {}

    def __str__(self) -> str:
        return str(self._api)

    def register(self, instance: Instance, check: Check, *, passing: bool = False) -> None:  # noqa: ARG002 (the kubelet checks)
        self._own[instance.id] = threading.Event()

    def confirm(self, instance: Instance) -> bool:
        gone = self._own.get(instance.id)
        return gone is not None and not gone.wait(CONFIRM_WAIT)

    def deregister(self, instance_id: str) -> None:
        if instance_id in self._own:
            self._own[instance_id].set()
        elif any(each.id == instance_id for each in _instances(self._list(_selector()), failing=True)):
            raise RegistryError(
                f"{instance_id} is registered by Kubernetes, for as long as its pod is there: "
                f"kubectl delete pod {instance_id}"
            )

    def instances(
        self, name: str, tag: str = "", *, failing: bool = False, certain: bool = False
    ) -> tuple[Instance, ...]:
        return _instances(self._list(_selector(name, tag), certain=certain), failing=failing)

    def services(self) -> tuple[str, ...]:
        return _names(self._list(_selector()))

    def diagnose(self) -> tuple[str, ...]:
        asked = time.time()
        try:
            date = self._api.list(NOBODY)[2]
            problem = clocks.complaint(str(self), clocks.apart(date, asked, time.time()))
        except (RegistryError, ValueError) as error:
            problem = str(error)
        return (problem,) if problem else ()

    def watch(self, name: str, tag: str = "", *, failing: bool = False) -> "KubernetesWatch[tuple[Instance, ...]]":
        return self._watch(repr(name), _selector(name, tag), lambda slices: _instances(slices, failing=failing))

    def watch_services(self, tag: str = "") -> "KubernetesWatch[tuple[str, ...]]":
        return self._watch("the names of services", _selector(tag=tag), _names)

    def _watch(self, what: str, selector: str, answer: Callable[[Slices], T]) -> "KubernetesWatch[T]":
        return KubernetesWatch(_Api(*self._where), what, selector, answer)  # it has a connection of its own

    def _list(self, selector: str, *, certain: bool = False) -> Slices:
        return self._api.list(selector, certain=certain)[1]


class KubernetesWatch(Generic[T]):
    """A `Watch` by the API server's own: a list, and then each change since.

    https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
    """

    def __init__(self, api: "_Api", what: str, selector: str, answer: Callable[[Slices], T]) -> None:
        self._api, self._what, self._selector, self._answer = api, what, selector, answer
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[T]:
        seen: T | None = None
        failures, known = 0, _Known()
        while not self._closed.is_set():
            asked = time.monotonic()
            try:
                for slices in self._follow(known):
                    failures = 0
                    found = self._answer(slices)
                    if self._closed.is_set():
                        return
                    if found != seen:
                        seen = found
                        yield found
                if time.monotonic() - asked > AT_ONCE:
                    failures = 0
                    continue
            except RegistryError as error:
                if not isinstance(error, _AwayError):
                    known.version = ""  # that is no good any more, or what was made of it
                if not failures and not isinstance(error, _ExpiredError):  # said once, until an answer comes
                    log.warning("%s: nothing is heard of %s; keeping what is known", error, self._what)
            self._closed.wait(http.pause(failures))
            failures += 1

    def close(self) -> None:
        self._closed.set()

    def _follow(self, known: "_Known") -> Iterator[Slices]:
        """Yield what there is, and after each change; return when the server ends its answer."""
        if not known.version:
            # The first answer may come from what the server remembers; after that, nothing older than what was known.
            known.version, listed, _ = self._api.list(self._selector, certain=known.listed)
            known.slices, known.listed = dict(listed), True
            yield known.slices
        for event in self._api.changes(self._selector, known.version):
            known.take(event)
            yield known.slices


class _Known:
    """What a watch knows, and as of when."""

    version = ""
    """The server's word for that; empty where everything is to be asked for."""
    listed = False

    def __init__(self) -> None:
        self.slices: dict[str, Any] = {}

    def take(self, event: Any) -> None:
        """Take over a change. Raises `RegistryError` when the server says that it has none to tell."""
        try:
            kind, found = event["type"], event["object"]
            if kind == "ERROR":
                gone = found["code"] == requests.codes.gone
                raise (_ExpiredError if gone else RegistryUnavailableError)(f"{found['code']} {found['message']}")
            metadata = found["metadata"]
            if kind == "DELETED":
                self.slices.pop(metadata["uid"], None)
            elif kind in ("ADDED", "MODIFIED"):
                self.slices[metadata["uid"]] = found
            self.version = metadata["resourceVersion"]  # a BOOKMARK has nothing else to say
        except (KeyError, TypeError, AttributeError) as error:
            raise _not_kubernetes(error) from None


class _Api:
    """The API server, as far as it tells of EndpointSlices in a namespace."""

    def __init__(self, url: str, namespace: str, account: Path) -> None:
        self._url, self._namespace, self._account = url, namespace, account
        self._session = requests.Session()
        self._session.trust_env = False  # a ~/.netrc would come in the token's place
        parts = urlsplit(url)
        self._may_be_told_the_token = parts.scheme == "https" or parts.hostname in LOOPBACK

    def __str__(self) -> str:
        return f"Kubernetes at {self._url}"

    def list(self, selector: str, *, certain: bool = False) -> tuple[str, Slices, str]:
        """Return the version, the EndpointSlices, and the server's date.

        When `certain`, as a quorum of etcd has it; else as the server remembers it.
        """
        params = {"labelSelector": selector, **({} if certain else {"resourceVersion": "0"})}
        with closing(self._get(params, stream=False, timeout=ANSWER_TIMEOUT)) as answer:
            try:
                said = answer.json()
                slices = {each["metadata"]["uid"]: each for each in said["items"]}
                return str(said["metadata"]["resourceVersion"]), slices, answer.headers.get("Date", "")
            except (KeyError, TypeError, ValueError) as error:
                raise _not_kubernetes(error) from None

    def changes(self, selector: str, version: str) -> Iterator[Any]:
        """Yield the changes since a version, as they happen, for `WATCH_WAIT` seconds."""
        params = {
            "labelSelector": selector,
            "resourceVersion": version,
            "watch": "1",
            "allowWatchBookmarks": "1",
            "timeoutSeconds": str(WATCH_WAIT),
        }
        with closing(self._get(params, stream=True, timeout=WATCH_WAIT + ANSWER_TIMEOUT)) as answer:
            try:
                for line in answer.iter_lines(chunk_size=None):
                    if line:
                        yield json.loads(line)
            except requests.RequestException as error:
                raise _AwayError(f"{self}: {http.reason(error)}") from None
            except ValueError as error:
                raise _not_kubernetes(error) from None

    def _get(self, params: Mapping[str, str], *, stream: bool, timeout: float) -> requests.Response:
        ca = self._account / "ca.crt"
        try:
            file = self._account / "token"
            token = http.token_from(file) if self._may_be_told_the_token and file.exists() else ""
            namespace = self._namespace or self._read("namespace")
            if not namespace:
                raise RegistryError(
                    f"{self}: expected a namespace to look in: name one, or run in a pod that has the token of a "
                    f"ServiceAccount"
                )
            answer = self._session.get(
                f"{self._url}/apis/discovery.k8s.io/v1/namespaces/{quote(namespace, safe='')}/endpointslices",
                params=params,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                verify=str(ca) if ca.exists() else True,
                timeout=(CONNECT_TIMEOUT, timeout),
                stream=stream,
                allow_redirects=False,  # which would take the token along
            )
        except requests.RequestException as error:
            raise _AwayError(f"{self}: {http.reason(error)}") from None
        except (OSError, UnicodeDecodeError) as error:  # one of the account's files
            raise RegistryError(f"{self}: {error}") from None
        if answer.status_code == requests.codes.ok:
            return answer
        with closing(answer):
            said = f"{self}: {answer.status_code} {_message(answer)}"
        if answer.status_code == requests.codes.gone:
            raise _ExpiredError(said)
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            raise RegistryError(
                f"{said}: has the pod the token of a ServiceAccount that may get, list and watch endpointslices in "
                f"the namespace {namespace}?"
            )
        if answer.status_code == requests.codes.too_many or answer.status_code >= requests.codes.server_error:
            raise _AwayError(said)
        raise RegistryError(said)

    def _read(self, name: str) -> str:
        """Return what a file of the account says, nothing where there is none."""
        try:
            return (self._account / name).read_text().strip()
        except FileNotFoundError:
            return ""


def _not_kubernetes(error: Exception) -> RegistryUnavailableError:
    return RegistryUnavailableError(f"what answers does not answer as Kubernetes does ({error!r})")


def _message(answer: requests.Response) -> str:
    """Return what an answer that is an error says of itself."""
    try:
        return str(answer.json()["message"])[:200]
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return answer.reason or ""


def own_api() -> str:
    """Return the API server's URL as each container is told. Raises ValueError where there is none."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ValueError(
            "expected to run in a pod, or the URL of Kubernetes' API, such as http://127.0.0.1:8001 of kubectl proxy"
        )
    return f"https://{target(host, int(port))}"


def _url(api: str) -> str:
    parts = urlsplit(api)
    try:
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ValueError(
            f"expected the URL of Kubernetes' API, such as http://127.0.0.1:8001; found {api.rpartition('@')[2]!r}"
        )
    return api.rstrip("/")


def _selector(name: str = "", tag: str = "") -> str:
    """Return the label selector for the EndpointSlices of a service, or of all; with a tag, of those that have it."""
    if not all(LABEL.fullmatch(each) for each in (name, tag) if each):
        return NOBODY  # no label can say that
    chosen = [f"{SERVICE}={name}" if name else SERVICE, *([TAG + tag] if tag else [])]
    return ",".join(chosen)


def _names(slices: Slices) -> tuple[str, ...]:
    """Return the names of the services that have an instance, passing or not."""
    return tuple(sorted({each.name for each in _instances(slices, failing=True)}))


def _instances(slices: Slices, *, failing: bool) -> tuple[Instance, ...]:
    """Return the instances that are in EndpointSlices, by id; with `failing` also those that do not pass."""
    found: dict[tuple[str, str], tuple[tuple[bool, bool], Instance]] = {}
    for each in slices.values():
        for endpoint in each.get("endpoints") or ():
            try:
                instance = _instance(each, endpoint)
            except (ValueError, LookupError, TypeError, AttributeError) as error:  # others' may be anything
                metadata = each.get("metadata", {})
                _left_out(metadata.get("name"), metadata.get("resourceVersion"), repr(error))
                continue
            # A pod that has addresses of both families is in two slices: it is called by the one, whatever passes. And
            # while Kubernetes moves it from one slice to another it can be in both, of which one is of old.
            rank = (each["addressType"] == "IPv4", instance.passing)
            key = (instance.name, instance.id)
            if key not in found or rank > found[key][0]:
                found[key] = (rank, instance)
    return tuple(instance for _, (_, instance) in sorted(found.items()) if failing or instance.passing)


@lru_cache(maxsize=1000)
def _left_out(name: object, version: object, problem: str) -> None:
    """Say what is left out of an EndpointSlice; once, until that changes."""
    log.warning("left out of the EndpointSlice %s at its version %s: %s", name, version, problem)


def _instance(found: Any, endpoint: Any) -> Instance:
    """Return what stands in an EndpointSlice as an instance."""
    if found["addressType"] not in ("IPv4", "IPv6"):
        raise ValueError(f"expected IP addresses, found {found['addressType']}")
    ports = {
        each.get("name") or "": each["port"]
        for each in found.get("ports") or ()
        if each.get("port") and each.get("protocol", "TCP") == "TCP"
    }
    protocol = next((each for each in PROTOCOLS if each in ports), "")
    others = sorted(name for name in ports if name != METRICS)
    if not others:
        raise ValueError(f"expected a TCP port beside {METRICS}, found {', '.join(ports) or 'none'}")
    labels = found["metadata"]["labels"]
    conditions = endpoint.get("conditions") or {}
    pod = endpoint.get("targetRef") or {}
    address, port = endpoint["addresses"][0], ports[protocol or others[0]]
    meta = {
        "calls": ",".join(sorted(label.removeprefix(CALLS) for label in labels if label.startswith(CALLS))),
        "http_port": str(ports.get(METRICS, "")),
        "node": endpoint.get("nodeName") or "",
        "protocol": protocol,
        "zone": endpoint.get("zone") or "",
    }
    return Instance(
        id=pod["name"] if pod.get("kind") == "Pod" else target(address, port),
        name=labels[SERVICE],
        address=address,
        port=port,
        tags=tuple(sorted(label.removeprefix(TAG) for label in labels if label.startswith(TAG))),
        meta={key: value for key, value in meta.items() if value},
        # Unknown is to be read as ready, says the API's reference; and a Service that publishes addresses that are not
        # ready calls those ready too that are about to go.
        passing=conditions.get("ready") is not False and not conditions.get("terminating"),
    )

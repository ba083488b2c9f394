"""The registry that is a cluster of Consul servers.

A registration under /v1/agent belongs to the agent that took it, and only that agent can renew or remove it. Behind one
load-balanced address those requests would go astray, so this takes a list of servers, keeps to one for as long as it
answers, and moves on when it does not. A list of one, a client agent on the same node, is the same code.

The client is python-consul (or py-consul, its maintained fork). What it lacks is closed here and nowhere else:

- it waits for ever on a server that has died: every request gets a time-out (`_Http`);
- it sends the token in the query string, where logs keep it: it goes in X-Consul-Token (`_Http`);
- it returns a quiet False for a 404, and every other failure as something else: one set of errors (`_Http`);
- it lets its own reading of CONSUL_HTTP_* win over its arguments, which would make three servers one (`_Server`);
- its health queries know no consistency mode (`_Http`), its registrations no Meta, Weights or gRPC check (`_payload`).
"""

import json
import logging
import os
import queue
import random
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import consul
import consul.std
import requests

from rollcall import clocks
from rollcall.registry import (
    Check,
    DuplicateInstanceError,
    GrpcCheck,
    HttpCheck,
    Instance,
    RegistryError,
    RegistryUnavailableError,
    TcpCheck,
    TtlCheck,
    Watch,
    http,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 1.0  # seconds; a server is near, or it is no use
ANSWER_TIMEOUT = 2.0  # seconds, on top of what a blocking query asks the server to wait
CONFIRM_WAIT = 1.0  # seconds; how long `confirm` lets the server hold its question
WATCH_WAIT = 10  # seconds; bounds how long a server that hangs can keep a watch in the dark
REAP_AFTER = "1m"  # Consul's minimum. Until then a dead instance stays listed as critical, and is filtered out here
LISTED_WITHIN = 2.0  # seconds for an agent to pass a registration on to the cluster
LISTED_STALE = "10s"  # how far behind the cluster a server may be whose list counts as the cluster's
LISTED_FOR = 10.0  # seconds for which a look at the cluster's list is good
GHOST_RETRY = 2.0  # seconds between attempts to clean a server that cannot be reached


class ConsulRegistry:
    """A `Registry`, with `Keys`, kept by the Consul servers at `addresses`.

    `addresses` are HOST:PORT or http(s)://HOST:PORT, of one datacenter. Instances are looked up there, and in the
    datacenters that `failover` names, whose instances come after it in that order, by `Instance.priority`. `token` or,
    re-read at each request so that it can rotate, `token_file` is sent as X-Consul-Token. `ca`, `cert` and `key` are
    PEM files for https, which `ca` turns on for addresses that do not say.

        registry = ConsulRegistry(["127.0.0.1:8500"])
        registry.register(Instance(id="jq", name="queue", address="127.0.0.1", port=8999), TcpCheck())
        registry.instances("queue")
        registry.deregister("jq")
    """

    def __init__(
        self,
        addresses: Sequence[str] = ("127.0.0.1:8500",),
        *,
        failover: Sequence[str] = (),
        token: str = "",
        token_file: str = "",
        ca: str = "",
        cert: str = "",
        key: str = "",
    ) -> None:
        if not addresses:
            raise ValueError("expected at least one address of a Consul server, such as 127.0.0.1:8500; found none")
        self._uris = [_base_uri(address, https=bool(ca)) for address in dict.fromkeys(addresses)]
        self._credentials = (token, token_file, ca, cert, key)
        self._datacenters = ("", *dict.fromkeys(failover))  # the servers' own first
        self._servers = self._connect()
        self._preferred = random.choice(self._servers)  # noqa: S311 (spreads load, guards nothing)
        self._homes: dict[str, _Home] = {}
        self._ghosts: dict[str, dict[_Server, float]] = {}  # where an id may linger, and when to look again
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    def __str__(self) -> str:
        return f"Consul at {', '.join(str(server) for server in self._servers)}"

    def register(self, instance: Instance, check: Check, *, passing: bool = False) -> None:
        def attempt(server: _Server) -> None:
            self._refuse_duplicate(server, instance)
            payload = _payload(instance, check, passing=passing)
            home = _Home(server, payload, ttl=check.ttl if isinstance(check, TtlCheck) else None)
            home.register()
            home.node = server.node_of(instance.id)
            home.heartbeat(instance.id)
            with self._lock:
                self._homes[instance.id] = home
                self._ghosts[instance.id] = {other: 0.0 for other in self._servers if other is not server}
            home.await_listing(instance)

        self._ask(attempt)

    def confirm(self, instance: Instance) -> bool:
        with self._lock:
            home = self._homes.get(instance.id)
        if home is None:
            return False
        home.heartbeat(instance.id)
        self._clean(instance.id)
        if not home.listed(instance):
            # The agent has it and has not told the cluster. By itself it would try again in a minute.
            with self._writing:
                if self._homes.get(instance.id) is home:  # else it has been deregistered meanwhile
                    home.register()
            home.await_listing(instance)
        found = home.server.service(instance.id, unchanged_from=home.content, wait=home.wait)
        if found is None:
            return False
        home.content = found["ContentHash"]
        if (found["Address"], found["Port"]) != (instance.address, instance.port):
            raise DuplicateInstanceError.of(instance.id, found["Service"], f"{found['Address']}:{found['Port']}")
        return True

    def deregister(self, instance_id: str) -> None:
        def remove(server: _Server) -> RegistryUnavailableError | None:
            try:
                server.deregister(instance_id)
            except RegistryUnavailableError as error:
                return error
            return None

        with self._writing:
            with self._lock:
                self._homes.pop(instance_id, None)
                self._ghosts.pop(instance_id, None)
            with ThreadPoolExecutor(len(self._servers)) as pool:
                errors = list(pool.map(remove, self._servers))
        if all(errors):
            raise _unavailable([error for error in errors if error])

    def instances(
        self, name: str, tag: str = "", *, failing: bool = False, certain: bool = False
    ) -> tuple[Instance, ...]:
        def ask(server: _Server, datacenter: str) -> tuple[Instance, ...]:
            if certain:
                return server.certain_instances(name, tag, failing=failing, datacenter=datacenter)
            return server.instances(name, tag, failing=failing, datacenter=datacenter)[1]

        found: list[tuple[Instance, ...]] = []
        for datacenter in self._datacenters:
            try:
                found.append(self._ask(partial(ask, datacenter=datacenter)))
            except RegistryError as error:
                if certain or not datacenter:
                    raise
                log.warning("what is registered in %s is left out: %s", datacenter, error)
                found.append(())
        return _by_priority(found)

    def services(self) -> tuple[str, ...]:
        return self._ask(lambda server: server.names())[1]

    def diagnose(self) -> tuple[str, ...]:
        with ThreadPoolExecutor(len(self._servers)) as pool:
            found = list(pool.map(_Server.diagnose, self._servers))
        problems = [problem for each in found for problem in each.problems]
        leaders = sorted({each.leader for each in found if each.leader})
        if len(leaders) > 1:
            problems.append(
                f"Consul's servers follow different leaders ({', '.join(leaders)}): expected one; either the network "
                f"between them is parted, or they are not of one cluster"
            )
        return tuple(problems)

    # A watch has connections of its own: its queries hang on them for seconds.

    def watch(self, name: str, tag: str = "", *, failing: bool = False) -> Watch[tuple[Instance, ...]]:
        def ask(server: _Server, index: int, datacenter: str) -> tuple[int, tuple[Instance, ...]]:
            return server.instances(name, tag, index, failing=failing, datacenter=datacenter)

        watches = [
            ConsulWatch(
                self._connect(),
                f"{name!r} in {datacenter}" if datacenter else repr(name),
                partial(ask, datacenter=datacenter),
            )
            for datacenter in self._datacenters
        ]
        return _PriorityWatch(watches) if len(watches) > 1 else watches[0]

    def watch_services(self, tag: str = "") -> "ConsulWatch[tuple[str, ...]]":
        return ConsulWatch(self._connect(), "the names of services", lambda server, index: server.names(tag, index))

    def keys(self, prefix: str) -> dict[str, str]:
        return self._ask(lambda server: server.keys(prefix))[1]

    def watch_keys(self, prefix: str) -> Watch[dict[str, str]]:
        def ask(server: _Server, index: int) -> tuple[int, dict[str, str]]:
            return server.keys(prefix, index)

        return ConsulWatch(self._connect(), f"the keys under {prefix}", ask)

    def put(self, key: str, text: str) -> None:
        self._ask(lambda server: server.http.put(_done, _key_path(key), data=text.encode()))

    def delete(self, key: str) -> None:
        self._ask(lambda server: server.http.delete(_done, _key_path(key)))

    def _connect(self) -> "list[_Server]":
        return [_Server(uri, *self._credentials) for uri in self._uris]

    def _ask(self, question: Callable[["_Server"], T]) -> T:
        """Put a question to one server after the other, the one that answered last first."""
        errors = []
        for server in sorted(self._servers, key=lambda each: (each is not self._preferred, random.random())):  # noqa: S311
            try:
                answer = question(server)
            except RegistryUnavailableError as error:
                errors.append(error)
            else:
                self._preferred = server
                return answer
        raise _unavailable(errors)

    def _refuse_duplicate(self, server: "_Server", instance: Instance) -> None:
        for name in {instance.name, *server.names_of(instance.id)}:
            for holder in server.instances(name)[1]:
                if holder.id == instance.id and holder.target != instance.target:
                    raise DuplicateInstanceError.of(instance.id, name, holder.target)

    def _clean(self, instance_id: str) -> None:
        """Remove the id from servers that are not its home: it may have been there before, or come back with them."""
        now = time.monotonic()
        with self._lock:
            ghosts = self._ghosts.get(instance_id, {})
            due = [server for server, when in ghosts.items() if when <= now]
            ghosts.update(dict.fromkeys(due, float("inf")))

        def clean() -> None:
            for server in due:
                with self._lock:
                    home = self._homes.get(instance_id)
                if home and home.server is server:  # it has moved here since
                    continue
                try:
                    server.deregister(instance_id)
                except RegistryError:
                    with self._lock:
                        ghosts[server] = time.monotonic() + GHOST_RETRY

        if due:
            # On a thread of its own: a server that hangs must not keep the home from being confirmed.
            threading.Thread(target=clean, name=f"ghosts of {instance_id}", daemon=True).start()


class ConsulWatch(Generic[T]):
    """A `Watch` by blocking queries: Consul holds each question until the answer changes.

    `ask` puts the question to a server: with an index, for what there is once that is no longer the newest.

    A server that follows no leader answers from what it knew before, for as long as it is left out of the cluster. So
    it is believed only by a watch that knows nothing yet, and only when all the others are no better. (Consul's
    max_stale is no guard: a blocking query is answered from a view that does not know its age, and where nothing
    younger is to be had, the one who knows nothing had better take what there is.)
    """

    def __init__(self, servers: "list[_Server]", what: str, ask: Callable[["_Server", int], tuple[int, T]]) -> None:
        self._servers, self._what, self._ask = servers, what, ask
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[T]:
        random.shuffle(self._servers)
        index, failures = 0, 0
        seen: T | None = None
        doubtful: list[tuple[int, T]] = []  # what servers without a leader have answered, at which index
        while not self._closed.is_set():
            try:
                answer, found = self._ask(self._servers[0], index)
                if seen is None:
                    doubtful.append((answer, found))
                self._servers[0].need_leader()
            except RegistryError as error:
                self._servers.append(self._servers.pop(0))
                index = 0  # of the next server, or the next cluster, nothing is known
                failures += 1
                if failures == len(self._servers):  # said once, until an answer comes
                    log.warning("%s: no server can be believed about %s; keeping what is known", error, self._what)
                if doubtful and failures % len(self._servers) == 0 and not self._closed.is_set():
                    _, seen = max(doubtful, key=lambda each: each[0])  # the one that was left out last
                    doubtful.clear()
                    yield seen
                rounds = failures // len(self._servers)
                if rounds:
                    self._closed.wait(http.pause(rounds))
                continue
            failures = 0
            doubtful.clear()
            # An index that goes backwards is of a cluster that was rebuilt; one to ask from must be above 0.
            # https://developer.hashicorp.com/consul/api-docs/features/blocking
            index = 0 if answer < index else max(answer, 1)
            if found != seen and not self._closed.is_set():
                seen = found
                yield found

    def close(self) -> None:
        self._closed.set()


class _PriorityWatch:
    """A `Watch` on several datacenters: the instances of each as it has told them last, the first one's before others.

    There is nothing to tell until the first has answered, however soon the others have.
    """

    def __init__(self, watches: Sequence[ConsulWatch[tuple[Instance, ...]]]) -> None:
        self._watches = watches
        self._news: queue.SimpleQueue[tuple[int, tuple[Instance, ...]] | None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[tuple[Instance, ...]]:
        for place in range(len(self._watches)):
            threading.Thread(target=self._follow, args=(place,), name=f"datacenter {place}", daemon=True).start()
        known: list[tuple[Instance, ...] | None] = [None for _ in self._watches]
        while news := self._news.get():
            place, known[place] = news
            if known[0] is not None:
                yield _by_priority([each or () for each in known])

    def _follow(self, place: int) -> None:
        for found in self._watches[place]:
            self._news.put((place, found))

    def close(self) -> None:
        for watch in self._watches:
            watch.close()
        self._news.put(None)


def _by_priority(groups: Sequence[tuple[Instance, ...]]) -> tuple[Instance, ...]:
    """Return the instances of all these groups, each once, with the place of its first group as its priority."""
    found: dict[tuple[str, str], Instance] = {}
    for place, group in enumerate(groups):  # the own datacenter may be among the others, too
        for each in group:
            found.setdefault((each.id, each.target), replace(each, priority=place))
    return tuple(found.values())


class _Http(consul.std.HTTPClient):  # type: ignore[misc]
    """python-consul's transport, with a time-out, the token in its header, and errors of ours."""

    def __init__(self, base_uri: str, token: str, token_file: str, ca: str, cert: str, key: str) -> None:
        super().__init__()
        self.base_uri = base_uri
        self._token, self._token_file = token, token_file
        self.session.trust_env = (
            False  # a proxy for the web is none for Consul, and looking for one costs more than asking
        )
        self.session.verify = ca or True
        if cert:
            self.session.cert = (cert, key) if key else cert

    def uri(self, path: str, params: Sequence[tuple[str, Any]] | None = None) -> str:
        query = urlencode(params or [])
        return f"{self.base_uri}{path.replace(' ', '%20')}{'&' if '?' in path else '?'}{query}"

    def get(self, callback: Callable[[Any], T], path: str, params: Any = None, *, certain: bool = False, **_: Any) -> T:
        if certain:  # said, because the default may have been set to another by the server's discovery_max_stale
            params = [*(params or []), ("consistent", "")]
        elif path.startswith(("/v1/health/", "/v1/catalog/")) and "dc" not in dict(params or ()):
            # Any server may answer, with or without a leader: while one is elected, discovery goes on. Not so for
            # another datacenter, of whose servers we cannot know whether they follow one (`need_leader`).
            params = [*(params or []), ("stale", "")]
        return self._send("GET", callback, path, params)

    def put(self, callback: Callable[[Any], T], path: str, params: Any = None, data: Any = "", **_: Any) -> T:
        return self._send("PUT", callback, path, params, data)

    def delete(self, callback: Callable[[Any], T], path: str, params: Any = None, **_: Any) -> T:
        return self._send("DELETE", callback, path, params)

    def _send(self, method: str, callback: Callable[[Any], T], path: str, params: Any, data: Any = "") -> T:
        held = float(dict(params or ()).get("wait", "0s").rstrip("s"))
        timeout = (CONNECT_TIMEOUT, held * 17 / 16 + ANSWER_TIMEOUT)  # Consul adds up to a sixteenth
        token = http.token_from(self._token_file, self._token)
        try:
            answer = self.session.request(
                method,
                self.uri(path, params),
                data=data,
                headers={"X-Consul-Token": token} if token else {},
                timeout=timeout,
                allow_redirects=False,  # which would take the token along
            )
            response = self.response(answer)
        except requests.RequestException as error:
            raise RegistryUnavailableError(f"{self.base_uri}: {http.reason(error)}") from None
        except OSError as error:  # one of the PEM files
            raise RegistryError(f"{self.base_uri}: {error}") from None
        said = f"{self.base_uri}: {response.code} {response.body.strip()[:200]}"
        if response.code in (401, 403):
            raise RegistryError(f"{said}: is the ACL token set, and does its policy allow this?")
        if response.code == 429 or response.code >= 500:  # noqa: PLR2004 (too busy, or without a leader: ask another)
            raise RegistryUnavailableError(said)
        if response.code >= 300 and response.code != 404:  # noqa: PLR2004 (what is not there is an answer)
            raise RegistryError(said)
        try:
            return callback(response)
        except (KeyError, ValueError, consul.ConsulException) as error:
            raise RegistryUnavailableError(f"{self.base_uri}: does not answer as Consul does ({error!r})") from None


class _Server(consul.Consul):  # type: ignore[misc]
    """One Consul server, asked through python-consul."""

    _environment = threading.Lock()

    def __init__(self, base_uri: str, *credentials: str) -> None:
        self._transport = _Http(base_uri, *credentials)
        theirs = ("CONSUL_HTTP_ADDR", "CONSUL_HTTP_TOKEN", "CONSUL_HTTP_SSL", "CONSUL_HTTP_SSL_VERIFY")
        with self._environment:
            hidden = {name: os.environ.pop(name) for name in theirs if name in os.environ}
            try:
                super().__init__()
            finally:
                os.environ.update(hidden)

    def connect(self, *_: object) -> _Http:
        """Return the transport, as python-consul asks for it."""
        return self._transport

    http_connect = connect  # and as py-consul does

    def __str__(self) -> str:
        return self._transport.base_uri.removeprefix("http://")

    # With an index, the answer comes once that is no longer the newest or the wait is over.

    def names(self, tag: str = "", index: int = 0) -> tuple[int, tuple[str, ...]]:
        """Return the names of the services that have a registration, with this tag if one is given; at which index."""
        answer, tags = self.catalog.services(index=index or None, wait=f"{WATCH_WAIT}s")
        return int(answer), tuple(sorted(name for name in tags if not tag or tag in tags[name]))

    def instances(
        self, name: str, tag: str = "", index: int = 0, *, failing: bool = False, datacenter: str = ""
    ) -> tuple[int, tuple[Instance, ...]]:
        """Return the instances of a service that pass, with `failing` the others as well; at which index."""
        answer, entries = self.health.service(
            quote(name, safe=""),
            index=index or None,
            wait=f"{WATCH_WAIT}s",
            passing=not failing,
            tag=tag or None,
            dc=datacenter or None,
        )
        return int(answer), _instances(entries)

    def certain_instances(self, name: str, tag: str, *, failing: bool, datacenter: str) -> tuple[Instance, ...]:
        """Return the same as the leader has it; raise RegistryUnavailableError when this server finds none."""
        asked = {"passing": "" if failing else "1", "tag": tag, "dc": datacenter}
        params = [(key, value) for key, value in asked.items() if value]
        path = f"/v1/health/service/{quote(name, safe='')}"
        return _instances(self.http.get(_list, path, params=params, certain=True))

    def held(self, name: str) -> set[tuple[str, str]]:
        """Return which node holds which instance of a service, as the cluster lists it.

        Raises RegistryUnavailableError when this server has not heard of the cluster for long.
        """
        path, params = f"/v1/health/service/{quote(name, safe='')}", [("max_stale", LISTED_STALE)]
        found = self.http.get(_list, path, params=params)
        return {(entry["Node"]["Node"], entry["Service"]["ID"]) for entry in found}

    def names_of(self, instance_id: str) -> set[str]:
        """Return the names of the services that have a passing instance under this id, on whichever server."""
        checks = self.http.get(_json, "/v1/health/state/passing", params=[("filter", _is_of(instance_id))])
        return {check["ServiceName"] for check in checks or ()}

    def service(self, instance_id: str, unchanged_from: str, wait: float) -> dict[str, Any] | None:
        """Return what this server's agent has under an id; given a hash, once it differs or the wait is over."""
        params = [("hash", unchanged_from), ("wait", f"{wait}s")] if unchanged_from else []
        found: dict[str, Any] | None = self.http.get(
            _json, f"/v1/agent/service/{quote(instance_id, safe='')}", params=params
        )
        return found

    def node_of(self, instance_id: str) -> str:
        """Return the name of this server's node, as the check of one of its registrations has it.

        /v1/agent/self has it too, but a service's token usually may not read that.
        """
        checks = self.http.get(_json, "/v1/agent/checks", params=[("filter", _is_of(instance_id))])
        return next((str(check["Node"]) for check in (checks or {}).values()), "")

    def keys(self, prefix: str, index: int = 0) -> tuple[int, dict[str, str]]:
        """Return what is under the keys that begin like this, as the leader has it; at which index."""
        params = [("recurse", ""), *([("index", index), ("wait", f"{WATCH_WAIT}s")] if index else [])]
        found: tuple[int, dict[str, str]] = self.http.get(_texts, _key_path(prefix), params)
        return found

    def need_leader(self) -> None:
        """Raise RegistryUnavailableError unless this server follows a leader, or is it."""
        if not self.status.leader():
            raise RegistryUnavailableError(f"{self}: there is no leader")

    def diagnose(self) -> "_Diagnosis":
        """Say what is wrong with this server, as far as it can be seen from here."""
        asked = time.time()
        try:
            leader, ahead = self.http.get(
                lambda answer: (json.loads(answer.body), clocks.apart(answer.headers["Date"], asked, time.time())),
                "/v1/status/leader",
            )
        except RegistryError as error:
            return _Diagnosis("", (f"{error}; expected a Consul server there",))
        problems = [clocks.complaint(str(self), ahead)]
        if not leader:
            problems.append(
                f"{self} follows no leader: expected more than half of Consul's servers to run, and to reach each other"
            )
        return _Diagnosis(leader or "", tuple(filter(None, problems)))

    def deregister(self, instance_id: str) -> None:
        """Remove an id from this server's agent. Harmless when it is not there."""
        self.agent.service.deregister(quote(instance_id, safe=""))


@dataclass(frozen=True)
class _Diagnosis:
    """What a server is found to be like."""

    leader: str
    problems: tuple[str, ...]


@dataclass
class _Home:
    """The server that holds a registration."""

    server: _Server
    payload: str
    ttl: float | None
    """Seconds, for a TTL check, which passes because the instance says so."""
    node: str = ""
    content: str = ""
    """A hash of the registration when it was last seen."""
    _listed_until: float = 0.0

    @property
    def wait(self) -> float:
        """The seconds from one confirmation to the next."""
        return CONFIRM_WAIT if self.ttl is None else min(CONFIRM_WAIT, self.ttl / 3)

    def register(self) -> None:
        self.server.http.put(_done, "/v1/agent/service/register?replace-existing-checks=1", data=self.payload)

    def await_listing(self, instance: Instance) -> None:
        """Wait until the cluster's list has it; raise RegistryUnavailableError if that does not come."""
        deadline = time.monotonic() + LISTED_WITHIN
        while not self.listed(instance):
            if time.monotonic() > deadline:
                raise RegistryUnavailableError(f"{self.server} has taken the registration, but the cluster has not")
            time.sleep(0.05)

    def listed(self, instance: Instance) -> bool:
        """Say whether the cluster's list has what this server's agent has."""
        if time.monotonic() >= self._listed_until:
            if (self.node, instance.id) not in self.server.held(instance.name):
                return False
            self._listed_until = time.monotonic() + LISTED_FOR
        return True

    def heartbeat(self, instance_id: str) -> None:
        if self.ttl is not None:
            self.server.agent.check.ttl_pass(f"service:{quote(instance_id, safe='')}")


def _is_of(instance_id: str) -> str:
    """Return a filter for the checks of an instance, its id quoted as Consul takes it."""
    return f"ServiceID == {json.dumps(instance_id) if '`' in instance_id else f'`{instance_id}`'}"


def _json(response: Any) -> Any:
    """Return what an answer says; None where there is nothing."""
    return None if response.code == 404 else json.loads(response.body)  # noqa: PLR2004


def _list(response: Any) -> list[Any]:
    """Return the list that is the answer. Raises ValueError for another, and where there is nothing."""
    found = json.loads(response.body)
    if response.code != 200 or not isinstance(found, list):  # noqa: PLR2004
        raise ValueError(f"expected a list, found {response.body[:100]!r}")
    return found


def _texts(response: Any) -> tuple[int, dict[str, str]]:
    """Return the texts that an answer has by their keys, at its index."""
    found = {each["Key"]: b64decode(each["Value"] or "").decode(errors="replace") for each in _json(response) or ()}
    return int(response.headers["X-Consul-Index"]), found


def _key_path(key: str) -> str:
    return f"/v1/kv/{quote(key)}"


def _done(response: Any) -> None:
    if response.code == 404:  # noqa: PLR2004
        raise ValueError("404 to what should be done")


def _base_uri(address: str, *, https: bool) -> str:
    uri = address if "://" in address else f"{'https' if https else 'http'}://{address}"
    parts = urlsplit(uri)
    try:
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port and "@" not in parts.netloc
    except ValueError:
        valid = False
    if not valid:
        shown = address.rpartition("@")[2]  # what stands before it may be a secret
        raise ValueError(f"expected a Consul server as HOST:PORT, such as 127.0.0.1:8500; found {shown!r}")
    return f"{parts.scheme}://{parts.netloc}"


def _payload(instance: Instance, check: Check, *, passing: bool) -> str:
    meta: Mapping[str, str] = {**instance.meta, **({"version": instance.version} if instance.version else {})}
    return json.dumps(
        {
            "ID": instance.id,
            "Name": instance.name,
            "Address": instance.address,
            "Port": instance.port,
            "Tags": instance.tags,
            "Meta": meta,
            "Weights": {"Passing": instance.weight, "Warning": 1},
            "Check": {
                **_check(instance, check),
                "DeregisterCriticalServiceAfter": REAP_AFTER,
                "Status": "passing" if passing else "critical",
            },
        }
    )


def _check(instance: Instance, check: Check) -> dict[str, str]:
    if isinstance(check, TtlCheck):
        return {"TTL": f"{check.ttl}s"}
    match check:
        case GrpcCheck():
            kind = {"GRPC": f"{instance.target}/{check.service}" if check.service else instance.target}
        case TcpCheck():
            kind = {"TCP": instance.target}
        case HttpCheck():
            kind = {"HTTP": check.url}
    return {**kind, "Interval": f"{check.interval}s", "Timeout": f"{check.timeout}s"}


def _passes(entry: Mapping[str, Any]) -> bool:
    """Say whether an instance passes all of its checks, its node's among them."""
    return all(check["Status"] == "passing" for check in entry["Checks"])


def _instances(entries: list[Any]) -> tuple[Instance, ...]:
    """Return the instances that Consul lists, by id."""
    # After a move between servers an id can show twice. One that passes is the true one; of such, the later.
    entries.sort(key=lambda entry: (_passes(entry), entry["Service"]["CreateIndex"]))
    newest = {}
    for entry in entries:
        try:
            newest[entry["Service"]["ID"]] = _instance(entry)
        except ValueError as error:  # others may register what cannot be called: without a port, say
            log.warning("left out: %s", error)
    return tuple(newest[id_] for id_ in sorted(newest))


def _instance(entry: Mapping[str, Any]) -> Instance:
    service, node = entry["Service"], entry["Node"]
    meta = dict(service["Meta"] or {})
    return Instance(
        id=service["ID"],
        name=service["Service"],
        address=service["Address"] or node["Address"],
        port=service.get("Port", 0),
        version=meta.pop("version", ""),
        tags=tuple(service["Tags"] or ()),
        meta=meta,
        weight=service["Weights"]["Passing"],
        datacenter=node["Datacenter"],
        passing=_passes(entry),
    )


def _unavailable(errors: Sequence[Exception]) -> RegistryUnavailableError:
    return RegistryUnavailableError(f"no Consul server could be asked ({'; '.join(str(error) for error in errors)})")

"""What the Consul registry promises beyond the contract of all: checks, tokens, TLS, servers in trouble."""

import json
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from deploy.local import process
from deploy.local.cluster import SERVERS, Cluster
from deploy.local.guard import Guard
from rollcall.registry import (
    Check,
    GrpcCheck,
    HttpCheck,
    Instance,
    RegistryError,
    RegistryUnavailableError,
    TcpCheck,
    TtlCheck,
    Watch,
)
from rollcall.registry import consul as module
from rollcall.registry.consul import ConsulRegistry
from tests.waiting import Following, eventually, free_port

CHECK = TtlCheck(60)
Question = Callable[[ConsulRegistry], Watch[Any]]


def an_instance(name: str, port: int = 1) -> Instance:
    return Instance(id=f"{name}-1", name=name, address="127.0.0.1", port=port)


def passes(registry: ConsulRegistry, name: str) -> Callable[[], bool]:
    return lambda: bool(registry.instances(name))


def fails(registry: ConsulRegistry, name: str) -> Callable[[], bool]:
    return lambda: not registry.instances(name)


# Each of these is something to check: it yields the check, its port, and how to make it well and ill.
Patient = Iterator[tuple[Check, int, Callable[[], None], Callable[[], None]]]


@contextmanager
def a_grpc_server() -> Patient:
    server, statuses = grpc.server(futures.ThreadPoolExecutor(2)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(statuses, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    status = health_pb2.HealthCheckResponse
    yield (
        GrpcCheck("a.v1.A"),
        port,
        lambda: statuses.set("a.v1.A", status.SERVING),
        lambda: statuses.set("a.v1.A", status.NOT_SERVING),
    )
    server.stop(None)


@contextmanager
def a_listener() -> Patient:
    port, listeners = free_port(), list[socket.socket]()
    yield (
        TcpCheck(),
        port,
        lambda: listeners.append(socket.create_server(("127.0.0.1", port))),
        lambda: listeners.pop().close(),
    )
    for listener in listeners:
        listener.close()


@contextmanager
def a_web_server() -> Patient:
    well = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204 if well.is_set() else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    yield HttpCheck(f"http://127.0.0.1:{port}/"), port, well.set, well.clear
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("patient", [a_grpc_server, a_listener, a_web_server])
def test_the_check_decides_who_passes(cluster: Cluster, patient: Callable[[], Any]) -> None:
    registry = ConsulRegistry(cluster.addresses)
    with patient() as (check, port, make_well, make_ill):
        instance = an_instance(f"checked by {type(check).__name__}", port)
        registry.register(instance, check)
        eventually("it is listed", lambda: instance.name in registry.services())
        assert fails(registry, instance.name)(), "nothing passes before its first check has"
        make_well()
        eventually("it passes", passes(registry, instance.name))
        make_ill()
        eventually("it fails", fails(registry, instance.name))
        make_well()
        eventually("it passes again", passes(registry, instance.name))
        registry.deregister(instance.id)


def test_a_ttl_check_passes_while_it_is_confirmed(cluster: Cluster) -> None:
    registry = ConsulRegistry(cluster.addresses)
    instance = an_instance("checked by TtlCheck")
    registry.register(instance, TtlCheck(4))
    eventually("it passes", lambda: registry.confirm(instance) and passes(registry, instance.name)())
    until = time.monotonic() + 5  # longer than its time to live
    while time.monotonic() < until:
        assert registry.confirm(instance)
        assert passes(registry, instance.name)()
    eventually("it fails, unconfirmed", fails(registry, instance.name))
    eventually("it passes again", lambda: registry.confirm(instance) and passes(registry, instance.name)())
    registry.deregister(instance.id)


def test_a_caller_who_knows_that_it_serves_passes_at_once(cluster: Cluster) -> None:
    registry = ConsulRegistry(cluster.addresses)
    with a_listener() as (_, port, make_well, _):
        make_well()
        instance = an_instance("passing from the start", port)
        registry.register(instance, TcpCheck(interval=3600), passing=True)
        eventually("it passes", passes(registry, instance.name), 2)
        registry.deregister(instance.id)


def test_what_others_register_and_cannot_be_called_is_left_out(cluster: Cluster) -> None:
    registry = ConsulRegistry(cluster.addresses)
    good = an_instance("shared")
    registry.register(good, CHECK)
    for address in cluster.addresses:
        theirs = {"ID": f"no port {address}", "Name": "shared"}
        requests.put(f"http://{address}/v1/agent/service/register", json=theirs, timeout=5).raise_for_status()
    eventually("the good one is found", lambda: [each.id for each in registry.instances("shared")] == [good.id])
    watch = registry.watch("shared")
    with Following(watch, watch.close) as watched:
        watched.until("the watch shows it as well", lambda seen: [each.id for each in seen] == [good.id])
    for address in cluster.addresses:
        requests.put(f"http://{address}/v1/agent/service/deregister/no port {address}", timeout=5).raise_for_status()
    registry.deregister(good.id)


def test_deregistering_cleans_every_server(cluster: Cluster) -> None:
    instance = an_instance("everywhere")
    for address in cluster.addresses:
        ConsulRegistry([address]).register(instance, CHECK)
    registry = ConsulRegistry(cluster.addresses)
    eventually("it is found, once", lambda: len(registry.instances(instance.name)) == 1)
    registry.deregister(instance.id)
    held = [requests.get(f"http://{address}/v1/agent/services", timeout=5).json() for address in cluster.addresses]
    assert not any(instance.id in services for services in held)


def test_of_an_id_on_two_servers_the_one_that_passes_is_shown(cluster: Cluster) -> None:
    instance, left_behind = an_instance("moved"), an_instance("moved", free_port())
    ConsulRegistry([cluster.addresses[0]]).register(instance, CHECK)
    payload = {
        "ID": left_behind.id,
        "Name": left_behind.name,
        "Port": left_behind.port,
        "Check": {"TCP": left_behind.target, "Interval": "1s"},
    }
    later = f"http://{cluster.addresses[1]}/v1/agent/service/register"
    requests.put(later, json=payload, timeout=5).raise_for_status()
    listed = f"http://{cluster.addresses[2]}/v1/health/service/moved"
    eventually("both are listed", lambda: len(requests.get(listed, timeout=5).json()) == 2)
    registry = ConsulRegistry(cluster.addresses)
    watch = registry.watch(instance.name, failing=True)
    with Following(watch, watch.close) as watched:
        shown = watched.until("it shows one", lambda seen: len(seen) == 1)
        assert [(each.port, each.passing) for each in shown] == [(instance.port, True)]
        first = f"http://{cluster.addresses[0]}/v1/agent/service/deregister/{instance.id}"
        requests.put(first, timeout=5).raise_for_status()
        watched.until("it shows the other", lambda seen: [each.passing for each in seen] == [False])
    registry.deregister(instance.id)


def test_a_refused_registration_says_why(cluster: Cluster) -> None:
    with pytest.raises(RegistryError, match="Invalid Service Meta"):
        ConsulRegistry(cluster.addresses).register(
            Instance(id="bad meta", name="bad", address="127.0.0.1", port=1, meta={"not allowed!": ""}), CHECK
        )


def test_the_environment_of_other_tools_does_not_divert_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUL_HTTP_ADDR", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "theirs")
    monkeypatch.setenv("CONSUL_HTTP_SSL", "true")
    with recording() as (address, requested):
        with pytest.raises(RegistryUnavailableError):
            ConsulRegistry([address]).services()
        assert "theirs" not in requested()
    registry = ConsulRegistry(cluster.addresses)
    assert "consul" in registry.services()
    instance = an_instance("undiverted")
    registry.register(instance, CHECK)
    eventually("it is found", passes(registry, instance.name))
    assert registry.confirm(instance)
    registry.deregister(instance.id)


# --- servers in trouble -----------------------------------------------------------------------------------------------


@contextmanager
def recording() -> Iterator[tuple[str, Callable[[], str]]]:
    """A server that notes what it is asked and hangs up."""
    noted = list[bytes]()
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    noted.append(connection.recv(65536))

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", lambda: b"".join(noted).decode()


@contextmanager
def hanging() -> Iterator[str]:
    """A server that accepts and never answers: one whose process is frozen looks like this."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_hangs_is_given_up_on_and_the_next_is_asked(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_TIMEOUT", 0.7)
    with hanging() as first, hanging() as second:
        registry = ConsulRegistry([first, second, cluster.addresses[0]])
        begun = time.monotonic()
        assert "consul" in registry.services()
        assert time.monotonic() - begun < 2 * (module.ANSWER_TIMEOUT + 0.5)
        begun = time.monotonic()
        assert "consul" in registry.services()
        assert time.monotonic() - begun < 0.5, "the one that answered is asked first from then on"


def test_when_every_server_hangs_the_error_comes_in_bounded_time() -> None:
    with hanging() as address:
        begun = time.monotonic()
        with pytest.raises(RegistryUnavailableError, match=f"{address}: no answer in time"):
            ConsulRegistry([address]).services()
        assert time.monotonic() - begun < module.ANSWER_TIMEOUT + 1


def consul_itself(registry: ConsulRegistry) -> Watch[tuple[object, ...]]:
    return registry.watch("consul")


def names(registry: ConsulRegistry) -> Watch[tuple[object, ...]]:
    return registry.watch_services()


def keys(registry: ConsulRegistry) -> Watch[dict[str, str]]:
    registry.put("hangs/key", "text")
    return registry.watch_keys("hangs/")


@pytest.mark.parametrize("question", [consul_itself, names, keys])
def test_a_watch_moves_on_from_a_server_that_hangs(cluster: Cluster, question: Question) -> None:
    with hanging() as address:
        watch = question(ConsulRegistry([address, cluster.addresses[0]]))
        with Following(watch, watch.close) as watched:  # which begins with either
            begun = time.monotonic()
            watched.until("it shows them", bool, 20)
            assert time.monotonic() - begun < module.WATCH_WAIT * 17 / 16 + module.ANSWER_TIMEOUT + 1


def questions(registry: ConsulRegistry) -> list[Callable[[], object]]:
    """Return one of each kind of thing that a registry is asked."""
    return [
        registry.services,
        lambda: registry.instances("sum"),
        lambda: registry.register(an_instance("sum"), CHECK),
        lambda: registry.deregister("sum-1"),
        lambda: registry.keys("a/"),
        lambda: registry.put("a/b", "c"),
        lambda: registry.delete("a/b"),
    ]


AGES = 10  # seconds; much longer than an election takes


def seconds_apart(address: str) -> float:
    """Return for how long this server has not heard from a leader."""
    answer = requests.get(f"http://{address}/v1/catalog/services?stale", timeout=5)
    return int(answer.headers["X-Consul-LastContact"]) / 1000


def test_without_a_leader_nothing_is_certain_and_what_is_known_is_all_there_is(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    registry = ConsulRegistry(cluster.addresses)
    instance = an_instance("leaderless")
    holder = ConsulRegistry(cluster.addresses[2:])  # the one that stays, or its list would say that the holder is ill
    holder.register(instance, CHECK)
    eventually("that one has heard of it", passes(holder, instance.name))

    def certain() -> bool:
        try:
            return bool(registry.instances(instance.name, certain=True))
        except RegistryUnavailableError:
            return False

    assert certain()
    for n in (1, 2):
        cluster.server(n).kill()
    last = f"http://{cluster.addresses[2]}/v1/status/leader"
    eventually("the last one has noticed", lambda: requests.get(last, timeout=5).json() == "", 20)
    assert not certain()
    eventually("what it knows is old by its own account", lambda: seconds_apart(cluster.addresses[2]) > AGES, 30)
    watch = registry.watch(instance.name)
    with Following(watch, watch.close) as watched:
        watched.until(
            "one who knows nothing takes what there is", lambda seen: [each.id for each in seen] == [instance.id]
        )
    cluster.server(3).signal(signal.SIGSTOP)
    caplog.clear()
    watch = registry.watch(instance.name)
    with Following(watch, watch.close) as watched:
        eventually("nobody has answered, in more than one round", lambda: "no server can be believed" in caplog.text)
        cluster.server(3).signal(signal.SIGCONT)
        watched.until("it is taken later as well", lambda seen: [each.id for each in seen] == [instance.id])
    for n in (1, 2):
        cluster.start_server(n)
    eventually("they have a leader again", certain, 30)
    holder.deregister(instance.id)


def test_a_server_that_is_left_out_of_the_cluster_is_not_believed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when all have gone at once: those that are back first may let another in a minute later only."""
    leader = cluster.wait_for_leader()
    out = leader % len(SERVERS) + 1
    others = [address for n, address in zip(SERVERS, cluster.addresses, strict=True) if n != out]
    left_out = ConsulRegistry([cluster.addresses[out - 1]])
    one, other = an_instance("left"), replace(an_instance("left", port=2), id="left-2")
    registry = ConsulRegistry(others)
    registry.register(one, CHECK)
    eventually("all know it", passes(left_out, one.name))
    node = requests.get(f"http://{cluster.addresses[out - 1]}/v1/agent/self", timeout=5).json()["Config"]["NodeID"]
    peer = f"http://{cluster.addresses[leader - 1]}/v1/operator/raft/peer?id={node}"
    requests.delete(peer, timeout=5).raise_for_status()
    alone = f"http://{cluster.addresses[out - 1]}/v1/status/leader"
    eventually("it knows no leader", lambda: requests.get(alone, timeout=5).json() == "", 20)
    registry.register(other, CHECK)
    assert [each.id for each in left_out.instances(one.name)] == [one.id], "it should be behind, or this shows nothing"
    with pytest.raises(RegistryUnavailableError):
        left_out.instances(one.name, certain=True)
    monkeypatch.setattr(random, "shuffle", lambda servers: servers.sort(key=lambda each: str(each) in others))
    watch = ConsulRegistry(cluster.addresses).watch(one.name)
    with Following(watch, watch.close) as watched:
        watched.until("it shows both", lambda seen: [each.id for each in seen] == [one.id, other.id])
        assert len(watched.seen) == 1, "and has shown nothing before"
    for instance in (one, other):
        registry.deregister(instance.id)
    cluster.stop_server(out)  # which lets it in at once when it is back
    cluster.start()


def test_without_any_server_the_error_names_each() -> None:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    registry = ConsulRegistry(addresses)
    for ask in questions(registry):
        with pytest.raises(RegistryUnavailableError, match="no Consul server could be asked") as caught:
            ask()
        assert all(address in str(caught.value) for address in addresses)


@pytest.mark.parametrize("question", [consul_itself, names])
@pytest.mark.parametrize("status", [200, 404])
def test_what_is_not_consul_is_an_error_and_not_a_crash(cluster: Cluster, status: int, question: Question) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        with pytest.raises(RegistryUnavailableError, match=address):
            ConsulRegistry([address]).instances("sum")
        watch = question(ConsulRegistry([address, cluster.addresses[0]]))
        with Following(watch, watch.close) as watched:
            watched.until("it moves on to Consul", bool)
        server.shutdown()


@pytest.mark.parametrize(
    "address", ["", "nonsense", "127.0.0.1:port", "127.0.0.1:99999", "ftp://127.0.0.1:21", "http://"]
)
def test_a_bad_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="expected a Consul server as HOST:PORT"):
        ConsulRegistry([address])


def test_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one address"):
        ConsulRegistry([])


def test_a_watch_sees_through_the_loss_of_all_data(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_WAIT", 2)  # seconds that a question about an index to come is held

    def index() -> int:
        answer = requests.get(f"http://{cluster.addresses[0]}/v1/health/service/rebuilt", timeout=5)
        return int(answer.headers["X-Consul-Index"])

    registry = ConsulRegistry(cluster.addresses)
    instance = an_instance("rebuilt")
    for _ in range(20):  # so that the index is well ahead of a young cluster's
        registry.register(instance, CHECK)
        eventually("it is there", passes(registry, instance.name))
        registry.deregister(instance.id)
        eventually("it has gone", fails(registry, instance.name))
    registry.register(instance, CHECK)
    watch = registry.watch("rebuilt")
    with Following(watch, watch.close) as watched:
        watched.until("it shows the instance", lambda seen: [each.port for each in seen] == [1])
        before = index()
        cluster.stop()
        for n in SERVERS:
            cluster.wipe_data(n)
        cluster.start()
        moved = an_instance("rebuilt", port=2)
        registry.register(moved, CHECK)
        watched.until("it shows what is there now", lambda seen: [each.port for each in seen] == [2])
        assert index() < before, "the index should have gone backwards, or this test shows nothing"
    registry.deregister(moved.id)


# --- a server that lets only those in who may: access control, and TLS on both sides ----------------------------------

ROOT_TOKEN = "5f4c1a2e-0000-4000-8000-000000000001"  # noqa: S105 (of a server that lives as long as this module)


class Strict:
    """A Consul server with access control that denies by default, and with https that asks for a certificate."""

    def __init__(self, run: Path, binary: Path) -> None:
        self.run, self.binary = run, binary
        self.http, self.https = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self.ca, self.cert, self.key = (str(run / f"{name}.pem") for name in ("ours-agent-ca", "cert", "key"))
        self.other_ca = str(run / "other-agent-ca.pem")
        for domain in ("ours", "other"):
            self.tls("ca", "create", "-domain", domain)
        self.tls("cert", "create", "-server", "-domain", "ours")
        self.tls("cert", "create", "-client", "-domain", "ours")
        (run / "dc1-client-ours-0.pem").rename(self.cert)
        (run / "dc1-client-ours-0-key.pem").rename(self.key)

    def tls(self, *arguments: str) -> None:
        subprocess.run([self.binary, "tls", *arguments], cwd=self.run, check=True, capture_output=True, timeout=30)

    def start(self) -> process.Process:
        certificates = {
            "ca_file": self.ca,
            "cert_file": str(self.run / "dc1-server-ours-0.pem"),
            "key_file": str(self.run / "dc1-server-ours-0-key.pem"),
        }
        ports = {"http": int(self.http.split(":")[1]), "https": int(self.https.split(":")[1])}
        config = {
            "server": True,
            "bootstrap_expect": 1,
            "bind_addr": "127.0.0.1",
            "performance": {"raft_multiplier": 1},
            "ports": {
                **ports,
                **{name: free_port() for name in ("server", "serf_lan", "serf_wan")},
                "dns": -1,
                "grpc_tls": -1,
            },
            "acl": {"enabled": True, "default_policy": "deny", "tokens": {"initial_management": ROOT_TOKEN}},
            "tls": {"https": {**certificates, "verify_incoming": True}},
        }
        (self.run / "strict.json").write_text(json.dumps(config))
        command = [
            str(self.binary),
            "agent",
            "-config-file",
            str(self.run / "strict.json"),
            "-data-dir",
            str(self.run / "data"),
        ]
        return process.start("strict", command, run=self.run)

    def api(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"X-Consul-Token": ROOT_TOKEN}
        answer = requests.request(method, f"http://{self.http}/v1/{path}", json=body, headers=headers, timeout=5)
        answer.raise_for_status()
        return answer.json()

    def token(self, rules: str) -> str:
        """Make a token that allows what these rules say."""
        name = f"policy-{time.monotonic_ns()}"
        self.api("PUT", "acl/policy", {"Name": name, "Rules": rules})
        secret: str = self.api("PUT", "acl/token", {"Policies": [{"Name": name}]})["SecretID"]
        return secret

    def ready(self) -> bool:
        try:
            self.api("GET", "acl/token/self")
        except requests.RequestException:
            return False
        return bool(self.api("GET", "health/service/consul?passing"))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, consul_binary: Path, guard: Guard) -> Iterator[Strict]:
    server = Strict(tmp_path_factory.mktemp("strict"), consul_binary)
    started = server.start()
    guard.watch(started.pid)
    eventually("the strict server is ready", server.ready, 30)
    yield server
    started.kill()
    shutil.rmtree(server.run / "data", ignore_errors=True)


def test_the_token_travels_in_a_header_and_not_in_the_url() -> None:
    with recording() as (address, requested):
        registry = ConsulRegistry([address], token="s3cret")  # noqa: S106
        asked = questions(registry)
        for ask in asked:
            with pytest.raises(RegistryUnavailableError) as caught:
                ask()
            assert "s3cret" not in str(caught.value)
        lines = requested().split("\r\n")
    urls = [line for line in lines if line.endswith(" HTTP/1.1")]
    assert len(urls) >= len(asked)
    assert not any("s3cret" in line or "token" in line for line in urls)
    assert lines.count("X-Consul-Token: s3cret") == len(urls)


def test_a_token_lets_in_who_may(strict: Strict) -> None:
    rules = 'service_prefix "guarded" { policy = "write" } node_prefix "" { policy = "read" }'
    registry = ConsulRegistry([strict.http], token=strict.token(rules))
    instance = an_instance("guarded")
    registry.register(instance, CHECK)
    eventually("it is found", passes(registry, instance.name))
    assert registry.confirm(instance)
    with pytest.raises(RegistryError, match=r"403.*is the ACL token set, and does its policy allow this\?") as caught:
        registry.register(an_instance("elsewhere"), CHECK)
    assert not isinstance(caught.value, RegistryUnavailableError)
    registry.deregister(instance.id)


@pytest.mark.parametrize("token", ["", "5f4c1a2e-0000-4000-8000-00000000dead"])
def test_without_the_right_token_the_error_says_what_to_do(strict: Strict, token: str) -> None:
    registry = ConsulRegistry([strict.http], token=token)
    with pytest.raises(RegistryError, match=r"403.*is the ACL token set, and does its policy allow this\?") as caught:
        registry.register(an_instance("guarded"), CHECK)
    assert strict.http in str(caught.value)
    assert not token or token not in str(caught.value)


def test_the_token_s_file_is_read_again(strict: Strict, tmp_path: Path) -> None:
    file = tmp_path / "token"
    registry = ConsulRegistry([strict.http], token_file=str(file))
    with pytest.raises(RegistryError, match=r"token's file .* cannot be read"):
        registry.services()
    file.write_text("5f4c1a2e-0000-4000-8000-00000000dead\n")
    with pytest.raises(RegistryError, match="403"):
        registry.services()
    file.write_text(f"{ROOT_TOKEN}\n")
    assert "consul" in registry.services()
    watch = registry.watch("consul")
    with Following(watch, watch.close) as watched:
        watched.until("a watch is let in", lambda seen: len(seen) == 1)


def test_https_with_certificates_on_both_sides(strict: Strict) -> None:
    registry = ConsulRegistry([strict.https], token=ROOT_TOKEN, ca=strict.ca, cert=strict.cert, key=strict.key)
    instance = an_instance("over https")
    registry.register(instance, CHECK)
    eventually("it is found", passes(registry, instance.name))
    assert registry.confirm(instance)
    watch = registry.watch(instance.name)
    with Following(watch, watch.close) as watched:
        watched.until("a watch shows it", lambda seen: len(seen) == 1)
    registry.deregister(instance.id)
    named = ConsulRegistry(
        [f"https://{strict.https}"], token=ROOT_TOKEN, ca=strict.ca, cert=strict.cert, key=strict.key
    )
    assert named.services()


def test_a_server_signed_by_someone_else_is_refused(strict: Strict) -> None:
    registry = ConsulRegistry([strict.https], token=ROOT_TOKEN, ca=strict.other_ca, cert=strict.cert, key=strict.key)
    with pytest.raises(RegistryError, match=r"TLS failed: .*certificate verify failed") as caught:
        registry.services()
    assert strict.https in str(caught.value)


def test_a_server_that_asks_for_a_certificate_and_gets_none_is_an_error(strict: Strict) -> None:
    with pytest.raises(RegistryError, match=f"{strict.https}: TLS failed"):
        ConsulRegistry([strict.https], token=ROOT_TOKEN, ca=strict.ca).services()


def test_a_ca_file_that_is_not_there_is_an_error(strict: Strict, tmp_path: Path) -> None:
    with pytest.raises((RegistryError, ValueError), match=r"missing\.pem"):
        ConsulRegistry([strict.https], ca=str(tmp_path / "missing.pem")).services()


def test_http_to_an_https_port_is_an_error(strict: Strict) -> None:
    with pytest.raises(RegistryError, match=strict.https):
        ConsulRegistry([strict.https], token=ROOT_TOKEN).services()

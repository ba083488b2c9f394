"""What an API server can do to who follows it, by one that does as it is told; the real one is in tests/kind."""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from rollcall.registry import Instance, RegistryError, RegistryUnavailableError, TcpCheck, Watch, kubernetes
from rollcall.registry.kubernetes import KubernetesRegistry
from tests.waiting import free_port

SECONDS = 5.0


def a_slice(
    uid: str = "a",
    *pods: str,
    version: int = 1,
    kind: str = "IPv4",
    labels: dict[str, str] | None = None,
    ports: dict[str, int] | None = None,
    **conditions: Any,
) -> dict[str, Any]:
    """Return an EndpointSlice whose pods are ready, unless told otherwise."""
    return {
        "metadata": {
            "name": f"sum-{uid}",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {"rollcall/service": "sum", **(labels or {})},
        },
        "addressType": kind,
        "ports": [{"name": name, "port": port} for name, port in (ports or {"grpc": 8080, "metrics": 9090}).items()],
        "endpoints": [
            {
                "addresses": [f"10.0.0.{pod[-1]}" if kind == "IPv4" else f"fd00::{pod[-1]}"],
                "conditions": conditions or {"ready": True},
                "nodeName": "worker",
                "targetRef": {"kind": "Pod", "name": pod},
            }
            for pod in pods
        ],
    }


def a_list(*slices: dict[str, Any], version: int = 1) -> bytes:
    return json.dumps({"metadata": {"resourceVersion": str(version)}, "items": slices}).encode()


def event(kind: str, what: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": what}).encode() + b"\n"


class Script:
    """An API server that answers each request as the test says, in order, and the last way ever after."""

    def __init__(self) -> None:
        self.asked: queue.Queue[tuple[dict[str, str], str]] = queue.Queue()
        """The query and the token of each request."""
        self.answers: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.ended = threading.Event()
        self.counted = 0
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            paths: ClassVar[set[str]] = set()

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                assert parts.path == "/apis/discovery.k8s.io/v1/namespaces/here/endpointslices"
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                script.asked.put((query, self.headers.get("Authorization", "")))
                answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                with suppress(OSError):
                    answer(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def says(self, body: bytes, status: int = 200) -> None:
        """Answer with this, whole."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        self.answers.append(answer)

    def streams(self, *events: bytes, then: str = "hangs") -> None:
        """Answer with events, and then end, break off, or hang."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            for each in events:
                handler.wfile.write(f"{len(each):x}\r\n".encode() + each + b"\r\n")
                handler.wfile.flush()
            if then == "ends":
                handler.wfile.write(b"0\r\n\r\n")
                return
            if then == "hangs":
                self.ended.wait(60)
            handler.close_connection = True

        self.answers.append(answer)

    def is_well(self, listed: list[dict[str, Any]], added: list[dict[str, Any]]) -> None:
        """Answer as a server does: to a list with what there is, to a watch with what comes."""
        self.says(a_list(*listed, version=8))
        self.streams(*(event("ADDED", each) for each in added))
        streams, says = self.answers.pop(), self.answers.pop()
        self.answers.append(lambda handler: (streams if "watch=1" in handler.path else says)(handler))


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    threading.Thread(target=made.server.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.ended.set()
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """What a pod is told of itself; no certificate authority, as the server here speaks http."""
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "namespace").write_text("here")
    return tmp_path


@pytest.fixture
def registry(script: Script, account: Path) -> KubernetesRegistry:
    return KubernetesRegistry(script.url, account=account)


class Followed:
    """What a watch tells, as it comes."""

    def __init__(self, watch: Watch[tuple[Instance, ...]]) -> None:
        self.told: queue.Queue[list[str]] = queue.Queue()
        threading.Thread(target=self._follow, args=(watch,), daemon=True).start()

    def _follow(self, watch: Watch[tuple[Instance, ...]]) -> None:
        for instances in watch:
            self.told.put([each.id for each in instances])

    def next(self) -> list[str]:
        return self.told.get(timeout=SECONDS)


@pytest.fixture
def followed(registry: KubernetesRegistry) -> Iterator[Callable[[], Followed]]:
    watches = []

    def follow() -> Followed:
        watches.append(registry.watch("sum"))
        return Followed(watches[-1])

    yield follow
    for watch in watches:
        watch.close()


def test_what_a_slice_says_is_an_instance(script: Script, registry: KubernetesRegistry) -> None:
    labels = {"tag.rollcall/public": "true", "calls.rollcall/sum": "true", "calls.rollcall/hello": "true"}
    script.says(a_list(a_slice("a", "pod-1", labels=labels)))
    (found,) = registry.instances("sum")
    assert found == Instance(
        id="pod-1",
        name="sum",
        address="10.0.0.1",
        port=8080,
        tags=("public",),
        meta={"calls": "hello,sum", "http_port": "9090", "node": "worker", "protocol": "grpc"},
    )
    assert found.meta == {"calls": "hello,sum", "http_port": "9090", "node": "worker", "protocol": "grpc"}


@pytest.mark.parametrize(
    ("ports", "port", "protocol"),
    [
        ({"metrics": 1, "jsonrpc": 2}, 2, "jsonrpc"),
        ({"http": 3, "admin": 1}, 3, "http"),
        ({"http": 3, "jsonrpc": 4}, 4, "jsonrpc"),
        ({"other": 6, "another": 5}, 5, None),
        ({"": 5}, 5, None),
        ({"other": 6, "metrics": 1}, 6, None),
    ],
)
def test_the_port_to_call_is_the_one_named_as_a_protocol(
    script: Script, registry: KubernetesRegistry, ports: dict[str, int], port: int, protocol: str | None
) -> None:
    script.says(a_list(a_slice("a", "pod-1", ports=ports)))
    (found,) = registry.instances("sum")
    assert (found.port, found.meta.get("protocol")) == (port, protocol)


def test_what_is_not_ready_does_not_pass(script: Script, registry: KubernetesRegistry) -> None:
    slices = [
        a_slice("a", "pod-1", ready=False),
        a_slice("b", "pod-2"),
        a_slice("c", "pod-3", ready=False, serving=True, terminating=True),
        a_slice("d", "pod-4", ready=None),
    ]
    script.says(a_list(*slices))
    assert [each.id for each in registry.instances("sum")] == ["pod-2", "pod-4"]
    found = registry.instances("sum", failing=True)
    assert [(each.id, each.passing) for each in found] == [
        ("pod-1", False),
        ("pod-2", True),
        ("pod-3", False),
        ("pod-4", True),
    ]


def test_an_instance_in_two_slices_is_one(script: Script, registry: KubernetesRegistry) -> None:
    """While it is moved it may be in both; and it is where it has addresses of both families."""
    slices = [
        a_slice("a", "pod-1", ready=False),
        a_slice("b", "pod-1"),
        a_slice("c", "pod-2", ready=False),
        a_slice("d", "pod-2", kind="IPv6"),
        a_slice("e", "pod-3", kind="IPv6"),
    ]
    for each in (slices, slices[::-1]):
        script.answers.clear()
        script.says(a_list(*each))
        found = registry.instances("sum", failing=True)
        assert [(one.id, one.address, one.passing) for one in found] == [
            ("pod-1", "10.0.0.1", True),
            ("pod-2", "10.0.0.2", False),
            ("pod-3", "fd00::3", True),
        ]


def test_a_pod_behind_two_services_is_an_instance_of_each(script: Script, registry: KubernetesRegistry) -> None:
    script.says(a_list(a_slice("a", "pod-1"), a_slice("b", "pod-1", labels={"rollcall/service": "admin"})))
    assert registry.services() == ("admin", "sum")


def test_what_is_about_to_go_does_not_pass_even_where_its_service_says_so(
    script: Script, registry: KubernetesRegistry
) -> None:
    """As one with publishNotReadyAddresses does."""
    script.says(a_list(a_slice("a", "pod-1", ready=True, terminating=True)))
    assert registry.instances("sum") == ()


def test_what_cannot_be_called_is_left_out(
    script: Script, registry: KubernetesRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        a_slice("b", "pod-2", kind="FQDN"),
        a_slice("c", "pod-3", ports={"metrics": 1}),
        {**a_slice("f", "pod-6"), "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}]},
        {**a_slice("d", "pod-4"), "endpoints": [{"addresses": []}, None, {"targetRef": "what"}]},
        {**a_slice("e", "pod-5"), "endpoints": None, "ports": None},
    ]
    script.says(a_list(a_slice("a", "pod-1"), *bad))
    assert [each.id for each in registry.instances("sum", failing=True)] == ["pod-1"]
    assert "expected a TCP port beside metrics" in caplog.text
    caplog.clear()
    registry.instances("sum")
    assert not caplog.messages, "said once"


def test_an_address_without_a_pod_has_itself_as_its_id(script: Script, registry: KubernetesRegistry) -> None:
    found = a_slice("a", "pod-1")
    del found["endpoints"][0]["targetRef"]
    script.says(a_list(found))
    assert [each.id for each in registry.instances("sum")] == ["10.0.0.1:8080"]


def test_names_are_of_services_that_have_an_instance(script: Script, registry: KubernetesRegistry) -> None:
    other = a_slice("b", "pod-2", labels={"rollcall/service": "hello"}, ready=False)
    empty = a_slice("c", labels={"rollcall/service": "empty"})
    script.says(a_list(a_slice("a", "pod-1"), other, empty))
    assert registry.services() == ("hello", "sum")


@pytest.mark.parametrize(
    ("name", "tag", "selector"),
    [
        ("sum", "", "rollcall/service=sum"),
        ("sum", "public", "rollcall/service=sum,tag.rollcall/public"),
        ("grpc And consul", "", "rollcall/service,!rollcall/service"),
        ("sum", "eu,west", "rollcall/service,!rollcall/service"),
        ("sum\n", "", "rollcall/service,!rollcall/service"),
        ("x" * 64, "", "rollcall/service,!rollcall/service"),
    ],
)
def test_the_server_selects(script: Script, registry: KubernetesRegistry, name: str, tag: str, selector: str) -> None:
    script.says(a_list())
    assert registry.instances(name, tag) == ()
    assert script.asked.get()[0] == {"labelSelector": selector, "resourceVersion": "0"}
    registry.instances(name, tag, certain=True)
    assert script.asked.get()[0] == {"labelSelector": selector}, "by etcd's quorum"


def test_the_token_is_read_anew_each_time(
    script: Script, registry: KubernetesRegistry, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (account / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(account / "netrc"))
    script.says(a_list())
    registry.services()
    (account / "token").write_text("another")
    registry.services()
    assert [script.asked.get()[1], script.asked.get()[1]] == ["Bearer secret", "Bearer another"]


def test_a_watch_tells_what_is_there_and_then_each_change(script: Script, followed: Callable[[], Followed]) -> None:
    script.says(a_list(a_slice("a", "pod-1"), version=7))
    script.streams(
        event("BOOKMARK", {"metadata": {"resourceVersion": "8"}}),
        event("ADDED", a_slice("b", "pod-2", version=9)),
        event("MODIFIED", a_slice("a", "pod-1", "pod-3", version=10)),
        event("MODIFIED", a_slice("a", "pod-1", "pod-3", version=11)),
        event("DELETED", a_slice("b", "pod-2", version=12)),
    )
    follower = followed()
    assert [follower.next() for _ in range(4)] == [
        ["pod-1"],
        ["pod-1", "pod-2"],
        ["pod-1", "pod-2", "pod-3"],
        ["pod-1", "pod-3"],
    ]
    assert script.asked.get()[0]["resourceVersion"] == "0"
    asked = script.asked.get()[0]
    assert (asked["resourceVersion"], asked["watch"], asked["timeoutSeconds"]) == ("7", "1", "10")


@pytest.mark.parametrize("then", ["ends", "breaks"])
def test_an_answer_that_ends_is_gone_on_with_from_there(
    script: Script, followed: Callable[[], Followed], then: str
) -> None:
    script.says(a_list(a_slice("a", "pod-1"), version=7))
    script.streams(event("ADDED", a_slice("b", "pod-2", version=9)), then=then)
    script.streams(event("DELETED", a_slice("a", "pod-1", version=10)))
    follower = followed()
    assert [follower.next() for _ in range(3)] == [["pod-1"], ["pod-1", "pod-2"], ["pod-2"]]
    assert [script.asked.get()[0]["resourceVersion"] for _ in range(3)] == ["0", "7", "9"]


@pytest.mark.parametrize("how", ["status", "event"])
def test_where_the_past_is_forgotten_all_is_asked_for_anew(
    script: Script, followed: Callable[[], Followed], how: str
) -> None:
    gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
    script.says(a_list(a_slice("a", "pod-1"), version=7))
    if how == "status":
        script.says(json.dumps(gone).encode(), 410)
    else:
        script.streams(event("ERROR", gone), then="ends")
    script.says(a_list(a_slice("b", "pod-2"), version=70))
    script.streams()
    follower = followed()
    assert [follower.next(), follower.next()] == [["pod-1"], ["pod-2"]], "what has gone meanwhile is forgotten"
    asked = [script.asked.get(timeout=SECONDS)[0] for _ in range(4)]
    assert [each.get("resourceVersion") for each in asked] == ["0", "7", None, "70"], "and nothing older is taken"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (500, b'{"message": "etcdserver: request timed out"}'),
        (429, b"slow down"),
        (403, b'{"message": "endpointslices is forbidden"}'),
        (302, b""),
        (200, b"<html>"),
        (200, b"[]"),
        (200, b'{"items": [{}], "metadata": {}}'),
    ],
)
def test_a_watch_rides_out_a_server_that_is_not_well(
    script: Script, followed: Callable[[], Followed], caplog: pytest.LogCaptureFixture, status: int, said: bytes
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        script.says(said, status)
    script.says(a_list(a_slice("a", "pod-1"), version=7))
    for _ in range(3):
        script.says(said, status)
    script.is_well([a_slice("a", "pod-1")], [a_slice("b", "pod-2", version=9)])
    follower = followed()
    assert [follower.next(), follower.next()] == [["pod-1"], ["pod-1", "pod-2"]], "what was known is kept"
    said_it = [each for each in caplog.messages if "nothing is heard of 'sum'; keeping what is known" in each]
    assert len(said_it) == 2, caplog.messages


@pytest.mark.parametrize(("status", "code"), [(400, 400), (200, 504)])
def test_a_watch_that_is_refused_begins_anew(
    script: Script, followed: Callable[[], Followed], status: int, code: int
) -> None:
    said = {"kind": "Status", "code": code, "message": "invalid resource version"}
    script.says(a_list(a_slice("a", "pod-1"), version=7))
    script.says(json.dumps(said).encode() if status != 200 else event("ERROR", said), status)
    script.says(a_list(a_slice("b", "pod-2"), version=70))
    script.streams()
    follower = followed()
    assert [follower.next(), follower.next()] == [["pod-1"], ["pod-2"]]
    asked = [script.asked.get(timeout=SECONDS)[0] for _ in range(3)]
    assert [each.get("resourceVersion") for each in asked] == ["0", "7", None]


def test_a_watch_does_not_press_a_server_that_ends_each_answer_at_once(
    script: Script, followed: Callable[[], Followed]
) -> None:
    script.says(a_list(a_slice("a", "pod-1"), version=7))
    script.streams(then="ends")
    assert followed().next() == ["pod-1"]
    until = time.monotonic() + 2.0
    while (left := until - time.monotonic()) > 0:
        with suppress(queue.Empty):
            script.asked.get(timeout=left)
            script.counted += 1
    assert 3 <= script.counted <= 12


def test_a_token_that_cannot_be_one_is_not_shown(
    script: Script, registry: KubernetesRegistry, account: Path, followed: Callable[[], Followed]
) -> None:
    (account / "token").write_text("secrét")
    with pytest.raises(RegistryError, match="expected the token to be one line of printable ASCII") as refused:
        registry.services()
    assert "secr" not in str(refused.value)
    script.says(a_list(a_slice("a", "pod-1")))
    script.streams()
    follower = followed()
    (account / "token").write_text("secret")
    assert follower.next() == ["pod-1"], "a watch rides that out, too"


def test_a_token_is_not_sent_in_the_clear_to_another_machine(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def refuse(_: object, request: Any, **__: object) -> None:
        sent.append(request.headers.get("Authorization"))
        raise requests.ConnectionError

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", refuse)
    for url in ("http://example.org:8001", "https://example.org:8001"):
        with pytest.raises(RegistryUnavailableError):
            KubernetesRegistry(url, account=account).services()
    assert sent == [None, "Bearer secret"]


def test_a_watch_leaves_a_server_that_hangs(
    script: Script, followed: Callable[[], Followed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "WATCH_WAIT", -4)  # with ANSWER_TIMEOUT, a second
    script.says(a_list(a_slice("a", "pod-1"), version=7))
    script.streams(event("ADDED", a_slice("b", "pod-2", version=9)))
    script.streams(event("DELETED", a_slice("a", "pod-1", version=10)))
    follower = followed()
    assert [follower.next() for _ in range(3)] == [["pod-1"], ["pod-1", "pod-2"], ["pod-2"]]


def test_who_may_not_ask_is_told_what_it_takes(script: Script, registry: KubernetesRegistry) -> None:
    script.says(b'{"message": "endpointslices is forbidden: User \\"system:anonymous\\""}', 403)
    with pytest.raises(RegistryError, match=r"403 endpointslices is forbidden.*get, list and watch.*namespace here"):
        registry.instances("sum")
    (problem,) = registry.diagnose()
    assert "ServiceAccount" in problem


def test_a_server_that_is_away_is_unavailable(account: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RegistryUnavailableError, match=f"Kubernetes at {url}: connection refused"):
        KubernetesRegistry(url, account=account).services()


def test_without_a_namespace_there_is_nowhere_to_look(script: Script, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="expected a namespace to look in"):
        KubernetesRegistry(script.url, account=tmp_path).services()


def test_a_clock_that_is_apart_is_found(script: Script, registry: KubernetesRegistry) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = a_list()
        handler.send_response_only(200)
        handler.send_header("Date", "Thu, 01 Jan 2026 00:00:00 GMT")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    script.answers.append(answer)
    (problem,) = registry.diagnose()
    assert "behind this machine's" in problem
    script.answers.clear()
    script.says(a_list())
    assert registry.diagnose() == ()


def test_an_instances_own_registration_is_kubernetes_to_make(script: Script, registry: KubernetesRegistry) -> None:
    """So nothing is asked, and who calls nobody needs no token."""
    instance = Instance(id="pod-1", name="sum", address="10.0.0.1", port=8080)
    assert not registry.confirm(instance)
    registry.register(instance, TcpCheck(), passing=True)
    assert registry.confirm(instance)
    confirmed: queue.Queue[bool] = queue.Queue()
    threading.Thread(target=lambda: confirmed.put(registry.confirm(instance))).start()
    registry.deregister("pod-1")
    assert confirmed.get(timeout=SECONDS) is False
    registry.deregister("pod-1")
    registry.register(instance, TcpCheck())
    assert registry.confirm(instance)
    assert script.asked.empty()


def test_anothers_is_removed_with_its_pod(script: Script, registry: KubernetesRegistry) -> None:
    script.says(a_list(a_slice("a", "pod-1")))
    with pytest.raises(RegistryError, match="kubectl delete pod pod-1"):
        registry.deregister("pod-1")
    registry.deregister("pod-2")


@pytest.mark.parametrize(
    "api", ["127.0.0.1:8001", "ftp://a", "http://", "http://a:b", "https://token@host", "http://a?b"]
)
def test_what_cannot_be_an_api_is_refused(api: str) -> None:
    with pytest.raises(ValueError, match="expected the URL of Kubernetes' API") as refused:
        KubernetesRegistry(api)
    assert "token" not in str(refused.value)


def test_a_pod_is_told_where_the_api_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert str(KubernetesRegistry()) == "Kubernetes at https://10.96.0.1:443"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    assert str(KubernetesRegistry()) == "Kubernetes at https://[fd00::1]:443"
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(ValueError, match="expected to run in a pod, or the URL of Kubernetes' API"):
        KubernetesRegistry()


def test_a_closed_watch_ends(script: Script, registry: KubernetesRegistry) -> None:
    script.says(a_list(a_slice("a", "pod-1"), version=7))
    script.streams(then="ends")
    with closing(registry.watch("sum")) as watch:
        told = iter(watch)
        assert [each.id for each in next(told)] == ["pod-1"]
    assert list(told) == []

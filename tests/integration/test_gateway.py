"""The gateway as its users meet it, in front of real services that real Consul servers know of."""

import json
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from tests.integration.fleet import Fleet
from tests.waiting import eventually

PUBLIC = ("--tags", "public")
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Gateway:
    """One instance, and clients of it."""

    def __init__(self, fleet: Fleet, instance: str) -> None:
        self.fleet, self.instance = fleet, instance
        found: Any = eventually(f"{instance} serves", lambda: re.search(r" serves at (\S+),", fleet.log(instance)), 60)
        self.address = str(found[1])
        self.http = httpx.Client(base_url=f"http://{self.address}", timeout=10)

    def post(self, path: str, message: object = None, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(f"/v1/{path}", json={} if message is None else message, headers=named)

    def socket(self, path: str, **arguments: Any) -> Any:
        return connect(f"ws://{self.address}/v1/{path}", **arguments)

    def knows(self, *paths: str) -> None:
        """Wait until it has learnt of these methods."""
        for path in paths:
            eventually(f"{path} is known", lambda path=path: self.http.put(f"/v1/{path}").status_code == 405, 60)  # type: ignore[misc]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, module_cluster: Cluster, guard: Guard) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("gateway"), module_cluster, guard)
    try:
        for instance in ("sum-1", "sum-2", "greeter-1", "greeter-2", "hello-1", "person-1"):
            fleet.start(instance, *PUBLIC)
        fleet.start("student-1", *PUBLIC, "--database", f"sqlite:///{fleet.run}/student.db")
        fleet.start("telling-1", *PUBLIC, module="tests.integration.telling_greeter")
        fleet.start("gateway-1")
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(scope="module")
def gateway(system: Fleet) -> Gateway:
    gateway = Gateway(system, "gateway-1")
    gateway.knows("sum/Add", "greeter/Call", "hello/HelloWorld", "person/Do", "student/Get", "telling/Call")
    return gateway


def is_problem(answer: httpx.Response, status: int, code: str = "") -> dict[str, Any]:
    """See that an answer is a problem of this kind; return it."""
    found: dict[str, Any] = answer.json()
    assert answer.status_code == status, found
    assert answer.headers["content-type"] == "application/problem+json"
    assert (found["status"], found.get("code", ""), found["type"]) == (status, code, "about:blank")
    return found


# Calls.


def test_a_method_is_called_by_post(gateway: Gateway) -> None:
    answer = gateway.post("sum/Add", {"num1": 333, "num2": 666})
    assert (answer.status_code, answer.text) == (200, '{"res":"999"}\n')
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch("sum-[12]", answer.headers["rollcall-instance"])


def test_it_is_found_under_its_full_name_too(gateway: Gateway) -> None:
    assert gateway.post("sum/sum.v1.SumService.Add", {"num1": 1}).json() == {"res": "1"}


def test_a_message_is_what_protobuf_says_it_is_in_json(gateway: Gateway) -> None:
    student = {
        "name": "李白",
        "age": "33",
        "p": {"weight": 60},
        "score": [90, 85, 77],
        "w": "WEEK_SUNDAY",
        "teacher": "贺知章",
    }
    stored = gateway.post("student/AddFunc", student).json()
    assert stored == student | {"age": 33, "id": stored["id"], "total": "252"}
    assert gateway.post("student/Get", {"id": stored["id"]}).json() == {"student": stored}
    # Names as the proto has them, and numbers of enums, are taken as well.
    assert len(gateway.post("student/List", {"page_size": 1}).json()["students"]) == 1
    assert gateway.post("student/AddFunc", {"name": "x", "w": 3}).json()["w"] == "WEEK_WEDNESDAY"


def test_json_rpc_is_called_by_the_same_shape_of_url(gateway: Gateway) -> None:
    answer = gateway.post("hello/HelloWorld", "李白")
    assert (answer.status_code, answer.json()) == (200, "李白 你好")
    assert answer.headers["rollcall-instance"] == "hello-1"
    found = is_problem(gateway.post("hello/HelloWorld", 5), 400, "INVALID_ARGUMENT")
    assert "string" in found["detail"]


def test_what_is_new_in_consul_can_be_called_and_what_is_not_public_cannot(gateway: Gateway) -> None:
    fleet = gateway.fleet
    before = fleet.environment
    fleet.environment = {**before, "PYTHONPATH": str(fleet.run)}
    for name, flags in (("secret", ()), ("late", PUBLIC)):
        (fleet.run / f"{name}.py").write_text(
            "import rollcall\nfrom contracts.sum.v1 import sum_pb2_grpc\nfrom services.sum.handler import Sum\n"
            f"service = rollcall.Service('{name}')\n"
            "service.add(sum_pb2_grpc.add_SumServiceServicer_to_server, Sum())\nservice.run()\n"
        )
        fleet.start(f"{name}-1", *flags, module=name)
    fleet.environment = before
    gateway.knows("late/Add")
    assert gateway.post("late/Add", {"num1": 4, "num2": 5}).json() == {"res": "9"}
    assert "late.Add" in gateway.http.get("/openapi.json").text
    eventually("secret is registered", lambda: fleet.passing("secret"), 30)
    assert "secret" not in is_problem(gateway.post("nothing/Add"), 404)["detail"]
    is_problem(gateway.post("secret/Add"), 404)
    assert "secret" not in gateway.http.get("/openapi.json").text


def test_a_new_version_of_a_contract_is_called_without_a_restart(gateway: Gateway) -> None:
    fleet = gateway.fleet
    assert is_problem(gateway.post("sum/Multiply"), 404)["detail"].endswith("it has: Add")
    fleet.start("sum-3", *PUBLIC, module="tests.integration.newer_sum")
    gateway.knows("sum/Multiply")
    for instance in ("sum-1", "sum-2"):
        fleet.stop(instance)
    eventually("they have gone", lambda: fleet.passing("sum") == {"sum-3"})
    assert gateway.post("sum/Multiply", {"factors": [6, 7]}).json() == {"product": "42"}
    assert "sum.Multiply" in gateway.http.get("/openapi.json").text
    for instance in ("sum-1", "sum-2"):  # and back
        fleet.start(instance)
    fleet.stop("sum-3")
    eventually("it is as it was", lambda: gateway.post("sum/Multiply").status_code == 404, 20)
    assert gateway.post("sum/Add", {"num1": 1, "num2": 2}).json() == {"res": "3"}


# What goes wrong.


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"num1": "x"}, "num1"),
        ({"num1": 2**31}, "num1"),
        ({"num1": 1.5}, "num1"),
        ({"num3": 1}, "num3"),
        ([], ""),
        ("text", ""),
    ],
)
def test_a_message_of_another_form_is_refused_by_field(gateway: Gateway, message: object, field: str) -> None:
    found = is_problem(gateway.post("sum/Add", message), 400, "INVALID_ARGUMENT")
    assert [each["field"] for each in found["violations"]] == [field]


def test_what_the_service_finds_wrong_is_told(gateway: Gateway) -> None:
    found = is_problem(gateway.post("student/AddFunc", {"age": -1}), 400, "INVALID_ARGUMENT")
    assert {each["field"]: each["description"] for each in found["violations"]} == {
        "name": "must not be empty",
        "age": "must be from 0 to 150, found -1",
    }


def test_a_status_becomes_its_http_status(gateway: Gateway) -> None:
    answer = gateway.post("student/Get", {"id": "4711"})
    assert is_problem(answer, 404, "NOT_FOUND")["title"] == "Not Found"
    assert answer.headers["rollcall-instance"] == "student-1"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"num1": NaN}', b"[" * 100_000])
def test_what_is_no_json_is_refused(gateway: Gateway, body: bytes) -> None:
    answer = gateway.http.post("/v1/sum/Add", content=body, headers={"content-type": "application/json"})
    assert "expected JSON" in is_problem(answer, 400, "INVALID_ARGUMENT")["detail"]


def test_unknown_names_are_told_what_there_is(gateway: Gateway) -> None:
    assert "greeter" in is_problem(gateway.post("gretter/Call"), 404)["detail"]
    assert "Call" in is_problem(gateway.post("greeter/call"), 404)["detail"]
    is_problem(gateway.http.get("/nothing/here"), 404)


def test_other_verbs_are_told_the_right_one(gateway: Gateway) -> None:
    for path, verb, right in (
        ("sum/Add", "GET", "POST"),
        ("greeter/BidiStream", "POST", "GET"),
        ("sum/Add", "PUT", "POST"),
    ):
        answer = gateway.http.request(verb, f"/v1/{path}")
        is_problem(answer, 405)
        assert answer.headers["allow"] == right
    answer = gateway.http.post("/openapi.json")
    is_problem(answer, 405)
    assert "GET" in answer.headers["allow"]


def test_pages_can_be_asked_for_their_headers_alone(gateway: Gateway) -> None:
    for path in ("/", "/docs", "/openapi.json", "/page/page.js"):
        whole, head = gateway.http.get(path), gateway.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-type", "content-length"):
            assert head.headers[name] == whole.headers[name]


def test_a_slash_too_many_is_redirected(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/sum/Add/", json={})
    assert (answer.status_code, answer.headers["location"]) == (307, f"http://{gateway.address}/v1/sum/Add")


def test_a_body_of_another_kind_is_refused(gateway: Gateway) -> None:
    found = is_problem(gateway.http.post("/v1/sum/Add", data={"num1": "1"}), 415)
    assert "application/json" in found["detail"]
    is_problem(gateway.post("sum/Add", content_encoding="gzip"), 415)


def test_a_body_that_is_too_large_is_refused(gateway: Gateway) -> None:
    large = b" " * 1_100_000 + b"{}"
    json_type = {"content-type": "application/json"}
    is_problem(gateway.http.post("/v1/sum/Add", content=large, headers=json_type), 413)
    is_problem(gateway.http.post("/v1/sum/Add", content=iter([large]), headers=json_type), 413)  # of unknown length


# Along the chain.


def test_a_deadline_is_kept_along_the_chain(gateway: Gateway) -> None:
    fleet = gateway.fleet
    for instance in ("sum-1", "sum-2"):
        fleet.signal(instance, signal.SIGSTOP)
    try:
        for name, value in (("x_request_timeout", "0.5"), ("grpc_timeout", "500m"), ("x_request_timeout", "500ms")):
            begun = time.monotonic()
            is_problem(
                gateway.post("student/AddFunc", {"name": "x", "score": [1, 2]}, **{name: value}),
                504,
                "DEADLINE_EXCEEDED",
            )
            assert 0.4 < time.monotonic() - begun < 3
    finally:
        for instance in ("sum-1", "sum-2"):
            fleet.signal(instance, signal.SIGCONT)
    eventually("sum passes", lambda: fleet.passing("sum") == {"sum-1", "sum-2"})
    for none in ("0", "0.000001"):
        is_problem(gateway.post("sum/Add", {}, x_request_timeout=none), 504, "DEADLINE_EXCEEDED")
        is_problem(gateway.post("greeter/ServerStream", {}, x_request_timeout=none), 504, "DEADLINE_EXCEEDED")
    for bad in ("soon", "-1", "1h"):
        assert (
            "expected"
            in is_problem(gateway.post("sum/Add", {}, x_request_timeout=bad), 400, "INVALID_ARGUMENT")["detail"]
        )


def test_the_trace_and_the_request_are_the_callers(gateway: Gateway) -> None:
    answer = gateway.post("sum/Add", {}, traceparent=TRACEPARENT, x_request_id="mine")
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["traceparent"].startswith(f"00-{TRACE}-")
    for instance in (answer.headers["rollcall-instance"], gateway.instance):
        eventually("it is logged", lambda instance=instance: f"trace={TRACE}" in gateway.fleet.log(instance))  # type: ignore[misc]
    answer = gateway.post("sum/Add")
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", answer.headers["traceparent"])
    assert answer.headers["x-request-id"]


def test_only_headers_on_the_list_reach_a_service(gateway: Gateway) -> None:
    headers = {
        "authorization": "secret",
        "cookie": "a=b",
        "x-mine": "1",
        "rollcall-instance": "x",
        "idempotency-key": "k",
    }
    answer = gateway.http.post(
        "/v1/telling/Call", json={"name": "x"}, headers=headers | {"tracestate": "a=1", "traceparent": TRACEPARENT}
    )
    name, told = json.loads(answer.json()["msg"])
    assert name == "x"
    told = {key: value for key, value in told if key != "user-agent"}
    assert told.pop("traceparent").startswith(f"00-{TRACE}-")
    assert told == {"idempotency-key": "k", "tracestate": "a=1", "x-request-id": answer.headers["x-request-id"]}
    is_problem(gateway.http.post("/v1/sum/Add", json={}, headers=[(b"idempotency-key", b"\xc3\xa9")]), 400)
    is_problem(gateway.post("sum/Add", {}, idempotency_key="k" * 2000), 400)


def test_an_idempotency_key_makes_a_retry_safe(gateway: Gateway) -> None:
    stored = [gateway.post("student/AddFunc", {"name": "once"}, idempotency_key="once").json() for _ in range(2)]
    assert stored[0] == stored[1]


# Streams.


def events(gateway: Gateway, path: str, message: object, **headers: str) -> list[tuple[str, Any]]:
    with gateway.http.stream("POST", f"/v1/{path}", json=message, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.read()
        return list(parsed(answer.iter_lines()))


def parsed(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    name = "message"
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
        elif not line:
            name = "message"


def test_a_server_stream_is_server_sent_events(gateway: Gateway) -> None:
    *messages, end = events(gateway, "greeter/ServerStream", {"count": 1000})
    assert messages == [("message", {"count": str(n)}) for n in range(1000)] or messages == [
        ("message", {"count": n}) for n in range(1000)
    ]
    assert end[0] == "end"
    assert re.fullmatch("greeter-[12]", end[1]["instance"])
    assert events(gateway, "greeter/ServerStream", {})[0][0] == "end"


def test_a_stream_that_fails_at_once_has_a_status(gateway: Gateway) -> None:
    found = is_problem(gateway.post("greeter/ServerStream", {"count": -1}), 400, "INVALID_ARGUMENT")
    assert found["violations"][0]["field"] == "count"


def test_a_stream_that_breaks_says_so(gateway: Gateway) -> None:
    fleet = gateway.fleet
    with gateway.http.stream("POST", "/v1/greeter/ServerStream", json={"count": 10_000_000}) as answer:
        found = parsed(answer.iter_lines())
        assert next(found)[0] == "message"
        for instance in ("greeter-1", "greeter-2"):
            fleet.kill(instance)
        *_, last = found
    for instance in ("greeter-1", "greeter-2"):
        fleet.start(instance)
    eventually("they are back", lambda: fleet.passing("greeter") == {"greeter-1", "greeter-2"}, 30)
    # A stream that is given no deadline waits for nobody.
    eventually("streams reach them", lambda: gateway.post("greeter/ServerStream").status_code == 200, 30)
    assert (last[0], last[1]["status"], last[1]["code"]) == ("error", 503, "UNAVAILABLE")


def test_a_stream_ends_by_its_deadline(gateway: Gateway) -> None:
    *_, last = events(gateway, "greeter/ServerStream", {"count": 10_000_000}, **{"x-request-timeout": "3"})
    assert (last[0], last[1]["code"]) == ("error", "DEADLINE_EXCEEDED")


def test_a_client_stream_is_a_websocket(gateway: Gateway) -> None:
    with gateway.socket("greeter/ClientStream") as socket:
        for _ in range(100):
            socket.send('{"stroke": 7}')
        socket.send("")
        assert json.loads(socket.recv()) in ({"result": {"count": 100}}, {"result": {"count": "100"}})
        assert re.fullmatch('{"end":{"instance":"greeter-[12]"}}', str(socket.recv()))
        with pytest.raises(ConnectionClosed):
            socket.recv()
    assert socket.close_code == 1000


def test_a_bidirectional_stream_is_a_websocket(gateway: Gateway) -> None:
    with gateway.socket("greeter/BidiStream") as socket:
        for stroke in range(100):
            socket.send(json.dumps({"stroke": stroke}))
            assert int(json.loads(socket.recv())["result"]["stroke"]) == stroke
        socket.send("")
        assert "end" in json.loads(socket.recv())


@pytest.mark.parametrize("frame", ["{", '{"stroke": "x"}', '{"nothing": 1}', b"{}"])
def test_a_bad_message_ends_a_websocket_with_what_is_wrong(gateway: Gateway, frame: str | bytes) -> None:
    with gateway.socket("greeter/BidiStream") as socket:
        socket.send(frame)
        assert json.loads(socket.recv())["error"]["code"] == "INVALID_ARGUMENT"
        with pytest.raises(ConnectionClosed):
            socket.recv()
    assert (socket.close_code, socket.close_reason) == (4003, "INVALID_ARGUMENT")


def test_a_websocket_is_refused_with_a_problem(gateway: Gateway) -> None:
    for path, origin, status in (
        ("greeter/Nothing", None, 404),
        ("sum/Add", None, 400),
        ("greeter/BidiStream", "http://evil.example", 403),
    ):
        with pytest.raises(InvalidStatus) as refused:
            gateway.socket(path, origin=origin)
        assert (refused.value.response.status_code, json.loads(refused.value.response.body)["status"]) == (
            status,
            status,
        )
    with gateway.socket("greeter/BidiStream", origin=f"http://{gateway.address}") as socket:
        socket.send("")
        assert "end" in json.loads(socket.recv())
    answer = gateway.http.get("/v1/greeter/BidiStream")
    is_problem(answer, 426)
    assert answer.headers["upgrade"] == "websocket"


def test_a_client_that_goes_ends_its_call(gateway: Gateway) -> None:
    fleet = gateway.fleet
    before = sum(fleet.log(f"greeter-{n}").count("ServerStream code=CANCELLED") for n in (1, 2))
    with gateway.http.stream("POST", "/v1/greeter/ServerStream", json={"count": 10_000_000}) as answer:
        next(answer.iter_lines())
    with gateway.socket("greeter/BidiStream") as socket:
        socket.send('{"stroke": 1}')
        socket.recv()

    def ended() -> bool:
        logs = [fleet.log(f"greeter-{n}") for n in (1, 2)]
        return sum(log.count("ServerStream code=CANCELLED") for log in logs) > before and any(
            "BidiStream code=CANCELLED" in log for log in logs
        )

    eventually("both have ended at greeter", ended)


# Limits, and what browsers are told.


def test_beyond_the_limits_requests_are_told_to_come_again(system: Fleet) -> None:
    system.start("gateway-2", "--max-calls", "1", "--max-streams", "1")
    other = Gateway(system, "gateway-2")
    other.knows("sum/Add", "greeter/BidiStream")
    for instance in ("sum-1", "sum-2"):
        system.signal(instance, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda _: other.post("sum/Add", {}, x_request_timeout="1"), range(4)))
    finally:
        for instance in ("sum-1", "sum-2"):
            system.signal(instance, signal.SIGCONT)
    assert sorted(answer.status_code for answer in answers) == [429, 429, 429, 504]
    assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 429} == {"1"}
    with other.socket("greeter/BidiStream") as socket:
        is_problem(other.post("greeter/ServerStream", {"count": 1}), 429)
        with pytest.raises(InvalidStatus) as refused:
            other.socket("greeter/BidiStream")
        assert refused.value.response.status_code == 429
        socket.send("")
        assert "end" in json.loads(socket.recv())
    eventually("it is free again", lambda: other.post("greeter/ServerStream", {"count": 1}).status_code == 200)
    system.stop("gateway-2")


def test_a_draining_gateway_ends_its_streams_with_advice(system: Fleet) -> None:
    system.start("gateway-3", "--drain", "0.2", "--grace", "1")
    other = Gateway(system, "gateway-3")
    other.knows("greeter/BidiStream", "greeter/ServerStream")
    with other.socket("greeter/BidiStream") as socket:
        socket.send('{"stroke": 1}')
        assert "result" in json.loads(socket.recv())
        with ThreadPoolExecutor() as pool:
            stopping = pool.submit(system.stop, "gateway-3")
            found = json.loads(socket.recv(timeout=20))
            stopping.result()
        assert (found["error"]["code"], found["error"]["status"]) == ("UNAVAILABLE", 503)
        with pytest.raises(ConnectionClosed):
            socket.recv()
    assert socket.close_code == 1012


def test_a_name_that_is_not_the_gateways_is_refused(gateway: Gateway) -> None:
    """A page at a name of its own could have that lead here, and would count as the gateway's."""
    for host, status in (("evil.example:8541", 421), ("localhost", 200), ("[::1]:80", 200), ("127.0.0.1", 200)):
        assert gateway.http.post("/v1/sum/Add", json={}, headers={"host": host}).status_code == status
    with pytest.raises(InvalidStatus) as refused:
        gateway.socket("greeter/BidiStream", additional_headers={"Host": "evil.example"})
    assert refused.value.response.status_code in (400, 421)  # it sends two, which are no request


def test_who_is_not_public_is_not_named_when_nobody_can_be_reached(gateway: Gateway) -> None:
    fleet = gateway.fleet
    fleet.kill("person-1")
    eventually("nobody is there", lambda: gateway.post("person/Do").status_code == 503, 40)
    problem = is_problem(gateway.post("person/Do"), 503, "UNAVAILABLE")
    assert problem["detail"] == "no instance of the service could be reached; try again"
    fleet.start("person-1")
    eventually("it is back", lambda: fleet.passing("person"), 30)


def test_browsers_are_told_to_be_strict(gateway: Gateway) -> None:
    for path in ("/", "/docs", "/openapi.json", "/nothing"):
        headers = gateway.http.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_other_origins_are_let_in_only_when_they_are_on_the_list(system: Fleet, gateway: Gateway) -> None:
    system.start("gateway-4", "--cors-origins", "https://friend.example")
    friendly = Gateway(system, "gateway-4")
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for where, origin, allowed in (
        (gateway, "https://friend.example", None),
        (friendly, "https://friend.example", "https://friend.example"),
        (friendly, "https://evil.example", None),
    ):
        answer = where.http.options("/v1/sum/Add", headers={"origin": origin, **asked})
        assert answer.headers.get("access-control-allow-origin") == allowed
    system.stop("gateway-4")


def test_the_pages_need_no_network(gateway: Gateway) -> None:
    """Whatever a page refers to is here."""
    for page in ("/", "/docs"):
        text = gateway.http.get(page).text
        references = re.findall(r'(?:src|href)="([^"]+)"', text)
        assert references
        for reference in references:
            assert not re.match("(https?:)?//", reference), reference
            if not reference.startswith("#"):
                with gateway.http.stream("GET", str(httpx.URL(page).join(reference))) as answer:
                    assert answer.status_code == 200, reference


def test_it_drains_and_ends_well_with_a_page_open(system: Fleet) -> None:
    """Who looks at the live map does not hold it back for the whole grace, of 20 s."""
    system.start("gateway-5")
    other = Gateway(system, "gateway-5")
    eventually("it is registered", lambda: "gateway-5" in system.passing("gateway"), 30)
    with other.http.stream("GET", "/live") as live:
        lines = live.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["services"]
        begun = time.monotonic()
        system.stop("gateway-5")
        assert time.monotonic() - begun < 15
        for _ in lines:  # it ends, and as it should
            pass
    eventually("it has gone", lambda: "gateway-5" not in system.passing("gateway"))
    assert "has ended" in system.log("gateway-5")

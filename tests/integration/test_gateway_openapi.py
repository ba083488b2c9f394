"""The gateway's OpenAPI document is true: schemathesis compares what it says with what is answered."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis

from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from tests.integration.fleet import Fleet
from tests.integration.test_gateway import PUBLIC, Gateway, is_problem

EXAMPLES = 20  # most that are made up for an operation, beside those that cover its schemas
ENOUGH = 500  # requests in all, lest it passes because it has tried next to nothing
SECONDS = 240  # it takes 25 s by itself; but it may share the machine
STUDENT = ("student/AddFunc", "student/Get", "student/List")
DEADLINE = 5.0  # seconds that a call gets whose client gives no deadline

CONFIGURATION = """
max-stream-events = 20

# What a service itself wants of a message (a name that is not empty, an id that is there) is not in its descriptor, and
# so not in the schemas: it may refuse with 400 or 404 what they let through. Methods that are called by WebSocket are
# refused with 426 here, whatever the headers. And the shortest deadline that there may be is 0 s.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404, 426, 504]

[checks.negative_data_rejection]
expected-statuses = [400, 415, 426]

# See `is_late`: what is answered so has not been answered in time.
[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", 504]
"""

_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9, "": 1.0, "s": 1.0, "ms": 1e-3}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, module_cluster: Cluster, guard: Guard) -> Iterator[Gateway]:
    fleet = Fleet(tmp_path_factory.mktemp("openapi"), module_cluster, guard)
    try:
        for instance in ("sum-1", "greeter-1", "hello-1", "person-1"):
            fleet.start(instance, *PUBLIC)
        fleet.start("student-1", *PUBLIC, "--database", f"sqlite:///{fleet.run}/student.db")
        fleet.start("gateway-1")
        gateway = Gateway(fleet, "gateway-1")
        gateway.knows("sum/Add", "greeter/Call", "hello/HelloWorld", "person/Do", "student/Get")
        yield gateway
    finally:
        fleet.close()


@pytest.fixture(scope="module")
def document(gateway: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = gateway.http.get("/openapi.json").json()
    return found


@pytest.mark.timeout(SECONDS + 60)
def test_schemathesis_finds_nothing(gateway: Gateway, tmp_path: Path, report: list[str]) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    ended = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            *("--config-file", "schemathesis.toml", "run", f"http://{gateway.address}/openapi.json"),
            *("--checks", "all", "--max-examples", str(EXAMPLES), "--generation-deterministic", "--workers", "2"),
            *("--request-timeout", "15", "--no-color", "--output-truncate", "false", "--warnings", "off"),
            *("--report", "har", "--report-har-path", "requests.har"),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    print(ended.stdout)
    assert ended.returncode == 0, "see what schemathesis has found, above"

    entries = json.loads((tmp_path / "requests.har").read_text())["log"]["entries"]
    assert len(entries) >= ENOUGH
    answered: dict[str, set[str]] = {}  # by path: the instances that have answered, or the type of the answer
    for entry in entries:
        if entry["response"]["status"] == 504:
            assert is_late(entry), entry
        headers = {each["name"].lower(): each["value"] for each in entry["response"]["headers"]}
        by = answered.setdefault(re.sub("^.*/v1/", "", entry["request"]["url"]), set())
        by.add(headers.get("rollcall-instance") or headers.get("content-type", ""))
    for service in ("sum/Add", "greeter/Call", "hello/HelloWorld", "person/Do", *STUDENT):
        assert f"{service.partition('/')[0]}-1" in answered[service], answered
    assert "text/event-stream" in answered["greeter/ServerStream"]
    report.append(f"{len(entries):,} requests")
    log = gateway.fleet.log(gateway.instance)
    assert "Traceback" not in log
    assert " ERROR " not in log


def is_late(entry: dict[str, Any]) -> bool:
    """Say whether a request has taken as long as it was given."""
    given = [DEADLINE]
    for header in entry["request"]["headers"]:
        if header["name"].lower() in ("grpc-timeout", "x-request-timeout"):
            number = re.match(r"[0-9.]+", header["value"])
            assert number, header
            given.append(float(number[0]) * _UNITS[header["value"][number.end() :]])
    return float(entry["time"]) / 1000 >= min(given)


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(document).validate()
    for name, schema in document["components"]["schemas"].items():
        assert jsonschema_rs.meta.is_valid({"$schema": document["jsonSchemaDialect"], **schema}), name
    for reference in set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document))):
        where: Any = document
        for each in reference.removeprefix("#/").split("/"):
            where = where[each]
    assert len(document["paths"]) == 10


def test_what_is_called_by_websocket_says_so_to_a_plain_get(gateway: Gateway, document: dict[str, Any]) -> None:
    by_websocket = {path for path, item in document["paths"].items() if "get" in item}
    assert by_websocket == {"/v1/greeter/ClientStream", "/v1/greeter/BidiStream"}
    for path in by_websocket:
        answer = gateway.http.get(path)
        is_problem(answer, 426)
        assert answer.headers["upgrade"] == "websocket"
        assert "426" in document["paths"][path]["get"]["responses"]

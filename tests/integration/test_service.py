"""One instance from its start to its end: a real process, registered in a real cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from google.protobuf import descriptor_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import rollcall
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from rollcall.registry import Instance, TcpCheck, TtlCheck
from tests.waiting import eventually, free_port

ROOT = Path(__file__).parents[2]
SUM = "sum.v1.SumService"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SERVING, NOT_SERVING = "SERVING", "NOT_SERVING"


class Process:
    """An instance of sum."""

    def __init__(self, folder: Path, consul: list[str], guard: Guard, module: str, *flags: str) -> None:
        self.id = flags[flags.index("--id") + 1] if "--id" in flags else ""
        self.log_file = folder / f"{time.monotonic_ns()}.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("ROLLCALL_", "GRPC_XDS"))}
        with self.log_file.open("w") as output:
            self.child = subprocess.Popen(
                [sys.executable, "-m", module, *flags],
                cwd=ROOT,
                env={**clean, "ROLLCALL_CONSUL": ",".join(consul)},
                stdout=output,
                stderr=output,
                start_new_session=True,  # the guard ends whole groups
            )
        guard.watch(self.child.pid)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def said(self, pattern: str) -> re.Match[str]:
        """Wait until a line of the log matches."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.log, re.MULTILINE)
            assert found or self.child.poll() is None, f"it has ended without saying {pattern}: {self.log}"
            return found

        found = eventually(f"it says {pattern}", look)
        assert found
        return found

    def target(self) -> str:
        return self.said(r"serves at (\S+:\d+),")[1]

    def http(self, path: str) -> requests.Response:
        port = self.said(r"probes at port (\d+)")[1]
        return requests.get(f"http://127.0.0.1:{port}{path}", timeout=5)

    def health(self, service: str) -> str:
        with grpc.insecure_channel(self.target()) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=service)
            answer = stub.Check(request, timeout=5, wait_for_ready=True)  # type: ignore[attr-defined]
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def ended(self, seconds: float = 30) -> int:
        return self.child.wait(seconds)


Start = Callable[..., Process]


@pytest.fixture
def start(cluster: Cluster, guard: Guard, tmp_path: Path) -> Iterator[Start]:
    """Start instances; those that are left at the end are killed."""
    started = list[Process]()

    def start_one(*flags: str, consul: list[str] | None = None, module: str = "services.sum") -> Process:
        started.append(Process(tmp_path, consul or cluster.addresses, guard, module, *flags))
        return started[-1]

    yield start_one
    for one in started:
        one.child.kill()
        one.child.wait(10)
    registry = rollcall.ConsulRegistry(cluster.addresses)
    for one in started:
        if one.id and one.child.returncode == -signal.SIGKILL:  # the others have said goodbye
            registry.deregister(one.id)


@pytest.fixture
def registry(cluster: Cluster) -> rollcall.ConsulRegistry:
    return rollcall.ConsulRegistry(cluster.addresses)


def passing(registry: rollcall.ConsulRegistry, instance_id: str) -> Instance | None:
    return next((each for each in registry.instances("sum") if each.id == instance_id), None)


def add(target: str, **arguments: object) -> int:
    with grpc.insecure_channel(target) as channel:
        stub = sum_pb2_grpc.SumServiceStub(channel)
        answer: sum_pb2.AddResponse = stub.Add(sum_pb2.AddRequest(num1=333, num2=666), timeout=5, **arguments)  # type: ignore[arg-type]
        return answer.res


def test_what_an_instance_offers(
    start: Start, registry: rollcall.ConsulRegistry, cluster: Cluster, consul_binary: Path
) -> None:
    flags = (
        "--id",
        "offering",
        "--tags",
        "eu west,canary",
        "--version",
        "1.2.3",
        "--weight",
        "5",
        "--log-format",
        "json",
    )
    one = start(*flags)
    instance = eventually("it passes", lambda: passing(registry, "offering"))
    assert instance
    assert (instance.tags, instance.version, instance.weight) == (("eu west", "canary"), "1.2.3", 5)
    assert instance.target == one.target()

    # It does what it is there for; and what it logs is JSON, with the call's trace and without its values.
    assert add(instance.target, metadata=(("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),)) == 999
    one.said(TRACE)
    lines = [json.loads(line) for line in one.log.splitlines()]
    (call,) = [line for line in lines if line.get("trace") == TRACE]
    assert (call["message"], call["code"], call["instance"]) == (f"{SUM}/Add", "OK", "offering")
    assert "333" not in json.dumps(
        [{**line, "time": "", "message": line["message"].partition(" at ")[0]} for line in lines]
    )

    # Health, of the service and overall.
    eventually("it is ready", lambda: one.health(SUM) == SERVING)
    assert one.health("") == SERVING
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        one.health("unknown.v1.Service")

    # Reflection lists what there is, and has the contract.
    with grpc.insecure_channel(instance.target) as channel:
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SUM),
        ]
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, described = reflection.ServerReflectionInfo(iter(asked), timeout=5)
        names = {service.name for service in listed.list_services_response.service}
        assert {SUM, "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"} <= names
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(file)
            for file in described.file_descriptor_response.file_descriptor_proto
        ]
        (contract,) = [file for file in files if file.package == "sum.v1"]
        assert [method.name for method in contract.service[0].method] == ["Add"]

        # Channelz knows of calls.
        servers = channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest(), timeout=5)
        assert servers.server[0].data.calls_succeeded >= 1

    # The plain HTTP port.
    assert [one.http(path).status_code for path in ("/livez", "/readyz", "/metrics")] == [200, 200, 200]
    metrics = one.http("/metrics").text
    assert "rollcall_registered 1.0" in metrics
    assert 'version="1.2.3"' in metrics
    assert re.search(r'grpc_server_handled_total\{[^}]*grpc_code="OK"[^}]*grpc_method="Add"[^}]*\} 1\.0', metrics)

    # Consul's own tool sees it.
    command = [str(consul_binary), "catalog", "services", "-tags", f"-http-addr={cluster.addresses[0]}"]
    catalog = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    assert re.search(r"^sum\s+canary,eu west$", catalog, re.MULTILINE)


def test_sigterm_drains_and_ends_well(start: Start, registry: rollcall.ConsulRegistry) -> None:
    one = start("--id", "draining", "--drain", "4")
    eventually("it passes", lambda: passing(registry, "draining"))
    with grpc.insecure_channel(one.target()) as channel:
        stub = sum_pb2_grpc.SumServiceStub(channel)
        stub.Add(sum_pb2.AddRequest(), timeout=5)
        one.child.send_signal(signal.SIGTERM)
        eventually("it has left the registry", lambda: not passing(registry, "draining"))
        assert stub.Add(sum_pb2.AddRequest(num1=1), timeout=5).res == 1, "it still answers while callers hear of it"
        assert one.ended() == 0
    assert "Traceback" not in one.log
    assert "has ended" in one.log


def test_a_second_signal_ends_it_at_once(start: Start, registry: rollcall.ConsulRegistry) -> None:
    one = start("--id", "impatient", "--drain", "60")
    eventually("it passes", lambda: passing(registry, "impatient"))
    one.child.send_signal(signal.SIGTERM)
    one.said("drains")
    begun = time.monotonic()
    one.child.send_signal(signal.SIGTERM)
    assert one.ended() == 143
    assert time.monotonic() - begun < 2


def test_sigint_is_as_good(start: Start, registry: rollcall.ConsulRegistry) -> None:
    one = start("--id", "interrupted", "--drain", "0")
    eventually("it passes", lambda: passing(registry, "interrupted"))
    one.child.send_signal(signal.SIGINT)
    assert one.ended() == 0


def test_without_consul_it_is_alive_and_not_ready_until_consul_is_there(
    start: Start, cluster: Cluster, registry: rollcall.ConsulRegistry
) -> None:
    cluster.stop()
    one = start("--id", "early")
    one.said("is not registered, trying again until it is")
    assert (one.health(""), one.health(SUM)) == (SERVING, NOT_SERVING)
    assert (one.http("/livez").status_code, one.http("/readyz").status_code) == (200, 503)
    assert "rollcall_registered 0.0" in one.http("/metrics").text
    cluster.start()
    eventually("it passes", lambda: quiet(lambda: passing(registry, "early")), 20)
    eventually("it is ready", lambda: one.http("/readyz").status_code == 200)
    assert one.health(SUM) == SERVING
    assert one.log.count("is not registered") == 1, "said once, not at every attempt"


def test_without_a_leader_it_is_not_ready(start: Start, cluster: Cluster) -> None:
    """One server alone takes a registration, and nobody can find it: a rolling update must not go on by that."""
    for n in (1, 2):
        cluster.stop_server(n, signal.SIGKILL)
    one = start("--id", "leaderless")
    one.said("is not registered, trying again until it is")
    assert one.http("/readyz").status_code == 503
    cluster.start()
    eventually("it is ready", lambda: one.http("/readyz").status_code == 200, 20)


def quiet(found: Callable[[], Instance | None]) -> Instance | None:
    try:
        return found()
    except rollcall.RegistryError:
        return None


def test_what_is_opened_first_is_closed_last(start: Start, registry: rollcall.ConsulRegistry) -> None:
    one = start("--id", "opening", "--drain", "0", "--opens-in", "0.5", module="tests.integration.opening")
    eventually("it passes", lambda: passing(registry, "opening"))
    assert add(one.target()) == 999
    one.child.send_signal(signal.SIGTERM)
    assert one.ended() == 0
    order = [one.log.index(line) for line in ("opening", "serves at", "drains", "has ended", "closed")]
    assert order == sorted(order)


def test_sigterm_while_it_opens_something_ends_it(start: Start) -> None:
    one = start("--id", "opening", "--opens-in", "60", module="tests.integration.opening")
    one.said("opening$")
    one.child.send_signal(signal.SIGTERM)
    assert one.ended() == 0
    assert "Traceback" not in one.log


@pytest.mark.parametrize("setting", ["--port", "--http-port"])
def test_a_port_that_is_taken_is_a_bad_setting(start: Start, setting: str) -> None:
    holder = start("--id", "holder")
    taken = holder.said(r"serves at \S+:(\d+), probes at port (\d+)")[1 if setting == "--port" else 2]
    one = start("--id", "latecomer", setting, taken)
    assert one.ended() == 2
    said = [line for line in one.log.splitlines() if not re.match(r"[EWI]\d{4} |WARNING: All log", line)]  # gRPC's own
    (line,) = said
    assert setting in line
    assert taken in line
    assert "Traceback" not in one.log


@pytest.mark.parametrize("flags", [("--port", "http"), ("--consul", "nonsense"), ("--nonsense", "1")])
def test_a_bad_setting_is_one_clear_line(start: Start, flags: tuple[str, str]) -> None:
    one = start(*flags)
    assert one.ended() == 2
    (line,) = one.log.splitlines()
    assert line.startswith("sum: ")
    assert flags[1] in line or flags[0] in line


def test_two_with_one_id(start: Start, registry: rollcall.ConsulRegistry) -> None:
    first = start("--id", "twin")
    instance = eventually("the first passes", lambda: passing(registry, "twin"))
    second = start("--id", "twin")
    assert second.ended(60) == 1
    assert "instance id 'twin' belongs to an instance of 'sum'" in second.log
    assert first.target() in second.log
    assert "give each instance an id of its own" in second.log
    assert "Traceback" not in second.log
    assert passing(registry, "twin") == instance
    assert add(first.target()) == 999
    assert "is not registered" not in first.log


def test_every_kind_of_check_passes(start: Start, cluster: Cluster) -> None:
    kinds = ("grpc", "tcp", "http", "ttl")
    for kind in kinds:
        start("--id", kind, "--check", kind)

    def checks() -> dict[str, tuple[str, str]]:
        """Return the status and the output of each check, as the servers that run them have them."""
        held = [requests.get(f"http://{address}/v1/agent/checks", timeout=5).json() for address in cluster.addresses]
        return {check["ServiceID"]: (check["Status"], check["Output"]) for each in held for check in each.values()}

    # A check that has not run yet passes on the instance's word, without output. TTL checks are run by the instance.
    eventually("each has run", lambda: all(checks().get(kind, ("", ""))[1] for kind in kinds if kind != "ttl"))
    eventually("each is there", lambda: set(kinds) <= set(checks()))
    assert {kind: checks()[kind][0] for kind in kinds} == dict.fromkeys(kinds, "passing")


@contextmanager
def a_sum_server(port: int) -> Iterator[None]:
    class Adds(sum_pb2_grpc.SumServiceServicer):
        def Add(self, request: sum_pb2.AddRequest, context: grpc.ServicerContext) -> sum_pb2.AddResponse:  # noqa: ARG002
            return sum_pb2.AddResponse(res=request.num1 + request.num2)

    server = grpc.server(futures.ThreadPoolExecutor(2))
    sum_pb2_grpc.add_SumServiceServicer_to_server(Adds(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    yield
    server.stop(None)


def test_register_look_up_call_deregister(registry: rollcall.ConsulRegistry) -> None:
    port = free_port()
    instance = Instance(
        id="jq", name="grpc And consul", tags=("grpc-consul", "grpcconsul"), address="127.0.0.1", port=port
    )
    with a_sum_server(port):
        registry.register(instance, TcpCheck(timeout=2, interval=5))
        found = eventually("it passes", lambda: registry.instances("grpc And consul", "grpc-consul"), 15)
        assert [replace(each, datacenter="") for each in found] == [instance]
        assert registry.instances("grpc And consul", "another") == ()
        with rollcall.dial_sync("grpc And consul", tag="grpc-consul", registry=registry) as channel:
            stub = sum_pb2_grpc.SumServiceStub(channel)
            assert stub.Add(sum_pb2.AddRequest(num1=333, num2=666)).res == 999
        registry.deregister("jq")
        eventually("it has gone", lambda: registry.instances("grpc And consul") == ())
        assert not registry.confirm(instance)
    registry.register(replace(instance, port=free_port()), TtlCheck())  # the id is free again
    registry.deregister("jq")

"""Settings that change while real instances run, by keys in a real Consul."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from signal import SIGKILL
from typing import Any

import grpc
import pytest
import requests

import rollcall
from contracts.student.v1 import student_pb2, student_pb2_grpc
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from deploy.local.cluster import SERVERS, Cluster
from deploy.local.guard import Guard
from tests.integration.fleet import Fleet
from tests.waiting import eventually

SUMS = ("sum-1", "sum-2")


class System:
    """Instances, and what they tell of their settings."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.registry = rollcall.ConsulRegistry(fleet.cluster.addresses)

    def told(self, instance: str, name: str) -> dict[str, Any]:
        found = json.loads(self.get(instance, "/settings"))["settings"]
        (setting,) = [each for each in found if each["name"] == name]
        return dict(setting)

    def get(self, instance: str, path: str) -> str:
        (there,) = [each for each in self.registry.instances(instance.rpartition("-")[0]) if each.id == instance]
        return requests.get(f"http://{there.address}:{there.meta['http_port']}{path}", timeout=5).text

    def becomes(self, instance: str, name: str, value: object) -> None:
        eventually(f"{name} of {instance} is {value}", lambda: self.told(instance, name)["value"] == value, 20)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, module_cluster: Cluster, guard: Guard) -> Iterator[System]:
    fleet = Fleet(tmp_path_factory.mktemp("live"), module_cluster, guard)
    try:
        for instance in SUMS:
            fleet.start(instance, "--tags", "public")
        fleet.start("student-1", "--database", f"sqlite:///{fleet.run}/student.db")
        fleet.start("gateway-1")
        yield System(fleet)
    finally:
        fleet.close()


@pytest.fixture
def system(started: System, cluster: Cluster) -> Iterator[System]:
    """All of them pass, on a healthy cluster without keys."""
    assert cluster is started.fleet.cluster
    for name, count in {"sum": 2, "student": 1, "gateway": 1}.items():
        asyncio.run(started.fleet.pass_all(name, count))
    yield started
    for key in started.registry.keys("rollcall/"):
        started.registry.delete(key)


def add(system: System) -> None:
    with rollcall.dial_sync("sum", registry=system.registry) as channel:
        stub = sum_pb2_grpc.SumServiceStub(channel)
        for _ in range(10):
            assert stub.Add(sum_pb2.AddRequest(num1=333, num2=666)).res == 999


def test_the_log_level_of_all_and_of_one(system: System) -> None:
    system.registry.put("rollcall/sum/log-level", "warning")
    system.registry.put("rollcall/sum/sum-2/log-level", "debug")
    system.becomes("sum-1", "log-level", "warning")
    system.becomes("sum-2", "log-level", "debug")
    before = {instance: system.fleet.served(instance) for instance in SUMS}
    add(system)
    eventually("one logs its calls", lambda: system.fleet.served("sum-2") > before["sum-2"])
    eventually("and more than that", lambda: " DEBUG sum-2 " in system.fleet.log("sum-2"))
    assert system.fleet.served("sum-1") == before["sum-1"], "the other does not"


def test_the_deadline_of_calls_that_a_running_instance_makes(system: System) -> None:
    """Of those to sum, which does not answer, where student's caller has time enough."""
    for instance in SUMS:
        system.fleet.signal(instance, signal.SIGSTOP)
    try:
        system.registry.put("rollcall/student/student-1/deadline", "0.4")
        system.becomes("student-1", "deadline", 0.4)
        with rollcall.dial_sync("student", registry=system.registry) as channel:
            stub = student_pb2_grpc.StudentServiceStub(channel)
            begun = time.monotonic()
            with pytest.raises(grpc.RpcError) as failed:
                stub.AddFunc(student_pb2.Student(name="李白", score=[90, 85]), timeout=20)
            assert time.monotonic() - begun < 4, "less than the default"
        assert isinstance(failed.value, grpc.Call)
        assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        for instance in SUMS:
            system.fleet.signal(instance, signal.SIGCONT)


def test_the_limits_of_the_gateway(system: System) -> None:
    (gateway,) = system.registry.instances("gateway")
    url = f"http://{gateway.target}/v1/sum/Add"

    def post(seconds: float = 10) -> int:
        headers = {"x-request-timeout": f"{seconds}"}
        return requests.post(url, json={"num1": 1}, headers=headers, timeout=20).status_code

    eventually("it knows of sum", lambda: post() == 200, 60)
    for instance in SUMS:
        system.fleet.signal(instance, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(post, 8)
            system.registry.put("rollcall/gateway/max-calls", "1")
            system.becomes("gateway-1", "max-calls", 1)
            eventually("the next is refused", lambda: post(0.2) == 429)
            system.registry.put("rollcall/gateway/max-calls", "2")
            system.becomes("gateway-1", "max-calls", 2)
            assert post(0.2) == 504
            assert held.result() == 504
    finally:
        for instance in SUMS:
            system.fleet.signal(instance, signal.SIGCONT)


def test_how_long_an_instance_drains(system: System) -> None:
    for instance, seconds in (("sum-2", 6.0), ("sum-1", 0.0)):
        system.registry.put(f"rollcall/sum/{instance}/drain", str(seconds))
        system.becomes(instance, "drain", seconds)
    took = {}
    for instance in ("sum-2", "sum-1"):
        begun = time.monotonic()
        system.fleet.stop(instance)
        took[instance] = time.monotonic() - begun
        system.fleet.start(instance)
    assert took["sum-2"] - took["sum-1"] > 2, took


def test_a_bad_value_is_refused_logged_once_and_shown_as_a_metric(system: System) -> None:
    system.registry.put("rollcall/sum/retries", "2")
    system.becomes("sum-1", "retries", 2)
    system.registry.put("rollcall/sum/retries", "seven")
    eventually("it is refused", lambda: system.told("sum-1", "retries")["refused"])
    assert system.told("sum-1", "retries")["value"] == 2
    assert 'rollcall_setting_refused{setting="retries"} 1.0' in system.get("sum-1", "/metrics")
    system.registry.put("rollcall/sum/grace", "19")
    system.becomes("sum-1", "grace", 19)
    assert system.fleet.log("sum-1").count("rollcall/sum/retries is refused, 'seven'") == 1
    system.registry.put("rollcall/sum/retries", "1")
    system.becomes("sum-1", "retries", 1)
    assert "rollcall_setting_refused{" not in system.get("sum-1", "/metrics")


def test_while_consul_is_away_the_last_good_values_stay(system: System, cluster: Cluster) -> None:
    system.registry.put("rollcall/sum/retries", "2")
    system.becomes("sum-1", "retries", 2)
    (there,) = [each for each in system.registry.instances("sum") if each.id == "sum-1"]
    settings = f"http://{there.address}:{there.meta['http_port']}/settings"

    def retries() -> Any:
        return {each["name"]: each["value"] for each in requests.get(settings, timeout=5).json()["settings"]}["retries"]

    for n in SERVERS:
        cluster.stop_server(n, SIGKILL)
    said = "keeping what is known"
    eventually("it has noticed", lambda: f"the keys under rollcall/sum/; {said}" in system.fleet.log("sum-1"), 30)
    assert retries() == 2
    cluster.start()
    system.registry.put("rollcall/sum/retries", "1")
    eventually("it follows again", lambda: retries() == 1, 30)

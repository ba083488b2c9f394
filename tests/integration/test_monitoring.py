"""What the chart brings for watching a system, in front of a real one: its alerts and its dashboard."""

import json
import re
import signal
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest

from deploy.local.cluster import SERVERS, Cluster
from deploy.local.guard import Guard
from tests.integration.fleet import Fleet
from tests.integration.monitoring import DASHBOARD, RULES, RULES_TEST, Prometheus, Target, promtool
from tests.waiting import eventually, free_port

SECONDS = 60

PUBLIC = ("--tags", "public")
INSTANCES = {
    "sum-1": ("tests.integration.failing_sum", *PUBLIC),
    "hello-1": ("tests.integration.failing_hello", *PUBLIC),
    "gateway-1": ("services.gateway",),
    "front-1": ("tests.integration.front",),
}
"""One for each protocol, and one that can be slow: their modules and flags."""

VARIABLES = {"$namespace": "", "$service": ".*", "$__rate_interval": "15s"}
"""What Grafana would put in their place, in a system that has no namespaces."""
METRIC = re.compile(r"\b(?:up|service:\w+:\w+|(?:consul|rollcall|(?:grpc|jsonrpc|http)_server)_\w+)\b(?!\()")


class System:
    """Real services and real servers of Consul, watched by a real Prometheus."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.broken = fleet.run / "broken"
        self._http = httpx.Client(timeout=10, trust_env=False)
        # Fixed, so that an instance which comes back is the same target.
        self._ports = {instance: free_port() for instance in INSTANCES}
        self._probes = {instance: free_port() for instance in INSTANCES}
        services = [
            Target("rollcall", _service(instance), instance, f"127.0.0.1:{port}")
            for instance, port in self._probes.items()
        ]
        servers = [
            Target("consul", "consul", f"consul-{n}", address)
            for n, address in zip(SERVERS, fleet.cluster.addresses, strict=True)
        ]
        self.prometheus = Prometheus(fleet.run, fleet.guard, [*services, *servers])

    def start(self) -> None:
        self.fleet.environment |= {"BROKEN": str(self.broken)}
        for instance, (module, *flags) in INSTANCES.items():
            ports = ["--port", str(self._ports[instance]), "--http-port", str(self._probes[instance])]
            self.fleet.start(instance, *flags, *ports, module=module)
        names = set(map(_service, INSTANCES))
        eventually("an instance of each service passes", lambda: all(map(self.fleet.passing, names)), SECONDS)
        self.prometheus.start()

    def work(self) -> None:
        """Have each instance called, and Consul write something, well or not."""
        self._http.post(self._url("gateway-1", "/v1/sum/Add"), json={"num1": 333, "num2": 666})
        self._http.post(self._url("gateway-1", "/v1/hello/HelloWorld"), json="李白")
        self.ask_front("/hello")
        self._http.put(f"http://{self.fleet.cluster.addresses[0]}/v1/kv/work", content=b"done")

    def ask_front(self, path: str) -> None:
        self._http.get(self._url("front-1", path))

    def finds(self, expression: str) -> None:
        """See that an expression finds something while there is work."""

        def found() -> bool:
            self.work()
            return bool(self.prometheus.query(expression))

        eventually(f"{expression} finds something", found, SECONDS)

    def alerting(self, alert: str, label: str) -> set[str]:
        """Return what an alert, pending or firing, tells of by this label."""
        alerts = self.prometheus.alerts(alert)
        for each in alerts:
            assert not re.search("<no value>|<error", str(each["annotations"])), each
        return {each["labels"].get(label, "") for each in alerts}

    def alerts(self, alert: str, label: str, *expected: str) -> None:
        """Wait until an alert, pending or firing, tells of just these."""
        eventually(
            f"{alert} for {expected or 'nothing'}", lambda: self.alerting(alert, label) == set(expected), SECONDS
        )

    def close(self) -> None:
        self.prometheus.close()
        self._http.close()

    def _url(self, instance: str, path: str) -> str:
        return f"http://127.0.0.1:{self._ports[instance]}{path}"


def _service(instance: str) -> str:
    return instance.rpartition("-")[0]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, module_cluster: Cluster, guard: Guard) -> Iterator[System]:
    run = tmp_path_factory.mktemp("monitoring")
    with closing(Fleet(run, module_cluster, guard)) as fleet, closing(System(fleet)) as system:
        system.start()
        yield system


def test_the_rules_are_sound_and_do_what_their_tests_say() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    promtool("test", "rules", str(RULES_TEST))


def test_what_the_rules_look_at_is_there(system: System) -> None:
    rules = system.prometheus.rules()
    names = {rule["name"] for rule in rules if rule["type"] == "recording"}
    assert names
    for name in sorted(names.union(*(METRIC.findall(rule["query"]) for rule in rules))):
        system.finds(name)


def test_every_query_of_the_dashboard_finds_something(system: System) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert expressions
    for expression in expressions:
        for variable, value in VARIABLES.items():
            expression = expression.replace(variable, value)  # noqa: PLW2901 (the same, filled in)
        system.finds(expression)


def test_the_dashboard_offers_every_service(system: System) -> None:
    variables = {each["name"]: each for each in json.loads(DASHBOARD.read_text())["templating"]["list"]}
    offered = re.fullmatch(r"label_values\((.*), service\)", variables["service"]["query"]["query"])
    assert offered
    found = system.prometheus.query(offered[1].replace("$namespace", ""))
    assert {each["metric"]["service"] for each in found} == set(map(_service, INSTANCES))


def test_no_metric_that_counts_has_the_label_of_its_target(system: System) -> None:
    found = system.prometheus.query('count by (__name__) ({job="rollcall", exported_service!=""})')
    assert {each["metric"]["__name__"] for each in found} == {"rollcall_build_info"}


def test_all_instances_of_a_service_are_killed(system: System) -> None:
    system.alerts("RollcallNoInstance", "service")
    system.fleet.kill("hello-1")
    system.alerts("RollcallNoInstance", "service", "hello")
    system.fleet.start("hello-1")
    system.alerts("RollcallNoInstance", "service")


def test_calls_fail(system: System) -> None:
    def alerting() -> bool:
        system.work()
        return system.alerting("RollcallCallsFail", "service") == {"sum", "hello", "gateway"}

    system.broken.touch()
    try:
        eventually("all are alerted of whose calls fail", alerting, SECONDS)
    finally:
        system.broken.unlink()


def test_calls_are_slow(system: System) -> None:
    def alerting() -> bool:
        system.ask_front("/wait/1.1")
        return "front" in system.alerting("RollcallSlow", "service")

    eventually("a slow service is alerted of", alerting, SECONDS)


def test_consul_loses_a_server_and_then_its_quorum(system: System, cluster: Cluster) -> None:
    leader = cluster.wait_for_leader()
    lost = next(n for n in SERVERS if n != leader)
    cluster.stop_server(lost, signal.SIGKILL)
    system.alerts("RollcallConsulServerMissing", "pod", f"consul-{lost}")
    system.alerts("RollcallConsulUnhealthy", "service", "consul")
    system.alerts("RollcallConsulNoSpare", "service", "consul")
    system.alerts("RollcallConsulNoLeader", "job")
    system.alerts("RollcallNotRegistered", "pod")

    cluster.stop_server(leader, signal.SIGKILL)
    system.alerts("RollcallConsulNoLeader", "job", "")
    system.alerts("RollcallNotRegistered", "pod", *INSTANCES)

    cluster.start()
    for alert in ("ServerMissing", "Unhealthy", "NoSpare", "NoLeader"):
        system.alerts(f"RollcallConsul{alert}", "pod")
    system.alerts("RollcallNotRegistered", "pod")
    system.alerts("RollcallNoInstance", "service")

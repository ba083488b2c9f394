"""The same system without Consul, on the same cluster: by one value of the chart Kubernetes itself is the registry."""

import json
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from deploy.kind.cluster import ROOT, run
from deploy.local import LocalError
from rollcall.registry import Instance, RegistryError
from rollcall.registry.kubernetes import ACCOUNT, KubernetesRegistry
from tests.kind import troubles
from tests.kind.conftest import small
from tests.kind.system import CALLED, NAMESPACE, RELEASE, SERVICES, System, eventually

pytestmark = pytest.mark.timeout(600)

DOC = ROOT / "docs/kubernetes.md"
FROZEN = 3.0  # seconds for which an instance hangs
AWAY = 20.0  # seconds for which there is no API server
MANIFEST = "/etc/kubernetes/manifests/kube-apiserver.yaml"
ASIDE = "/etc/kubernetes/kube-apiserver.yaml"


@pytest.fixture(scope="module")
def installed(system: System) -> System:
    system.helm("uninstall", RELEASE, "--ignore-not-found", "--wait", "--timeout", "5m")
    system.kubectl("delete", "pvc,secret", "--selector", f"app.kubernetes.io/instance={RELEASE}")
    with system.step("install the chart, with Kubernetes as the registry"):
        system.install("--set", "registry=kubernetes")
    return system


@pytest.fixture(scope="module")
def called(installed: System) -> Iterator[System]:
    """The system, with 16 callers at work inside the cluster."""
    installed.apply("account")
    with installed.being_called("ROLLCALL_REGISTRY", "kubernetes", account="caller"):
        yield installed


@pytest.fixture(scope="module")
def api(installed: System) -> Iterator[str]:
    """The URL at which the cluster's API can be asked from here."""
    with installed.serving("Starting to serve on", "proxy", "--port=0") as address:
        yield f"http://{address}"


@pytest.fixture(scope="module")
def registry(api: str) -> KubernetesRegistry:
    return KubernetesRegistry(api, NAMESPACE)


def whole(system: System, registry: KubernetesRegistry) -> bool:
    """Whether each instance that there should be passes, under its pod's name, and no other."""
    return all(
        [each.id for each in registry.instances(service)] == system.pods(service) and len(system.pods(service)) == count
        for service, count in SERVICES.items()
    )


def test_there_is_no_consul(installed: System) -> None:
    assert "consul" not in installed.kubectl("get", "pods,services,statefulsets,secrets", "--output", "name")


def test_every_ready_pod_is_an_instance(installed: System, registry: KubernetesRegistry) -> None:
    eventually("all are there", lambda: whole(installed, registry))
    assert registry.services() == tuple(sorted(SERVICES))
    pods = {pod["metadata"]["name"]: pod for pod in installed.get("pods")["items"]}
    for service in SERVICES:
        for each in registry.instances(service, certain=True):
            pod = pods[each.id]
            assert (each.address, each.port) == (pod["status"]["podIP"], 8080)
            assert (each.meta["node"], each.meta["http_port"]) == (pod["spec"]["nodeName"], "9090")
            assert each.tags == (("public",) if service in CALLED else ())
    assert registry.instances("student")[0].meta["calls"] == "sum"
    assert {each.meta["protocol"] for each in registry.instances("hello")} == {"jsonrpc"}
    assert registry.instances("gateway", "public") == ()
    assert registry.instances("grpc And consul") == ()
    assert registry.diagnose() == ()


def test_a_watch_tells_who_comes_and_who_goes(installed: System, registry: KubernetesRegistry) -> None:
    told: queue.Queue[tuple[Instance, ...]] = queue.Queue()
    names: queue.Queue[tuple[str, ...]] = queue.Queue()

    def until(found: Any) -> None:
        while not found(told.get(timeout=60)):
            pass

    with closing(registry.watch("hello")) as watch, closing(registry.watch_services("public")) as services:
        for tells, into in ((watch, told), (services, names)):
            threading.Thread(
                target=lambda tells=tells, into=into: [into.put(each) for each in tells], daemon=True
            ).start()
        assert [each.id for each in told.get(timeout=20)] == installed.pods("hello")
        assert names.get(timeout=20) == tuple(sorted(CALLED))
        installed.kubectl("scale", f"deployment/{RELEASE}-hello", "--replicas=4")
        until(lambda instances: len(instances) == 4)
        installed.kubectl("scale", f"deployment/{RELEASE}-hello", "--replicas=0")
        until(lambda instances: not instances)
        until_names = time.monotonic() + 60
        while "hello" in names.get(timeout=max(0.1, until_names - time.monotonic())):
            pass
        installed.kubectl("scale", f"deployment/{RELEASE}-hello", "--replicas=3")
        until(lambda instances: len(instances) == 3)


def test_a_service_that_is_not_ours_is_found_once_it_is_labelled(
    installed: System, registry: KubernetesRegistry
) -> None:
    (typed,) = re.findall(r"^    kubectl (-n rollcall label .*)$", DOC.read_text(), re.MULTILINE)
    installed.apply("prices")
    try:
        assert registry.instances("prices") == ()
        installed.kind.kubectl(*typed.split())
        found = eventually("it is found", lambda: registry.instances("prices"))
        assert [each.id for each in found] == installed.pods("sum")
        assert "prices" in registry.services()
    finally:
        installed.kubectl("delete", "service", "prices")


def test_one_that_hangs_is_listed_no_more(installed: System, registry: KubernetesRegistry) -> None:
    pod = installed.pods("sum")[0]
    signal_in(installed, pod, "STOP")
    try:
        eventually("it is not listed", lambda: pod not in [each.id for each in registry.instances("sum")])
        assert pod in [each.id for each in registry.instances("sum", failing=True)]
    finally:
        signal_in(installed, pod, "CONT")
    eventually("it is listed again", lambda: whole(installed, registry))


def test_the_command_finds_them_too(installed: System, api: str) -> None:
    env = {
        "ROLLCALL_REGISTRY": "kubernetes",
        "ROLLCALL_KUBERNETES_API": api,
        "ROLLCALL_KUBERNETES_NAMESPACE": NAMESPACE,
    }

    def rollcall(*arguments: str) -> str:
        return run([sys.executable, "-m", "rollcall", *arguments], env=env)

    assert [each["id"] for each in json.loads(rollcall("instances", "sum", "--json"))] == installed.pods("sum")
    pod = installed.pods("sum")[0]
    with pytest.raises(LocalError, match=f"kubectl delete pod {pod}"):
        rollcall("deregister", pod)
    with pytest.raises(LocalError, match="keeps no settings"):
        rollcall("kv", "set", "sum", "log-level", "debug")


def test_helm_test_and_the_gateway_make_real_calls(installed: System) -> None:
    said = installed.helm("test", RELEASE, "--logs")
    for service in CALLED:
        assert f"\n{service}." in said
    with installed.forwarded(f"service/{RELEASE}-gateway", 80) as address, httpx.Client(timeout=10) as http:
        added = http.post(f"http://{address}/v1/student/AddFunc", json={"name": "李白", "score": [90, 85, 77]})
        assert added.json()["total"] == "252", "which student has from sum"
        assert http.get(f"http://{address}/v1/gateway/Do").status_code == 404, "which is not public"


def test_who_looks_up_may_do_that_and_nothing_else(installed: System) -> None:
    def may(service: str, verb: str, what: str) -> bool:
        account = f"system:serviceaccount:{NAMESPACE}:{RELEASE}-{service}"
        try:
            installed.kubectl("auth", "can-i", verb, what, f"--as={account}")
        except LocalError:
            return False
        return True

    told = "import os; print(os.environ['KUBERNETES_SERVICE_HOST'])"
    has_token = f"import os; print(os.path.exists('{ACCOUNT}/token'))"
    for service in SERVICES:
        asks = service in ("gateway", "student")
        pod = installed.pods(service)[0]
        python = ("exec", pod, "--", "/opt/rollcall/bin/python", "-c")
        assert may(service, "watch", "endpointslices.discovery.k8s.io") is asks
        assert installed.kubectl(*python, has_token).strip() == str(asks)
        assert installed.connects(pod, installed.kubectl(*python, told).strip(), 443) is asks
        for verb, what in (("list", "secrets"), ("list", "pods"), ("delete", "endpointslices.discovery.k8s.io")):
            assert not may(service, verb, what), f"{service} may {verb} {what}"


def test_a_rolling_restart_of_every_deployment(called: System, registry: KubernetesRegistry) -> None:
    troubles.rolling_restart(called, lambda: whole(called, registry))


def test_scaling_up_and_down(called: System, registry: KubernetesRegistry) -> None:
    troubles.scaling(called, lambda: whole(called, registry), registry.instances)


def test_a_pod_is_deleted_without_grace(called: System, registry: KubernetesRegistry) -> None:
    troubles.deletion_without_grace(called, lambda: whole(called, registry))


def test_an_instance_freezes(called: System, registry: KubernetesRegistry) -> None:
    pod = called.pods("sum")[0]
    with called.trouble(f"an instance of sum freezes for {FROZEN:g} s"):
        signal_in(called, pod, "STOP")
        threading.Event().wait(FROZEN)
        signal_in(called, pod, "CONT")
        eventually("all are there", lambda: whole(called, registry))


def signal_in(system: System, pod: str, name: str) -> None:
    """Send a signal to what runs in a pod, from its node, as nothing within can stop the first process there."""
    node = system.get("pod", pod)["spec"]["nodeName"]
    script = f"grep -lsxz HOSTNAME={pod} /proc/[0-9]*/environ | cut -d/ -f3 | xargs kill -{name}"
    run(["docker", "exec", node, "bash", "-c", script])


def test_a_node_is_drained(called: System, registry: KubernetesRegistry) -> None:
    if small():
        pytest.skip("there is one node only")
    troubles.draining_a_node(called, lambda: whole(called, registry))


def test_the_api_server_is_away(called: System, registry: KubernetesRegistry) -> None:
    """Who calls keeps whom it knows; and when it is back, hears of who has come and gone."""
    node = f"{called.kind.name}-control-plane"

    def away() -> bool:
        try:
            registry.services()
        except RegistryError:
            return True
        return False

    with called.trouble(f"the API server is away for {AWAY:g} s") as seen:
        run(["docker", "exec", node, "mv", MANIFEST, ASIDE])
        try:
            eventually("it is away", away)
            threading.Event().wait(AWAY)
        finally:
            run(["docker", "exec", node, "mv", ASIDE, MANIFEST])
        eventually("it is back", lambda: not away(), 120)
        assert all(seen().calls[service] > AWAY * 10 for service in CALLED), "calls went on meanwhile"
        called.kubectl("delete", "pod", called.pods("sum")[0], "--grace-period=0", "--force")
        eventually("another is there instead", lambda: whole(called, registry), 120)
        new = {*called.pods("sum")}
        eventually("each is called", lambda: new <= {*seen().answered})


def test_it_is_uninstalled(called: System) -> None:
    called.helm("uninstall", RELEASE, "--wait", "--timeout", "5m")
    selector = f"app.kubernetes.io/instance={RELEASE}"
    kinds = "pods,services,roles,rolebindings,serviceaccounts,pvc,secrets"
    eventually("nothing is left", lambda: not called.get(kinds, "--selector", selector)["items"], 120)

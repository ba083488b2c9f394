"""The whole topology on Kubernetes: what it promises, in the order in which a person would try it.

The tests stand on one another: each leaves the system whole, and the next one begins with that.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect
from websockets.sync.client import connect

from deploy.kind.cluster import CHART, ROOT, run
from deploy.local import LocalError
from tests import chromium, making, tutorial
from tests.kind import troubles
from tests.kind.conftest import small
from tests.kind.system import CALLED, CONSUL, FOLDER, NAMESPACE, RELEASE, SERVERS, SERVICES, System, eventually

pytestmark = pytest.mark.timeout(900)

ELSEWHERE = "elsewhere"
BACK_WITHIN = 5.0  # seconds in which a registration that was removed is made again


@pytest.fixture(scope="module")
def called(system: System) -> Iterator[System]:
    """The system, with 16 callers at work inside the cluster."""
    addresses = ",".join(f"{server}.{CONSUL}.{NAMESPACE}.svc:8500" for server in SERVERS)
    with system.being_called("ROLLCALL_CONSUL", addresses):
        yield system


def names(pods: Any) -> list[str]:
    return [pod["metadata"]["name"] for pod in pods["items"]]


def test_every_instance_is_registered_under_its_pods_name(system: System) -> None:
    eventually("Consul has all servers, and each instance once", system.whole)
    assert system.leader() in SERVERS
    pods = {pod["metadata"]["name"]: pod for pod in system.get("pods")["items"]}
    for service, count in SERVICES.items():
        passing = system.passing(service)
        assert len(passing) == count
        for id_, entry in passing.items():
            assert entry["Service"]["Address"] == pods[id_]["status"]["podIP"]
            assert entry["Service"]["Meta"]["node"] == pods[id_]["spec"]["nodeName"]


def test_helm_test_makes_real_calls(system: System) -> None:
    with system.step("helm test"):
        said = system.helm("test", RELEASE, "--logs")
    assert 'sum.Add = {"res": "999"}    answered by rollcall-sum-' in said
    for service in CALLED:
        assert f"\n{service}." in said


def test_through_a_forwarded_port_every_method_answers(system: System) -> None:
    with system.forwarded(f"service/{RELEASE}-gateway", 80) as address, httpx.Client(timeout=10) as http:
        url = f"http://{address}"
        described = eventually("all services are described", lambda: described_at(http, url), 30)
        answers = {}
        for path, (verb, request) in methods(described).items():
            answer = http.request(verb, url + path, json=request)
            assert answer.status_code == 200, f"{path}: {answer.text}"
            answers[path] = answer
        assert answers["/v1/sum/Add"].json() == {"res": "999"}
        assert answers["/v1/hello/HelloWorld"].json() == "李白 你好"
        assert answers["/v1/person/Do"].json() == {"name": "李白 is sleeping", "age": 999}
        assert answers["/v1/student/AddFunc"].json()["total"] == "252"
        assert answers["/v1/greeter/Call"].json() == {"msg": "Hello 李白"}
        assert answers["/v1/greeter/ServerStream"].text.count("data: {") == 3, "two messages and the end"
        for method in ("ClientStream", "BidiStream"):
            assert strokes(address, method) == {"ClientStream": ["2"], "BidiStream": ["0", "1"]}[method]


REQUESTS: dict[str, Any] = {
    "/v1/sum/Add": {"num1": 333, "num2": 666},
    "/v1/hello/HelloWorld": "李白",
    "/v1/person/Do": {"name": "李白", "age": 333},
    "/v1/student/AddFunc": {"name": "李白", "age": 33, "score": [90, 85, 77]},
    "/v1/student/Get": {"id": "1"},
    "/v1/student/List": {"pageSize": 10},
    "/v1/greeter/Call": {"name": "李白"},
    "/v1/greeter/ServerStream": {"count": 2},
}
SOCKETS = ("/v1/greeter/ClientStream", "/v1/greeter/BidiStream")


def described_at(http: httpx.Client, url: str) -> Any:
    document = http.get(f"{url}/openapi.json").json()
    return document if {*REQUESTS} <= {*document["paths"]} else None


def methods(described: Any) -> dict[str, tuple[str, Any]]:
    """Return every method that is described, with a request for it: one that is new here has to be given one."""
    there = {path for path in described["paths"] if path.startswith("/v1/")}
    assert there - {*SOCKETS} == {*REQUESTS}
    return {path: ("POST", REQUESTS[path]) for path in REQUESTS}


def strokes(address: str, method: str) -> list[str]:
    """Send two strokes over a WebSocket; return what is answered."""
    with connect(f"ws://{address}/v1/greeter/{method}") as stream:
        for stroke in range(2):
            stream.send(json.dumps({"stroke": stroke}))
        stream.send("")
        results = []
        while "result" in (told := json.loads(stream.recv(timeout=10))):
            results.append(next(iter(told["result"].values())))
        assert "end" in told
        return results


def test_a_service_fresh_from_the_generator_is_installed_by_a_values_file_alone(system: System, tmp_path: Path) -> None:
    """As docs/your-own-service.md has it typed; called through the gateway, and then taken out again."""
    repository = making.copy(tmp_path)
    with system.step("make a service, build its image, and install it by its values file"):
        making.new(repository, "shop")
        for each in tutorial.typed(tutorial.ON_KUBERNETES):
            command = each.command.replace("--name rollcall", f"--name {system.kind.name}")
            printed = making.run("bash", "-c", command, cwd=repository, **system.kind.env)
            assert each.is_answered_by(printed), printed
    assert len(eventually("all three are registered", lambda: system.passing("shop"))) == 3
    with system.forwarded(f"service/{RELEASE}-gateway", 80) as address, httpx.Client(timeout=10) as http:
        url = f"http://{address}/v1/shop"

        def called() -> bool:
            answer = http.post(f"{url}/Call", json={"name": "李白"})
            return answer.status_code == 200 and answer.json() == {"text": "Hello 李白"}

        eventually("the gateway has heard of it", called)
        assert http.post(f"{url}/Count", json={"count": 2}).text.count("data: {") == 3, "two messages and the end"
    said = system.helm("test", RELEASE, "--logs")
    assert 'shop.Call = {"text": "Hello 李白"}' in said
    system.install()
    eventually("it has gone", lambda: not system.passing("shop") and system.whole(), 120)


def test_what_the_readme_says_works_as_typed(system: System) -> None:
    readme = (ROOT / "README.md").read_text().partition("## On Kubernetes")[2].partition("\n## ")[0]
    lines = [line for block in re.findall(r"```shell\n([^`]*)```", readme) for line in block.splitlines()]
    forwarding = [line.split() for line in lines if " port-forward " in line]
    assert len(forwarding) == 2
    with ExitStack() as stack:
        ports = {}
        for _, flag, namespace, _, service, mapping in forwarding:
            assert (flag, namespace) == ("-n", NAMESPACE)
            local, remote = mapping.split(":")
            ports[f"localhost:{local}"] = stack.enter_context(system.forwarded(service, int(remote)))
        typed = [number for number, line in enumerate(lines) if line.startswith("$ curl ")]
        assert len(typed) == 2
        for number in typed:
            command = lines[number].removeprefix("$ ")
            for shown, here in ports.items():
                command = command.replace(shown, here)
            assert run(["bash", "-c", command]).splitlines() == [lines[number + 1]]


def test_the_page_and_consuls_own_are_there_in_a_browser(system: System) -> None:
    with ExitStack() as stack:
        gateway = stack.enter_context(system.forwarded(f"service/{RELEASE}-gateway", 80))
        consul = stack.enter_context(system.forwarded(f"service/{RELEASE}-consul-ui", 8500))
        browser = stack.enter_context(chromium.running())
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(f"http://{gateway}/#sum.Add")
        for service in SERVICES:
            for pod in system.pods(service):
                expect(page.locator(f"[data-instance='{pod}']")).to_be_visible(timeout=20_000)
        page.get_by_label("num1").fill("333")
        page.get_by_label("num2").fill("666")
        page.get_by_role("button", name="Call", exact=True).click()
        expect(page.get_by_label("Answer")).to_contain_text("999", timeout=20_000)

        page.goto(f"http://{consul}/ui")
        for service in SERVICES:
            expect(page.get_by_text(service, exact=True).first).to_be_visible(timeout=20_000)


def test_what_is_not_allowed_does_not_connect(system: System) -> None:
    system.apply("stranger")
    system.kubectl("wait", "pod/stranger", "--for=condition=Ready", "--timeout=60s")
    ips = {service: ip_of(system, service) for service in SERVICES}
    consul = system.get("pod", SERVERS[0])["status"]["podIP"]

    allowed = [("student", "sum", 8080), *(("gateway", service, 8080) for service in CALLED), ("gateway", "sum", 9090)]
    refused = [("sum", "hello", 8080), ("hello", "sum", 8080), ("student", "greeter", 8080), ("sum", "hello", 9090)]
    for caller, service, port in allowed:
        assert system.connects(system.pods(caller)[0], ips[service], port), f"{caller} may call {service} at {port}"
    for caller, service, port in refused:
        assert not system.connects(system.pods(caller)[0], ips[service], port), (
            f"{caller} may not call {service} at {port}"
        )
    assert system.connects("stranger", ips["gateway"], 8080), "the gateway is the way in"
    for service in CALLED:
        assert not system.connects("stranger", ips[service], 8080), f"a stranger may not call {service}"
        assert not system.connects("stranger", ips[service], 9090), f"nor read the metrics of {service}"
    assert not system.connects("stranger", consul, 8500)
    assert not system.connects("stranger", consul, 8300)
    assert not system.connects(system.pods("sum")[0], consul, 8300)
    assert system.connects(system.pods("sum")[0], consul, 8500)
    system.kubectl("delete", "pod", "stranger", "--wait=false")


def ip_of(system: System, service: str) -> str:
    return str(system.get("pod", system.pods(service)[-1])["status"]["podIP"])


def test_a_rolling_restart_of_every_deployment(called: System) -> None:
    troubles.rolling_restart(called, called.whole)


def test_an_upgrade_to_another_image(called: System) -> None:
    key = called.get("secret", f"{RELEASE}-consul-gossip")["data"]
    with called.trouble("helm upgrade to another tag"):
        called.install(tag=called.other_tag)
    for service in SERVICES:
        for pod in called.pods(service):
            image = called.get("pod", pod)["spec"]["containers"][0]["image"]
            assert image.endswith(f"{service}:{called.other_tag}")
    assert all(each["Service"]["Meta"]["version"] == called.other_tag for each in called.passing("sum").values())
    assert called.get("secret", f"{RELEASE}-consul-gossip")["data"] == key
    eventually("all are registered again", called.whole)


def test_scaling_up_and_down(called: System) -> None:
    troubles.scaling(called, called.whole, called.passing)


def test_a_pod_is_deleted_without_grace(called: System) -> None:
    troubles.deletion_without_grace(called, called.whole)


def test_the_consul_leader_is_deleted(called: System) -> None:
    with called.trouble("delete the Consul leader's pod"):
        leader = called.leader()
        called.kubectl("delete", "pod", leader)
        eventually("it is back, and all is whole", called.whole, 180)


def test_a_rolling_restart_of_consul(called: System) -> None:
    with called.trouble("rolling restart of Consul"):
        called.kubectl("rollout", "restart", f"statefulset/{CONSUL}")
        called.rolled_out(f"statefulset/{CONSUL}", 600)
        eventually("all is whole", called.whole, 120)


def test_a_node_is_drained(called: System) -> None:
    if small():
        pytest.skip("there is one node only")
    troubles.draining_a_node(called, called.whole)


def test_all_of_consul_is_deleted_at_once(called: System) -> None:
    def addresses() -> set[str]:
        return {called.get("pod", server)["status"]["podIP"] for server in SERVERS}

    before = addresses()
    with called.forwarded(f"service/{RELEASE}-gateway", 80) as gateway, httpx.Client(timeout=10) as http:

        def answering_and_whole() -> bool:
            answer = http.post(f"http://{gateway}/v1/sum/Add", json=REQUESTS["/v1/sum/Add"])
            assert answer.status_code == 200, answer.text
            return called.whole()

        with called.trouble("delete all three Consul pods at once"):
            called.kubectl("delete", "pod", *SERVERS)
            eventually("all are registered again", answering_and_whole, 240)
    assert not before & addresses()


def test_a_registration_that_is_removed_by_hand_is_back_soon(called: System) -> None:
    pod = called.pods("sum")[0]
    with called.trouble("remove a registration by hand"):
        before = called.passing("sum")[pod]
        called.consul(f"agent/service/deregister/{pod}", "-X", "PUT", server=before["Node"]["Node"])
        begun = time.monotonic()
        eventually("it is there again", lambda: pod in called.passing("sum"), BACK_WITHIN)
        assert time.monotonic() - begun < BACK_WITHIN
        # Else this has looked before anything had happened.
        assert called.passing("sum")[pod]["Service"]["CreateIndex"] > before["Service"]["CreateIndex"]


def test_a_bad_image_takes_no_traffic_and_a_rollback_heals_it(called: System) -> None:
    before = called.pods("sum")
    with called.trouble("upgrade to a bad image, and rollback"):
        called.install("--set", "services.sum.image=hashicorp/consul:1.22.5", tag=called.other_tag, wait=False)
        selector = f"app.kubernetes.io/component=sum,app.kubernetes.io/instance={RELEASE}"
        bad = eventually(
            "a pod has the bad image",
            lambda: [each for each in names(called.get("pods", "--selector", selector)) if each not in before],
        )
        eventually("it runs", lambda: called.get("pod", bad[0])["status"]["phase"] == "Running")
        assert called.pods("sum") == before, "the old ones stay"
        called.helm("rollback", RELEASE, "--wait", "--timeout", "5m")
        called.rolled_out(f"deployment/{RELEASE}-sum")
        assert bad[0] not in called.pods("sum")
    eventually("all is whole", called.whole)


def test_a_client_agent_on_each_node(called: System) -> None:
    """Turned on in a system at work, with two instances of what is called; then one of the agents goes."""

    def registered_at_home() -> bool:
        return called.whole() and all(
            entry["Node"]["Node"] == entry["Service"]["Meta"]["node"]
            for service in SERVICES
            for entry in called.passing(service).values()
        )

    # Since it was scaled, this number has been kubectl's: helm may name the same, and no other.
    called.kubectl("scale", f"deployment/{RELEASE}-sum", "--replicas=2")
    fewer = {**dict.fromkeys(SERVICES, 2), "gateway": 1}
    chosen = ["consul.client.enabled=true", *(f"services.{service}.replicas={n}" for service, n in fewer.items())]
    flags = [part for flag in chosen for part in ("--set", flag)]
    with called.trouble("upgrade to a client agent on each node"):
        called.install(*flags, tag=called.other_tag)
        eventually("each is registered with its node's agent", registered_at_home, 120)
    with called.trouble("delete a client agent's pod"):
        node = node_of(called, called.pods("sum")[0])
        (agent,) = [pod for pod in called.pods("consul-client") if node_of(called, pod) == node]
        called.kubectl("delete", "pod", agent)
        called.rolled_out(f"daemonset/{RELEASE}-consul-client")
        eventually("each is registered with its node's agent again", registered_at_home, 120)
    assert "sum.Add" in called.helm("test", RELEASE, "--logs")


def node_of(system: System, pod: str) -> str:
    return str(system.get("pod", pod)["spec"]["nodeName"])


def test_uninstalling_leaves_what_is_stored_and_a_command_removes_it(called: System) -> None:
    notes = called.helm("get", "notes", RELEASE)
    command = next(line.split() for line in notes.splitlines() if "delete pvc,secret" in line)
    with called.step("helm uninstall"):
        called.helm("uninstall", RELEASE, "--wait", "--timeout", "5m")
        eventually("its pods have gone", lambda: not selected(called, "pods"), 120)
    assert len(selected(called, "pvc")) == len(SERVERS)
    assert selected(called, "secret") == [f"{RELEASE}-consul-gossip"]
    called.kind.kubectl(*command[1:])
    assert not selected(called, "pvc,secret")


def selected(system: System, kind: str) -> list[str]:
    return names(system.get(kind, "--selector", f"app.kubernetes.io/instance={RELEASE}"))


def test_a_consul_that_is_there_already(system: System) -> None:
    """One with ACLs, whose token the services are given."""
    with system.step("install on a Consul that is there, with a token"):
        system.kind.kubectl("apply", "-f", str(FOLDER / "external.yaml"))
        system.kubectl("--namespace", ELSEWHERE, "wait", "pod/consul", "--for=condition=Ready", "--timeout=60s")
        flags = [
            *(
                "consul.external.addresses={consul:8500}",
                "consul.external.tokenSecret.name=consul",
                "image.pullPolicy=Never",
            ),
            *(f"services.{each}.enabled=false" for each in SERVICES if each not in ("sum", "gateway")),
            *(f"services.{each}.replicas=1" for each in ("sum", "gateway")),
        ]
        chosen = [part for flag in flags for part in ("--set", flag)]
        system.kind.helm(
            *("install", RELEASE, str(CHART), "--namespace", ELSEWHERE, "--set", f"image.tag={system.tag}", *chosen),
            *("--wait", "--timeout", "3m"),
        )
        said = system.kind.helm("test", RELEASE, "--namespace", ELSEWHERE, "--logs")
        assert "sum.Add" in said
    system.kind.kubectl("delete", "namespace", ELSEWHERE, "--wait=false")


def test_the_plain_manifests_do_the_same(system: System) -> None:
    """After the chart has gone: the overlay for a small machine."""
    overlay = ROOT / "deploy/k8s/overlays/dev"
    with system.step("kubectl apply -k deploy/k8s/overlays/dev"):
        system.kind.kubectl("apply", "-k", str(overlay))
        for kind, name in (*(("deployment", f"rollcall-{each}") for each in SERVICES), ("statefulset", CONSUL)):
            system.kind.kubectl("--namespace", "rollcall-dev", "rollout", "status", f"{kind}/{name}", "--timeout=300s")
    with system.forwarded("service/rollcall-gateway", 80, "rollcall-dev") as address, httpx.Client(timeout=10) as http:
        url = f"http://{address}"
        eventually("all services are described", lambda: described_at(http, url), 60)
        assert http.post(f"{url}/v1/sum/Add", json=REQUESTS["/v1/sum/Add"]).json() == {"res": "999"}
        added = http.post(f"{url}/v1/student/AddFunc", json=REQUESTS["/v1/student/AddFunc"]).json()
        assert http.post(f"{url}/v1/student/Get", json={"id": added["id"]}).json()["student"]["total"] == "252"
    with system.step("kubectl delete -k deploy/k8s/overlays/dev"):
        system.kind.kubectl("delete", "-k", str(overlay), "--timeout=180s")
    with pytest.raises(LocalError, match="NotFound"):
        system.kind.kubectl("get", "namespace", "rollcall-dev")

"""The chart and the plain manifests, as they are rendered: no cluster is needed, but helm and kubectl."""

import base64
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from deploy.k8s.__main__ import BASE, TABLE, rendered, table
from deploy.kind.cluster import CHART, ROOT
from deploy.kind.cluster import run as run_tool
from deploy.local import LocalError
from tests import making

VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
"""Of Kubernetes, that the chart is meant for: README and Chart.yaml say so, too."""
MATRIX = (None, *sorted((CHART / "ci").glob("*-values.yaml")))
EACH_VALUES = pytest.mark.parametrize("values", MATRIX, ids=lambda path: path.stem if path else "defaults")
CHECKED = (None, *(CHART / f"ci/{name}-values.yaml" for name in ("client", "full", "kubernetes")))
"""Those that checkov looks at: between them they have everything that can be rendered."""
THEIRS = ("PodMonitor", "PrometheusRule")
"""Kinds that are not Kubernetes' own."""
PUBLIC = ("greeter", "hello", "person", "student", "sum")


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    missing = [tool for tool in ("helm", "kubectl") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"expected helm and kubectl on PATH, not found: {', '.join(missing)}")


@cache
def documents(values: Path | None = None, *flags: str) -> list[dict[str, Any]]:
    """Return what the chart renders to."""
    chosen = ["--values", str(values)] if values else []
    text = run_tool(["helm", "template", "rollcall", str(CHART), "--namespace", "here", *chosen, *flags])
    return [each for each in yaml.safe_load_all(text) if each]


def of_kind(kind: str, found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in found if each["kind"] == kind}


def component(found: dict[str, Any]) -> str:
    return str(found["metadata"]["labels"]["app.kubernetes.io/component"])


def test_helm_lints_it() -> None:
    for values in MATRIX:
        run_tool(["helm", "lint", "--strict", str(CHART), *(["--values", str(values)] if values else [])])


@EACH_VALUES
@pytest.mark.parametrize("version", VERSIONS)
def test_what_it_renders_is_valid(values: Path | None, version: str) -> None:
    for document in documents(values, "--kube-version", f"{version}.0"):
        if document["kind"] not in THEIRS:
            kubernetes_validate.validate(document, version, strict=True)


def test_an_older_kubernetes_is_refused() -> None:
    with pytest.raises(LocalError, match=r"requires kubeVersion: >=1\.30"):
        documents(None, "--kube-version", "1.29.0")


@EACH_VALUES
def test_names_are_unique(values: Path | None) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in documents(values)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("consul.replica=3", "additional properties 'replica' not allowed"),
        ("services.sum.replica=2", "additional properties 'replica' not allowed"),
        ("defaults.resources.request.cpu=1", "additional properties 'request' not allowed"),
        ("imge.tag=1", "additional properties 'imge' not allowed"),
        ("services.sum.replicas=many", "got string, want integer"),
        ("registry=null", "missing property 'registry'"),
        ("registry=mdns", "value must be one of 'consul', 'kubernetes'"),
        ("consul.replicas=2", "value must be one of 1, 3, 5, 7"),
        ("services.sum.protocol=grcp", "value must be one of 'grpc', 'jsonrpc', 'http'"),
        ("services.student.store.size=1Gb", "does not match pattern"),
        ("services.Sum.replicas=1", "does not match pattern"),
        ("services.consul-server.replicas=1", "'not' failed"),
        (f"services.{'a' * 31}.replicas=1", "maxLength: got 31, want 30"),
        (
            f"fullnameOverride={'a' * 40},services.{'b' * 20}.replicas=1",
            "expected names of at most 63 characters, found",
        ),
        ("consul.external.addresses[0]=consul", "does not match pattern"),
        ("services.sum.calls[0]=smu", 'expected names of services, or *, found "smu"; there are: gateway, greeter'),
        ("services.student.replicas=3", "services.student.replicas: expected 1, found 3"),
    ],
)
def test_what_cannot_be_meant_is_refused(flag: str, complaint: str) -> None:
    with pytest.raises(LocalError, match=re.escape(complaint)):
        documents(None, "--set", flag)


@pytest.mark.parametrize("place", ["here", "alone"])
@pytest.mark.parametrize("kind", ["srv", "web"])
@pytest.mark.parametrize("name", ["s", "n" * 25])
def test_the_values_of_a_service_from_the_generator_are_taken(tmp_path: Path, name: str, kind: str, place: str) -> None:
    if place == "here":
        making.copy(tmp_path)
    folder = tmp_path / "rollcall" if place == "here" else tmp_path
    making.new(folder, name, "--type", kind, "--namespace", "acme")
    (values,) = folder.rglob(f"*acme*{name}*/values.yaml")
    found = documents(values)
    assert f"rollcall-acme-{name}" in of_kind("Deployment", found)
    for document in found:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    ("values", "found"), [("external", "consul.external.addresses"), ("kubernetes", "registry: kubernetes")]
)
def test_client_agents_of_another_consul_are_refused(values: str, found: str) -> None:
    complaint = f"consul.client.enabled: expected Consul's servers to be the chart's own, found {found}"
    with pytest.raises(LocalError, match=re.escape(complaint)):
        documents(CHART / f"ci/{values}-values.yaml", "--set", "consul.client.enabled=true")


@EACH_VALUES
def test_the_grace_periods_add_up(values: Path | None) -> None:
    for deployment in of_kind("Deployment", documents(values)).values():
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        env = {each["name"]: each.get("value") for each in container["env"]}
        stopping = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed = stopping + float(env["ROLLCALL_DRAIN"]) + float(env["ROLLCALL_GRACE"])
        assert pod["terminationGracePeriodSeconds"] >= needed + 10


@EACH_VALUES
def test_no_pod_may_more_than_it_needs(values: Path | None) -> None:
    found = documents(values)
    pods = [each["spec"]["template"]["spec"] for each in found if "template" in each.get("spec", {})]
    assert len(pods) >= 6
    bindings = of_kind("RoleBinding", found).values()
    asking = {subject["name"] for binding in bindings for subject in binding["subjects"]}
    for pod in [*pods, *(each["spec"] for each in of_kind("Pod", found).values())]:
        assert pod["automountServiceAccountToken"] is (pod.get("serviceAccountName") in asking)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {*container["resources"]["requests"]} == {*container["resources"]["limits"]} == {"cpu", "memory"}
            assert not [each for each in container.get("ports", ()) if "hostPort" in each]


ALONE = [f"services.{each}.public=false" for each in PUBLIC]
"""Values with which the gateway calls nobody, and so nobody calls any but sum."""


@pytest.mark.parametrize("registry", ["consul", "kubernetes"])
@pytest.mark.parametrize("values", [ALONE, ["services.gateway.enabled=false", "networkPolicy.metricsFrom=null"]])
def test_whom_nobody_calls_nobody_reaches(registry: str, values: list[str]) -> None:
    flags = [part for value in (f"registry={registry}", *values) for part in ("--set", value)]
    for name, policy in of_kind("NetworkPolicy", documents(None, *flags)).items():
        for rule in policy["spec"]["ingress"] or ():  # none: nobody is let in
            assert rule.get("from") or name == "rollcall-gateway" or "from" not in rule, f"{name} lets everybody in"
            if name in ("rollcall-hello", "rollcall-greeter") and registry == "kubernetes":
                assert 8080 not in [each["port"] for each in rule["ports"]]


def test_who_only_looks_at_the_system_has_a_token_too() -> None:
    flags = [part for value in ("registry=kubernetes", *ALONE) for part in ("--set", value)]
    (binding,) = of_kind("RoleBinding", documents(None, *flags)).values()
    assert [each["name"] for each in binding["subjects"]] == ["rollcall-gateway", "rollcall-student"]
    none = [*flags, "--set", "services.gateway.enabled=false", "--set", "services.student.enabled=false"]
    assert not {"Role", "RoleBinding"} & {each["kind"] for each in documents(None, *none)}


def edges(found: list[dict[str, Any]], port: int) -> set[tuple[str, str]]:
    """Return who may connect to whom at a port: as both the one's policy and the other's say."""
    policies = {
        each["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: each["spec"]
        for each in of_kind("NetworkPolicy", found).values()
    }

    def peers(spec: dict[str, Any], way: str, direction: str) -> set[str]:
        chosen: set[str] = set()
        for rule in spec[way]:
            if port not in [each["port"] for each in rule["ports"]]:
                continue
            for peer in rule.get(direction, [{"podSelector": {}}]):
                labels = peer.get("podSelector", {}).get("matchLabels", {})
                if "namespaceSelector" not in peer:
                    chosen |= (
                        {labels["app.kubernetes.io/component"]}
                        if "app.kubernetes.io/component" in labels
                        else {*policies}
                    )
        return chosen

    out = {(name, peer) for name, spec in policies.items() for peer in peers(spec, "egress", "to")}
    into = {(peer, name) for name, spec in policies.items() for peer in peers(spec, "ingress", "from")}
    return {(one, other) for one, other in out & into if one != other}


def test_network_policies_allow_exactly_the_calls_there_are() -> None:
    found = documents()
    checks = {("consul-server", each) for each in (*PUBLIC, "gateway")}
    test = ("test", "gateway")
    assert edges(found, 8080) == {("student", "sum"), *(("gateway", each) for each in PUBLIC), *checks, test}
    assert edges(found, 9090) == {("gateway", each) for each in PUBLIC}
    assert edges(found, 8500) == {(each, "consul-server") for each in (*PUBLIC, "gateway")}


def test_with_client_agents_services_talk_to_those() -> None:
    """And may to the servers: with these the pods are registered, and checked by them, that turning it on replaces."""
    found = documents(CHART / "ci/client-values.yaml")
    agents = ("consul-client", "consul-server")
    assert edges(found, 8500) == {(each, agent) for each in (*PUBLIC, "gateway") for agent in agents}
    assert {(agent, each) for each in (*PUBLIC, "gateway") for agent in agents} < edges(found, 8080)
    (container,) = of_kind("Deployment", found)["rollcall-sum"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "ROLLCALL_CONSUL", "value": "rollcall-consul-client:8500"} in container["env"]


def test_of_a_consul_that_is_there_already_nothing_is_installed() -> None:
    found = documents(CHART / "ci/external-values.yaml")
    assert not of_kind("StatefulSet", found)
    assert "consul" not in json.dumps(sorted(of_kind("Service", found)))
    (container,) = of_kind("Deployment", found)["rollcall-sum"]["spec"]["template"]["spec"]["containers"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert env["ROLLCALL_CONSUL"] == "http://consul-1.example:8500,consul-2.example:8500,consul-3.example:8500"
    assert env["ROLLCALL_CONSUL_TOKEN_FILE"] == "/var/run/rollcall/consul/token"  # noqa: S105 (a path)


KUBERNETES = CHART / "ci/kubernetes-values.yaml"


def test_where_kubernetes_is_the_registry_there_is_no_consul() -> None:
    found = documents(KUBERNETES)
    assert not {"StatefulSet", "Secret"} & {each["kind"] for each in found}
    for document in found:
        if document["kind"] != "ConfigMap":  # that of the gateway's page and of the test may speak of it
            assert "consul" not in json.dumps(document).replace('"ROLLCALL_CONSUL_UI", "value": ""', "").lower()
    for deployment in of_kind("Deployment", found).values():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert {"name": "ROLLCALL_REGISTRY", "value": "kubernetes"} in container["env"]


def test_services_are_labelled_with_what_their_instances_would_register() -> None:
    labels = {
        name: {key: value for key, value in each["metadata"]["labels"].items() if "rollcall/" in key}
        for name, each in of_kind("Service", documents(KUBERNETES)).items()
    }
    assert labels["rollcall-sum-headless"] == {"rollcall/service": "sum", "tag.rollcall/public": "true"}
    assert labels["rollcall-student-headless"] == {
        "rollcall/service": "student",
        "tag.rollcall/public": "true",
        "calls.rollcall/sum": "true",
    }
    assert "tag.rollcall/public" not in labels["rollcall-gateway-headless"]
    assert labels["rollcall-gateway"] == {}, "each instance once"


def test_who_calls_nobody_may_ask_kubernetes_nothing() -> None:
    found = documents(KUBERNETES)
    (role,) = of_kind("Role", found).values()
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
    ]
    (binding,) = of_kind("RoleBinding", found).values()
    assert [each["name"] for each in binding["subjects"]] == ["rollcall-gateway", "rollcall-student"]
    reach = {
        each["metadata"]["name"]
        for each in of_kind("NetworkPolicy", found).values()
        if {"ports": [{"port": 6443}], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]} in each["spec"]["egress"]
    }
    assert reach == {"rollcall-gateway", "rollcall-student"}
    assert edges(found, 8080) == {
        ("student", "sum"),
        *(("gateway", each) for each in PUBLIC),
        ("test", "gateway"),
    }


def test_the_key_of_the_gossip_is_made_anew_for_each_installation() -> None:
    keys = set()
    for flag in ("a=b", "c=d"):
        secret = of_kind("Secret", documents(None, "--set", f"global.{flag}"))["rollcall-consul-gossip"]
        key = json.loads(base64.b64decode(secret["data"]["gossip.json"]))["encrypt"]
        assert len(base64.b64decode(key)) == 32
        keys.add(key)
    assert len(keys) == 2


def test_a_change_of_consuls_configuration_restarts_it() -> None:
    def checksum(*flags: str) -> str:
        template = of_kind("StatefulSet", documents(None, *flags))["rollcall-consul-server"]["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() != checksum("--set", "consul.logLevel=debug")


def test_an_upgrade_of_the_services_does_not_restart_consul() -> None:
    def template(*flags: str) -> Any:
        return of_kind("StatefulSet", documents(None, *flags))["rollcall-consul-server"]["spec"]["template"]

    assert template() == template("--set", "image.tag=v2")


def test_the_plain_manifests_are_what_the_chart_renders() -> None:
    assert BASE.read_text() == rendered(), "run make manifests"


def test_the_table_of_values_is_what_the_file_says() -> None:
    assert table() in TABLE.read_text(), "run make manifests"


def test_the_overlays_build(tmp_path: Path) -> None:
    copied = tmp_path / "k8s"
    shutil.copytree(BASE.parents[1], copied)
    dev = built(copied / "overlays/dev")
    assert {each["metadata"].get("namespace", "rollcall-dev") for each in dev} == {"rollcall-dev"}
    assert {each["spec"]["replicas"] for each in of_kind("Deployment", dev).values()} == {1}
    with pytest.raises(LocalError, match=r"gossip\.json: no such file"):
        built(copied / "overlays/prod")
    (copied / "overlays/prod/gossip.json").write_text('{"encrypt": "a key"}\n')
    prod = built(copied / "overlays/prod")
    for document in (*dev, *prod):
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)
    student = of_kind("Deployment", prod)["rollcall-student"]["spec"]
    (container,) = student["template"]["spec"]["containers"]
    assert student["replicas"] == 3
    assert {"name": "students", "key": "url"} in [
        each["valueFrom"]["secretKeyRef"] for each in container["env"] if each["name"] == "ROLLCALL_DATABASE"
    ]
    assert not of_kind("PersistentVolumeClaim", prod)
    assert (
        base64.b64decode(of_kind("Secret", prod)["rollcall-consul-gossip"]["data"]["gossip.json"])
        == b'{"encrypt": "a key"}\n'
    )


def built(overlay: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(run_tool(["kubectl", "kustomize", str(overlay)])) if each]


@pytest.mark.parametrize("values", CHECKED, ids=lambda path: path.stem if path else "defaults")
def test_checkov_finds_nothing_that_has_no_reason(values: Path | None, tmp_path: Path) -> None:
    """See deploy/helm/checkov.yaml for what is left, and why."""
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(documents(values)))
    command: list[str | Path] = [
        ROOT / ".venv/checkov/bin/checkov",
        "--config-file",
        ROOT / "deploy/helm/checkov.yaml",
        "--file",
        file,
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Passed checks: \d{3,}, Failed checks: 0", done.stdout), done.stdout

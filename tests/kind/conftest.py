"""One cluster for the session, with the system installed; the table of what was done to it, in the end."""

import os
import secrets
import signal
from collections.abc import Generator, Iterator

import pytest

from deploy.kind import cluster as tools
from deploy.kind.cluster import ROOT, Kind
from deploy.local import LocalError
from deploy.local.guard import Guard
from deploy.local.progress import say
from tests.kind.system import STAYS, Step, System

LOGS = ROOT / ".run/kind-logs"
OTHER_TAG = "another"

SYSTEM = pytest.StashKey[System]()
STEPS = pytest.StashKey[list[Step]]()


def small() -> bool:
    """Whether everything is to run on one node: KIND_PROFILE=small."""
    profile = os.environ.get("KIND_PROFILE", "")
    if profile not in ("", "small"):
        pytest.exit(f"KIND_PROFILE: expected nothing or small, found {profile!r}", returncode=2)
    return profile == "small"


@pytest.fixture(scope="session")
def kind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    """A cluster of its own, deleted in the end unless KEEP=1; or the kept one that KIND_CLUSTER names."""
    try:
        tools.need_tools()
    except LocalError as error:
        pytest.fail(str(error))
    config = ROOT / f"deploy/kind/cluster{'-small' if small() else ''}.yaml"
    there = os.environ.get("KIND_CLUSTER")
    name = there or f"rollcall-test-{secrets.token_hex(3)}"
    kind = Kind(name, tmp_path_factory.mktemp("kube") / "config", config)
    keep = there or os.environ.get("KEEP") == "1"
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the cluster goes with the session
    try:
        if there:
            kind.adopt()
        else:
            say(f"creating the cluster {name}")
            kind.create()
        yield kind
    finally:
        if keep:
            say(f"kept: make kind-test KIND_CLUSTER={name} goes on with it; kind delete cluster --name {name}")
        else:
            kind.delete()
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def session_guard() -> Iterator[Guard]:
    with Guard() as guard:
        yield guard


@pytest.fixture(scope="session")
def system(kind: Kind, session_guard: Guard, pytestconfig: pytest.Config) -> System:
    """The chart, installed with its images, three servers of Consul, a database for student, and a caller."""
    tag = tools.version()  # the plain manifests name no other
    system = System(kind, tag, OTHER_TAG, session_guard)
    pytestconfig.stash[SYSTEM] = system
    pytestconfig.stash[STEPS] = system.steps
    with system.step("build the images"):
        images = tools.build(tag)
        again = [image.replace(f":{tag}", f":{OTHER_TAG}") for image in images]
        for image, other in zip(images, again, strict=True):
            tools.run(["docker", "tag", image, other])
        for name, flags in {"caller": [f"--build-arg=BASE=rollcall/sum:{tag}"], "postgres": []}.items():
            file, image = f"tests/kind/{name}.Dockerfile", f"rollcall-test/{name}:test"
            tools.run(["docker", "build", "--quiet", "--file", file, *flags, "--tag", image, "."])
            images.append(image)
        consul = tools.consul_image()
    with system.step("load them into the cluster"):
        kind.load(*images, consul)
        kind.load(*again)  # the same ones: kind only gives them another name
    with system.step("install the chart"):
        nodes = sorted(node["metadata"]["name"] for node in kind.get("nodes")["items"])
        kind.kubectl("label", "--overwrite", "node", nodes[0] if small() else nodes[1], STAYS)
        system.apply("namespace")
        system.apply("postgres")
        system.kubectl("wait", "pod/postgres", "--for=condition=Ready", "--timeout=120s")
        system.install()
    return system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and (system := item.config.stash.get(SYSTEM, None)):
        system.explain(LOGS / item.name)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    steps = config.stash.get(STEPS, [])
    if not steps:
        return
    terminalreporter.section("on Kubernetes")
    terminalreporter.line("| step | seconds | calls | failed |")
    terminalreporter.line("| --- | --- | --- | --- |")
    for step in steps:
        counted = f"{step.seen.calls.total():,} | {step.seen.failed.total()}" if step.seen else "|"
        terminalreporter.line(f"| {step.name} | {step.seconds:.0f} | {counted} |")

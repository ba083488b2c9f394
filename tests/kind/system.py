"""What the tests of the cluster work with: the system as it is installed there, who calls it, and what is seen."""

import contextlib
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from deploy.kind.cluster import CHART, Kind
from deploy.local import LocalError
from deploy.local.guard import Guard
from deploy.local.progress import say

T = TypeVar("T")

FOLDER = Path(__file__).parent
NAMESPACE = "rollcall"
RELEASE = "rollcall"
CONSUL = f"{RELEASE}-consul-server"
SERVERS = tuple(f"{CONSUL}-{number}" for number in range(3))
SERVICES = {"hello": 3, "sum": 3, "person": 3, "student": 3, "greeter": 3, "gateway": 2}
"""The services, and how many instances of each the tests install."""
CALLED = ("sum", "person", "greeter", "hello", "student")

STAYS = "rollcall-test=stays"
"""The label of the node that is never drained: the caller's, and the database's."""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
PAUSE = 0.25  # seconds between two looks at the cluster
ENOUGH = 100  # calls of each service that are made in each trouble, at least


def eventually(what: str, found: Callable[[], T], seconds: float = 60.0) -> T:
    """Ask until the answer is true; a command that fails meanwhile is no answer. Fails when none comes in time."""
    deadline = time.monotonic() + seconds
    while True:
        problem = "it is not so"
        try:
            if answer := found():
                return answer
        except (LocalError, json.JSONDecodeError) as error:
            problem = str(error)
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s: {problem}"
        time.sleep(PAUSE)


@dataclass(frozen=True)
class Seen:
    """What the caller has counted, since it began or within a while."""

    calls: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    errors: tuple[str, ...] = ()

    def since(self, before: "Seen") -> "Seen":
        new = tuple(error for error in self.errors if error not in before.errors)
        return Seen(self.calls - before.calls, self.failed - before.failed, self.answered - before.answered, new)


@dataclass
class Step:
    """One line of the table that is printed in the end."""

    name: str
    seconds: float = 0.0
    seen: Seen | None = None


class System:
    """The chart, installed in a cluster."""

    def __init__(self, kind: Kind, tag: str, other_tag: str, guard: Guard) -> None:
        self.kind, self.tag, self.other_tag, self._guard = kind, tag, other_tag, guard
        self.steps: list[Step] = []

    # Kubernetes

    def kubectl(self, *arguments: str, seconds: float = 300.0, stdin: str = "") -> str:
        return self.kind.kubectl("--namespace", NAMESPACE, *arguments, seconds=seconds, stdin=stdin)

    def get(self, *arguments: str) -> Any:
        return self.kind.get("--namespace", NAMESPACE, *arguments)

    def apply(self, name: str, **values: str) -> None:
        """Apply a file of this folder, with its {placeholders} filled in."""
        text = (FOLDER / f"{name}.yaml").read_text()
        for key, value in values.items():
            text = text.replace(f"{{{key}}}", value)
        self.kubectl("apply", "-f", "-", stdin=text)

    def helm(self, *arguments: str) -> str:
        return self.kind.helm("--namespace", NAMESPACE, *arguments)

    def install(self, *flags: str, tag: str = "", wait: bool = True) -> None:
        """Install the chart, or upgrade it, with student on PostgreSQL and the caller let in."""
        self.helm(
            *("upgrade", "--install", RELEASE, str(CHART), "--values", str(FOLDER / "values.yaml")),
            *("--set", f"image.tag={tag or self.tag}", *flags, *(("--wait", "--timeout", "6m") if wait else ())),
        )

    def pods(self, component: str) -> list[str]:
        """Return the names of a component's pods that are ready and not about to go."""
        found = self.get("pods", "--selector", f"app.kubernetes.io/component={component}")["items"]
        return sorted(pod["metadata"]["name"] for pod in found if _is_ready(pod))

    def connects(self, pod: str, address: str, port: int) -> bool:
        """Say whether a pod of ours can connect to an address."""
        try:
            self.kubectl("exec", pod, "--", "/opt/rollcall/bin/python", "-c", CONNECT, address, str(port), seconds=20)
        except LocalError:
            return False
        return True

    def rolled_out(self, what: str, seconds: float = 300.0) -> None:
        self.kubectl("rollout", "status", what, f"--timeout={seconds:g}s", seconds=seconds + 10)

    def deployments(self) -> list[str]:
        return [f"deployment/{RELEASE}-{service}" for service in SERVICES]

    # Consul

    def consul(self, path: str, *curl: str, server: str = "") -> Any:
        """Return what a Consul server answers, any that can be asked unless one is named."""
        problems = []
        for each in [server] if server else SERVERS:
            try:
                url = f"http://127.0.0.1:8500/v1/{path}"
                return json.loads(
                    self.kubectl("exec", each, "--", "curl", "-sf", "-m", "5", *curl, url, seconds=20) or "null"
                )
            except LocalError as error:
                problems.append(str(error))
        raise LocalError("\n".join(problems))

    def voters(self) -> list[str]:
        """Return the names of the servers that have a vote, if all are well."""
        state = self.consul("operator/autopilot/health")
        return sorted(each["Name"] for each in state["Servers"] if each["Voter"] and each["Healthy"])

    def leader(self) -> str:
        state = self.consul("operator/autopilot/health")
        return next((str(each["Name"]) for each in state["Servers"] if each["Leader"]), "")

    def passing(self, service: str) -> dict[str, Any]:
        """Return the instances of a service that pass, as Consul has them, by id."""
        return {each["Service"]["ID"]: each for each in self.consul(f"health/service/{service}?passing=true")}

    def whole(self) -> bool:
        """Whether Consul has all its servers, and each instance under its pod's name and no other."""
        return self.voters() == sorted(SERVERS) and all(
            sorted(self.passing(service)) == self.pods(service) != [] for service in SERVICES
        )

    # Who calls

    @contextlib.contextmanager
    def being_called(self, setting: str, value: str, account: str = "") -> Iterator[None]:
        """Have 16 callers at work inside the cluster, who find services by a setting; with an account, by its token."""
        self.apply(
            "caller", setting=setting, value=value, account=account or "default", token=str(bool(account)).lower()
        )
        eventually("every service is called", lambda: all(self.seen().calls[each] > 10 for each in CALLED), 120)
        yield
        self.kubectl("delete", "job", "caller", "--wait=true")

    def seen(self) -> Seen:
        """Return what the caller has counted so far."""
        report = eventually("the caller reports", lambda: json.loads(self.kubectl("logs", "job/caller", "--tail=1")))
        counters = {name: Counter(report[name]) for name in ("calls", "failed", "answered")}
        return Seen(**counters, errors=tuple(report["errors"]))

    @contextlib.contextmanager
    def trouble(self, name: str) -> Iterator[Callable[[], Seen]]:
        """Count the calls made in the block and for a while after it, of which none may fail.

        Yields a function that tells what was seen since the beginning of the block.
        """
        before, begun = self.seen(), time.monotonic()
        step = Step(name)
        self.steps.append(step)
        yield lambda: self.seen().since(before)
        step.seconds = time.monotonic() - begun
        after = self.seen()

        def called() -> Seen | None:
            more = self.seen().since(after)
            return more if all(more.calls[service] >= ENOUGH for service in CALLED) else None

        eventually("calls are made after it", called, 120)
        step.seen = self.seen().since(before)
        assert not step.seen.failed, f"{name}: {step.seen.failed}: {step.seen.errors}"
        assert self.get("job", "caller")["status"].get("active") == 1

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step during which nobody counts calls."""
        begun = time.monotonic()
        step = Step(name)
        self.steps.append(step)
        yield
        step.seconds = time.monotonic() - begun

    @contextlib.contextmanager
    def serving(self, says: str, *arguments: str) -> Iterator[str]:
        """Run kubectl for as long as the block lasts; yield the address that its first line says."""
        with subprocess.Popen(
            ["kubectl", "--context", f"kind-{self.kind.name}", *arguments],
            env={**os.environ, **self.kind.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        ) as child:
            self._guard.watch(child.pid)
            try:
                assert child.stdout
                line = child.stdout.readline()
                found = re.match(rf"{says} (127\.0\.0\.1:\d+)", line)
                assert found, f"expected kubectl to say {says!r}, found: {line}{child.stdout.read()}"
                yield found[1]
            finally:
                child.terminate()

    @contextlib.contextmanager
    def forwarded(self, what: str, port: int, namespace: str = NAMESPACE) -> Iterator[str]:
        """Forward a free local port, as `kubectl port-forward` does, and yield the address."""
        with self.serving("Forwarding from", "--namespace", namespace, "port-forward", what, f":{port}") as address:
            yield address.replace("127.0.0.1", "localhost")

    def explain(self, folder: Path) -> None:
        """Write down all that may tell why a test has failed."""
        folder.mkdir(parents=True, exist_ok=True)

        def write(name: str, *arguments: str) -> None:
            try:
                text = self.kind.kubectl(*arguments, seconds=60)
            except LocalError as error:
                text = str(error)
            (folder / name).write_text(text)

        write("pods.txt", "get", "pods", "--all-namespaces", "--output", "wide")
        write("events.txt", "get", "events", "--all-namespaces", "--sort-by", ".lastTimestamp")
        write("describe.txt", "--namespace", NAMESPACE, "describe", "nodes,pods,deployments,statefulsets,pvc")
        for view in ("members", "operator raft list-peers", "catalog services"):
            name = view.replace(" ", "-")
            write(f"consul-{name}.txt", "--namespace", NAMESPACE, "exec", SERVERS[0], "--", "consul", *view.split())
        for path in ("health/state/any", "operator/autopilot/health"):
            with contextlib.suppress(LocalError, json.JSONDecodeError):
                (folder / f"consul-{path.replace('/', '-')}.json").write_text(json.dumps(self.consul(path), indent=2))
        with contextlib.suppress(LocalError):
            for pod in self.get("pods")["items"]:
                name = pod["metadata"]["name"]
                write(f"{name}.log", "--namespace", NAMESPACE, "logs", name, "--all-containers", "--tail=2000")
                if any(each["restartCount"] for each in pod["status"].get("containerStatuses", ())):
                    write(f"{name}.previous.log", "--namespace", NAMESPACE, "logs", name, "--previous", "--tail=2000")
        say(f"what the cluster was like when the test failed is in {folder}")


def _is_ready(pod: Any) -> bool:
    conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions", ())}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]

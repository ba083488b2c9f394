"""python -m bench.kind: `rollcall.dial` beside what Kubernetes has of its own, on a kind cluster of its own.

The same caller calls the same pods of sum in three ways at the same time, while they are scaled, killed and restarted.
Exit code 1 when dial does not spread calls evenly, or a call of it fails. `make bench-kind` calls it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.kind import cluster as tools
from deploy.kind.cluster import ROOT, Kind
from deploy.local import LocalError
from deploy.local.guard import Guard
from deploy.local.progress import duration, say
from tests.kind.bench import WAYS, Tally
from tests.kind.system import NAMESPACE, RELEASE, SERVICES, System

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SPREAD = 1.05
"""The most calls that a pod may get through dial, of the mean, in steady times; and none may fail at any time."""
TITLES = {
    "rollcall": "`rollcall.dial`",
    "clusterip": "a ClusterIP Service, one channel",
    "headless": "a headless Service, `round_robin`",
}
Seen = dict[str, Tally]
"""What the caller has told of each way."""

TAG = "bench"
CALLER_IMAGE = f"rollcall-test/caller:{TAG}"
SUM = f"deployment/{RELEASE}-sum"
FEW, MANY = 3, 5
ENOUGH = 100  # calls in each way, before anything is measured
LOOK = 1.0  # seconds between two looks at the cluster, which cost the machine something
WAIT_SECONDS = 180.0
TROUBLE_SECONDS = 300.0
INTERRUPTED = 130


@dataclass(frozen=True)
class Periods:
    """Seconds."""

    steady: float
    unseen: float
    """After which a new pod that is still not called counts as not called."""
    quiet: float
    """Without a failed call, after which trouble counts as over."""


# gRPC looks a name up again when a connection breaks, at most once in 30 s: no trouble is to begin in that time.
FULL = Periods(steady=60, unseen=60, quiet=35)
QUICK = Periods(steady=10, unseen=10, quiet=5)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kind", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("--quick", action="store_true", help="a smoke run: short periods, latencies that vary")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up, then go
    folder = Path(os.environ.get("ROLLCALL_RUN") or ROOT / ".run").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    try:
        tools.need_tools()
        with cluster(folder) as kind, Guard() as guard:
            found = measure(System(kind, TAG, TAG, guard), folder, QUICK if arguments.quick else FULL)
    except LocalError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    results = folder / "bench-kind.json"
    results.write_text(json.dumps({"quick": arguments.quick, **found}, indent=2) + "\n")
    print(table(found))
    print(f"\nThe machine has held the caller up for {found['held_up']:.1f} s at most: calls may have waited for that.")
    print(f"written to {os.path.relpath(results)}, after {duration(time.monotonic() - begun)}")
    return verdict(found)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Kind]:
    """A cluster of a name and a kubeconfig that nobody else has; deleted in the end unless KEEP=1."""
    run = Path(tempfile.mkdtemp(dir=folder, prefix="bench-kind-"))
    kind = Kind(f"rollcall-bench-{secrets.token_hex(3)}", run / "config")
    try:
        say(f"creating the cluster {kind.name}")
        kind.create()
        yield kind
    finally:
        if os.environ.get("KEEP") == "1":
            say(f"kept: kubectl --kubeconfig {kind.kubeconfig} ...; kind delete cluster --name {kind.name}")
        else:
            say(f"deleting the cluster {kind.name}")
            kind.delete()
            shutil.rmtree(run, ignore_errors=True)


def measure(system: System, folder: Path, periods: Periods) -> dict[str, Any]:
    """Install what is called and who calls, make all the trouble, and return what was seen."""
    try:
        install(system)
        say("measuring")
        return {
            "steady": steady(system, periods),
            "scaled": scaled(system, periods),
            "killed": killed(system, periods),
            "restarted": restarted(system, periods),
            "held_up": told(system)["held_up"],
        }
    except LocalError:
        system.explain(folder / "bench-kind-logs")
        raise


def install(system: System) -> None:
    """Install Consul, three pods of sum, and the caller; wait until it calls in all ways."""
    say("building images")
    tools.build(TAG)
    base = f"--build-arg=BASE=rollcall/sum:{TAG}"
    caller = "tests/kind/caller.Dockerfile"
    tools.run(["docker", "build", "--quiet", "--file", caller, base, "--tag", CALLER_IMAGE, "."])
    consul = tools.consul_image()
    say("loading them")
    system.kind.load(f"rollcall/sum:{TAG}", CALLER_IMAGE, consul)
    say("installing the chart")
    system.kind.kubectl("create", "namespace", NAMESPACE)
    system.kind.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    off = ",".join(f"services.{each}.enabled=false" for each in SERVICES if each != "sum")
    system.install("--set", off)
    system.kubectl("apply", "-f", "-", stdin=(ROOT / "bench/kind.yaml").read_text())

    def called() -> bool:
        now = seen(system)
        return len(now["rollcall"].answered) == FEW and all(tally.answered.total() >= ENOUGH for tally in now.values())

    _await("sum is called in all ways", called)


def steady(system: System, periods: Periods) -> dict[str, Any]:
    """Let them call three pods that nothing happens to."""
    pods, before = system.pods("sum"), seen(system)
    time.sleep(periods.steady)
    now = seen(system)
    found = _counted("steady", now, before)
    for way, row in found.items():
        answered = [now[way].since(before[way]).answered[pod] for pod in pods]
        row["calls_per_pod"] = answered
        row["spread"] = max(answered) / statistics.mean(answered)
    return {"pods": pods, "seconds": periods.steady, "ways": found}


def scaled(system: System, periods: Periods) -> dict[str, Any]:
    """Add pods, and see when they are called."""
    old, before, begun = {*system.pods("sum")}, seen(system), time.time()
    system.kubectl("scale", SUM, f"--replicas={MANY}")
    _await(f"{MANY} pods are ready", lambda: len(system.pods("sum")) == MANY)
    new = {*system.pods("sum")} - old
    until = time.monotonic() + periods.unseen
    while time.monotonic() < until and not all(new <= {*tally.first} for tally in seen(system).values()):
        time.sleep(LOOK)
    _, now = settled(system, periods)
    found = _counted("scaled", now, before)
    for way, row in found.items():
        # The caller's clock is this machine's, as the nodes are containers on it.
        row["called_after"] = sorted(round(now[way].first[pod] - begun, 1) for pod in new & {*now[way].first})
    return {"ready_after": sorted(_ready_at(system, pod) - begun for pod in new), "ways": found}


def killed(system: System, periods: Periods) -> dict[str, Any]:
    """Kill a pod without grace: the one that is called in the most ways."""
    before = seen(system)

    def more() -> bool:
        now = seen(system)
        return all(now[way].since(before[way]).calls >= ENOUGH for way in WAYS)

    _await("more calls are made", more)
    now = seen(system)
    callers = {pod: [way for way in WAYS if now[way].since(before[way]).answered[pod]] for pod in system.pods("sum")}
    victim = max(callers, key=lambda pod: len(callers[pod]))
    system.kubectl("delete", "pod", victim, "--grace-period=0", "--force")
    _await("another is ready", lambda: victim not in (pods := system.pods("sum")) and len(pods) == MANY)
    _, after = settled(system, periods)
    return {"called_by": callers[victim], "ways": _counted("killed", after, now)}


def restarted(system: System, periods: Periods) -> dict[str, Any]:
    """Replace each pod, one after the other."""
    old, before = system.pods("sum"), seen(system)
    system.kubectl("rollout", "restart", SUM)
    system.rolled_out(SUM)

    def gone() -> bool:
        there = system.kubectl("get", "pods", "--output=name").split()
        return not any(f"pod/{pod}" in there for pod in old)

    _await("the old ones have gone", gone)
    calm, now = settled(system, periods)
    found = _counted("restarted", now, before)
    for way, row in found.items():
        row["called_afterwards"] = len(now[way].since(calm[way]).answered)
    return {"ways": found}


def settled(system: System, periods: Periods) -> tuple[Seen, Seen]:
    """Wait until no call has failed for a while, in any way; return what was seen when that while began, and ended."""
    deadline = time.monotonic() + TROUBLE_SECONDS
    calm, since = seen(system), time.monotonic()
    while time.monotonic() - since < periods.quiet:
        time.sleep(LOOK)
        now = seen(system)
        if any(now[way].failed != calm[way].failed for way in WAYS):
            calm, since = now, time.monotonic()
        if time.monotonic() > deadline:
            say(f"  calls still fail after {TROUBLE_SECONDS:g} s; going on")
            break
    return calm, seen(system)


def seen(system: System) -> Seen:
    """Return what the caller has seen since it began."""
    return {way: Tally.read(report) for way, report in told(system)["ways"].items()}


def told(system: System) -> Any:
    """Return the caller's last line."""
    lines = system.kubectl("logs", "job/caller", "--tail=1").splitlines()
    if not lines:
        raise LocalError("expected a line of the caller, found none")
    return json.loads(lines[-1])


def table(found: dict[str, Any]) -> str:
    """Return what was found as a table in Markdown."""

    def failed(phase: str) -> Callable[[str], str]:
        return lambda way: "{failed:,} of {calls:,}".format(**found[phase]["ways"][way])

    def evenly(way: str) -> str:
        row = found["steady"]["ways"][way]
        return f"{row['spread']:.2f} ({', '.join(f'{calls:,}' for calls in row['calls_per_pod'])})"

    def latency(way: str) -> str:
        row = found["steady"]["ways"][way]
        return f"{row['p50'] * 1000:.1f} ms, {row['p99'] * 1000:.1f} ms"

    def called(way: str) -> str:
        times = [f"{seconds:.1f} s" for seconds in found["scaled"]["ways"][way]["called_after"]]
        return ", ".join([*times, *["never"] * (MANY - FEW - len(times))])

    ready = ", ".join(f"{seconds:.0f} s" for seconds in found["scaled"]["ready_after"])
    shared = len(found["killed"]["called_by"])
    rows: dict[str, Callable[[str], str]] = {
        f"{FEW} pods: calls of the busiest, in means (of each)": evenly,
        "latency, p50 and p99": latency,
        "failed": failed("steady"),
        f"from {FEW} to {MANY} pods: failed": failed("scaled"),
        f"the new ones, ready after {ready}, were called after": called,
        f"a pod called in {shared} of the {len(WAYS)} ways is killed without grace: failed": failed("killed"),
        f"a rolling restart of {MANY} pods: failed": failed("restarted"),
        f"of the {MANY}, called afterwards": lambda way: str(found["restarted"]["ways"][way]["called_afterwards"]),
    }
    lines = ["| | " + " | ".join(TITLES.values()) + " |", "| --- " * (len(TITLES) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(cell(way) for way in TITLES) + " |" for title, cell in rows.items()]
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> int:
    """Say of each bar whether dial meets it; return the exit code."""
    ours = [found[phase]["ways"]["rollcall"] for phase in ("steady", "scaled", "killed", "restarted")]
    spread, failed = ours[0]["spread"], sum(row["failed"] for row in ours)
    even, whole = spread <= SPREAD, not failed
    print(f"{'pass' if even else 'FAIL'}: by dial the busiest pod gets {spread:.3f} of the mean; the bar is {SPREAD}")
    print(f"{'pass' if whole else 'FAIL'}: {failed:,} calls by dial have failed; the bar is 0")
    return 0 if even and whole else 1


def _counted(phase: str, now: Seen, before: Seen) -> dict[str, Any]:
    """Return what was seen of each way in a phase, as JSON has it, and say the gist."""
    found = dict[str, Any]()
    for way in WAYS:
        tally = now[way].since(before[way])
        found[way] = {
            "calls": tally.calls,
            "failed": tally.failed.total(),
            "statuses": {status: [count, tally.said[status]] for status, count in tally.failed.items()},
            "bad_seconds": tally.bad_seconds,
            "p50": tally.percentile(0.5),
            "p99": tally.percentile(0.99),
        }
    say(
        f"  {phase}, failed: {', '.join('{} {failed:,} of {calls:,}'.format(way, **row) for way, row in found.items())}"
    )
    return found


def _ready_at(system: System, pod: str) -> float:
    conditions = system.get("pod", pod)["status"]["conditions"]
    (when,) = (each["lastTransitionTime"] for each in conditions if each["type"] == "Ready")
    return datetime.fromisoformat(when).timestamp()


def _await(what: str, holds: Callable[[], bool]) -> None:
    """Ask until it is so; a command that fails meanwhile is no answer."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        problem = "it is not so"
        try:
            if holds():
                return
        except LocalError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise LocalError(f"{what}: not within {WAIT_SECONDS:g} s: {problem}")
        time.sleep(LOOK)


if __name__ == "__main__":
    sys.exit(main())

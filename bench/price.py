"""What Rollcall costs, beside bare grpc.aio: calls, and messages of streams, per CPU second of a server or a caller.

Two things are compared in short rounds that alternate, and the median of the rounds' ratios is taken: whatever else the
machine does at the time, it does to both. CPU time, not wall time, is what is compared.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from bench.rig import ANSWER_SECONDS, ROOT, Child, Rig, pin
from deploy.local import LocalError, gotools
from deploy.local.progress import say
from rollcall import ConsulRegistry, Instance
from rollcall.registry import TcpCheck

if TYPE_CHECKING:
    from collections.abc import Callable

GHZ_MODULE, GHZ_PACKAGE = Path(__file__).parent / "ghz", "github.com/bojand/ghz/cmd/ghz"
CONCURRENCY, CONNECTIONS = 32, 4
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # every call that was dialled brings one
SERVER_CORE, LOAD_CORE = 0, 1
STREAMS = ("client_stream", "server_stream", "bidi_stream")


def server(rig: Rig, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Load a bare server and an instance with everything on, by ghz."""
    ghz = ghz_binary()
    bare, bare_uvloop = rig.child("bare-server", "bench.bare"), rig.child("bare-uvloop", "bench.bare", "uvloop")
    (full,) = rig.instances(["sum-full"])
    ports = {"bare": bare.read(), "bare_uvloop": bare_uvloop.read(), "rollcall": port_of(full)}
    children = {"bare": bare, "bare_uvloop": bare_uvloop, "rollcall": full}
    for child in children.values():
        pin(child, SERVER_CORE)

    def measure(variant: str) -> float:
        before = children[variant].cpu()
        calls = _load(ghz, ports[variant], seconds)
        return calls / (children[variant].cpu() - before)

    found = alternate(measure, rounds, "server", list(children))
    lines = sum("code=OK" in line for line in full.log.read_text().splitlines())
    if not lines:
        raise LocalError(f"expected a log line per call in {full.log}, found none: this would compare the wrong thing")
    for child in children.values():
        child.kill()
    return found


def streams(rig: Rig, rounds: int, seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Load a bare server and an instance of greeter with streams of each kind; messages are what is counted."""
    bare = rig.child("bare-streams", "bench.bare")
    bare_uvloop = rig.child("bare-uvloop-streams", "bench.bare", "uvloop")
    (full,) = rig.instances(["greeter-full"])
    ports = {"bare": bare.read(), "bare_uvloop": bare_uvloop.read(), "rollcall": port_of(full)}
    children = {"bare": bare, "bare_uvloop": bare_uvloop, "rollcall": full}
    loads = {
        variant: rig.child(f"{variant}-streamer", "bench.streamer", f"127.0.0.1:{port}")
        for variant, port in ports.items()
    }
    for child in children.values():
        pin(child, SERVER_CORE)
    for load in loads.values():
        pin(load, LOAD_CORE)

    found = {}
    for kind in STREAMS:

        def measure(variant: str, kind: str = kind) -> float:
            before = children[variant].cpu()
            messages = loads[variant].ask([kind, seconds])
            return float(messages / (children[variant].cpu() - before))

        found[kind] = alternate(measure, rounds, kind.replace("_", " "), list(children))
    for child in (*children.values(), *loads.values()):
        child.kill()
    return found


def caller(rig: Rig, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Have two callers call one bare server, one through a bare channel, one through `rollcall.dial`."""
    target = rig.child("called-server", "bench.bare")
    port = target.read()
    registry = ConsulRegistry(rig.cluster.addresses)
    registry.register(Instance(id="called", name="called", address="127.0.0.1", port=port), TcpCheck())
    children = {
        "bare": rig.child("bare-caller", "bench.caller", "bare", f"127.0.0.1:{port}"),
        "rollcall": rig.child("rollcall-caller", "bench.caller", "dialled", "called"),
    }
    pin(target, LOAD_CORE)
    for child in children.values():
        pin(child, SERVER_CORE)

    def measure(variant: str) -> float:
        answer = children[variant].ask(seconds)
        return float(answer["calls"] / answer["cpu"])

    found = alternate(measure, rounds, "caller", list(children))
    for child in (*children.values(), target):
        child.kill()
    registry.deregister("called")
    return found


def ghz_binary() -> Path:
    """Return ghz as pinned in bench/ghz, built at the first use."""
    requirement = next(line for line in (GHZ_MODULE / "go.mod").read_text().splitlines() if "bojand/ghz v" in line)
    built = gotools.cache_dir() / f"ghz-{requirement.split()[1]}"
    gotools.build(GHZ_MODULE, GHZ_PACKAGE, built)
    return built


def alternate(
    measure: Callable[[str], float], rounds: int, what: str, variants: list[str]
) -> dict[str, dict[str, float]]:
    """Measure each variant in each round; return each one's calls per CPU second, and Rollcall's as a ratio to it."""
    for variant in variants:
        measure(variant)  # to warm up
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(rounds):
        for variant in variants:
            found[variant].append(measure(variant))
        variants.reverse()
        if (number + 1) % 5 == 0:
            say(f"  {what}: round {number + 1} of {rounds}")
    return {variant: _compared(found["rollcall"], found[variant]) for variant in found}


def _compared(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [each / other for each, other in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "calls_per_cpu_second": statistics.median(theirs),
        "ratio": middle,
        "ratio_quartile_1": low,
        "ratio_quartile_3": high,
    }


def _load(ghz: Path, port: int, seconds: float) -> int:
    command = [str(ghz), "--insecure", "--proto", "protos/sum/v1/sum.proto", "--call", "sum.v1.SumService.Add"]
    command += ["--data", '{"num1": 333, "num2": 666}', "--metadata", json.dumps({"traceparent": TRACEPARENT})]
    command += ["--concurrency", str(CONCURRENCY), "--connections", str(CONNECTIONS)]
    command += ["--duration", f"{seconds}s", "--duration-stop", "wait", "--format", "json", f"127.0.0.1:{port}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "GOMAXPROCS": "1"}) as ghz_run:
        pin(ghz_run.pid, LOAD_CORE)
        try:
            said = ghz_run.communicate(timeout=ANSWER_SECONDS)[0]
        finally:
            ghz_run.kill()
    report = json.loads(said)
    if set(report["statusCodeDistribution"]) != {"OK"}:
        raise LocalError(f"expected every call of ghz to be OK, found {report['statusCodeDistribution']}")
    return int(report["count"])


def port_of(instance: Child) -> int:
    """Return the port that an instance's log says it serves at."""
    found = re.search(r" serves at 127\.0\.0\.1:(\d+),", instance.log.read_text())
    if not found:
        raise LocalError(f"expected {instance.log} to tell where {instance.name} serves; it does not")
    return int(found[1])

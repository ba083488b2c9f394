"""python -m bench: what Rollcall costs, beside bare grpc.aio, measured in one run. `make bench` calls it.

Exit code 1 when a call, or a message of a stream, costs more than README promises. What is found is also written as
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import gateway, jsonrpc, membership, price
from bench.rig import ROOT, Rig
from deploy.local import LocalError
from deploy.local.progress import say

BARS = {"server": 0.90, "caller": 0.95, **dict.fromkeys(price.STREAMS, 0.90), "gateway": 0.85}
"""The least share of calls, or messages, per CPU second that is to be left: of bare grpc.aio's, and for the gateway
of a FastAPI handler's that was written by hand."""
NAMES = {"bare": "bare grpc.aio's", "handwritten": "the handwritten handler's"}
BASELINES = {"gateway": "handwritten"}
"""What a bar is measured against, where it is not bare grpc.aio."""
ROWS = (
    ("server", "server", "bare"),
    ("server, the bare one on uvloop", "server", "bare_uvloop"),
    ("caller", "caller", "bare"),
    *((kind.replace("_", " "), kind, "bare") for kind in price.STREAMS),
    *((f"{kind.replace('_', ' ')}, bare on uvloop", kind, "bare_uvloop") for kind in price.STREAMS),
    ("JSON-RPC server, beside Go's own", "hello", "go"),
    ("gateway, beside one by hand", "gateway", "handwritten"),
)
INTERRUPTED = 130


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: few and short rounds, figures that vary, no bar is a failure"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up, then go
    folder = Path(os.environ.get("ROLLCALL_RUN") or ROOT / ".run").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(dir=folder, prefix="bench-"))
    try:
        found = measure(run, quick=arguments.quick)
    except LocalError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; all that was started has been stopped")
        return INTERRUPTED
    finally:
        shutil.rmtree(run, ignore_errors=True)
    results = folder / "bench.json"
    results.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    print(f"\nwritten to {os.path.relpath(results)}")
    return verdict(found)


def measure(run: Path, *, quick: bool) -> dict[str, Any]:
    """Measure everything, and return it by name."""
    began = time.monotonic()
    price.ghz_binary()
    with Rig(run) as rig:
        rounds, seconds = (4, 0.5) if quick else (25, 0.8)
        say("server: an instance beside a bare server, loaded by ghz")
        server = price.server(rig, rounds, seconds)
        say("caller: rollcall.dial beside a bare channel")
        caller = price.caller(rig, rounds, seconds)
        say("streams: an instance beside a bare server, by streams of each kind")
        streams = price.streams(rig, *((2, 0.2) if quick else (15, 0.8)))
        say("hello: an instance beside Go's own JSON-RPC server")
        hello = jsonrpc.hello(rig, rounds, seconds)
        say("gateway: an instance beside a FastAPI handler written by hand")
        gateway_found = gateway.gateway(rig, rounds, seconds)
        say("membership: instances that come and are killed under calls")
        membership_found = membership.comings_and_goings(rig, rounds=1 if quick else 5)
        say("at rest: instances that nobody calls")
        rest = membership.at_rest(rig, seconds=3 if quick else 10)
        say("watching: many instances that are registered and change")
        watching = membership.watching(rig, (1, 10, 100) if quick else (1, 10, 100, 1000), changes=3 if quick else 10)
    return {
        "quick": quick,
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.monotonic() - began, 1),
        "bars": BARS,
        "server": server,
        "caller": caller,
        **streams,
        "hello": hello,
        "gateway": gateway_found,
        "membership": membership_found,
        "at_rest": rest,
        "watching": watching,
    }


def table(found: dict[str, Any]) -> str:
    """Return what was found as people read it."""
    title = "calls or messages per CPU second"
    lines = [f"{title:<36}{'bare':>10}{'rollcall':>10}{'ratio':>8}{'quartiles':>14}{'bar':>7}"]
    for title, side, beside in ROWS:
        row, ours = found[side][beside], found[side]["rollcall"]["calls_per_cpu_second"]
        quartiles = f"{row['ratio_quartile_1']:.3f}-{row['ratio_quartile_3']:.3f}"
        has_bar = side in BARS and beside == BASELINES.get(side, "bare")
        bar = f"{BARS[side]:>7.2f}" if has_bar else ""
        lines.append(
            f"{title:<36}{row['calls_per_cpu_second']:>10.0f}{ours:>10.0f}{row['ratio']:>8.3f}{quartiles:>14}{bar}"
        )
    moves, rest = found["membership"], found["at_rest"]
    lines += [
        "",
        *_timed("registered to first call", moves, "registered_to_first_call_seconds"),
        *_timed("kill -9 to last call sent there", moves, "kill_to_last_call_seconds"),
        f"{'calls lost per kill, no retries':<36}{moves['calls_lost_per_kill_without_retries']:>10.1f}",
        f"{'resident memory per instance':<36}{rest['resident_bytes'] / 1e6:>10.1f} MB",
        f"{'CPU of an idle instance':<36}{rest['idle_cpu_percent']:>10.2f} %",
        "",
        f"{'watched':>8}{'CPU/change':>13}{'applied in':>13}{'from Consul':>14}{'to gRPC':>12}{'resident':>12}",
    ]
    lines += [
        f"{row['instances']:>8}{row['cpu_seconds_per_change'] * 1000:>10.1f} ms"
        f"{row['change_to_snapshot_seconds'] * 1000:>10.1f} ms{row['consul_answer_bytes']:>12} B"
        f"{row['told_to_grpc_bytes']:>10} B{row['resident_bytes'] / 1e6:>9.1f} MB"
        for row in found["watching"]
    ]
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> int:
    """Say of each bar whether it is met; return the exit code, 0 for a run too short to tell."""
    missed = False
    for side, bar in BARS.items():
        beside = BASELINES.get(side, "bare")
        ratio = found[side][beside]["ratio"]
        missed |= ratio < bar
        said = "pass" if ratio >= bar else "FAIL"
        what = "messages" if side in price.STREAMS else "calls"
        print(
            f"{said}: a {side.replace('_', ' ')} keeps {ratio:.3f} of {NAMES[beside]} {what} per CPU second; "
            f"the bar is {bar:.2f}"
        )
    return int(missed and not found["quick"])


def _timed(title: str, found: dict[str, float], key: str) -> list[str]:
    return [f"{title:<36}{found[key] * 1000:>10.1f} ms   (worst {found[f'{key}_worst'] * 1000:.1f} ms)"]


if __name__ == "__main__":
    sys.exit(main())

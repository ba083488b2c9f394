"""python -m deploy.local up|down|status|logs: Rollcall on this machine. The Makefile's targets of those names call it.

Settings, from the environment:
  CONSUL_HTTP_PORT   HTTP port P of the first Consul server (8500). The others follow: HTTP P to P+2, RPC P+10 to P+12,
                     LAN gossip P+20 to P+22, WAN gossip P+30 to P+32; P+40 is abacus's, the service that is not
                     ours, P+41 and P+42 are the gateway's. The other services choose free ports.
  CONSUL_BIN         the Consul binary to use; without it one is found, downloaded or built.
  CONSUL_RELEASES    where HashiCorp's releases are mirrored (https://releases.hashicorp.com).
  ROLLCALL_RUN       where logs, data and process records are kept (.run).
  ROLLCALL_CACHE     where binaries are kept (~/.cache/rollcall).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.local import LocalError, process
from deploy.local.cluster import ABACUS, SERVERS, SPAN, STOP_SECONDS, Cluster, ports_from, rendered_port
from deploy.local.consul_binary import consul_binary
from deploy.local.lock import locked
from deploy.local.progress import Progress, say

try:
    from deploy.local import services
except ModuleNotFoundError as missing:
    sys.exit(
        f"expected the module {missing.name}, found none: run 'make up', which installs and generates what it needs"
    )

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

ROOT = Path(__file__).parents[2]
DRAIN_SECONDS = 40.0
LOCK_SECONDS = 600.0
LOG_LINES = 20
FOLLOW_SECONDS = 0.2
INTERRUPTED = 130


def main() -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.local",
        description="Three Consul servers and the services, on this machine.",
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start what does not run yet, wait until all of it passes, make a call to each")
    down_parser = commands.add_parser("down", help="stop all of it; its data is kept")
    down_parser.add_argument("--purge", action="store_true", help="remove all data and the logs as well")
    commands.add_parser("status", help="show what runs; exit code 1 unless all of it does")
    logs_parser = commands.add_parser("logs", help="show the last lines of the logs")
    logs_parser.add_argument("name", nargs="?", help="of one instance (sum-2) or service (sum, consul) only")
    logs_parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    arguments = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up, then go
    try:
        run = Path(os.environ.get("ROLLCALL_RUN") or ROOT / ".run").expanduser().resolve()
        match arguments.command:
            case "up":
                code = up(run)
            case "down":
                code = down(run, purge=arguments.purge)
            case "status":
                code = status(run)
            case _:
                code = logs(run, arguments.name, follow=arguments.follow)
    except LocalError as error:
        say(f"error: {error}")
        code = 1
    except BrokenPipeError:  # make logs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        code = 0
    except KeyboardInterrupt:
        say("interrupted")
        code = INTERRUPTED
    return code


def up(run: Path) -> int:
    """Start what is missing, show it at work, and leave it running; what this run started goes if it fails."""
    with _alone(run):
        port = _http_port(run)
        cluster = Cluster(run, ports_from(port), Path("consul"), abacus=port + ABACUS)
        absent = [n for n in SERVERS if not cluster.running(n)]
        if absent:
            cluster.check_ports(absent)  # before minutes may go into getting a binary
            cluster.binary = consul_binary()
        missing = services.missing(run)
        try:
            cluster.start()
            services.start(cluster, missing)
            services.wait_until_passing(cluster)
            calls = services.example_calls(cluster.addresses)
        except BaseException:
            _undo(run, [*missing, *(f"consul-{n}" for n in absent)])
            raise
        print("\n".join(calls), end="\n\n")
        _print_table(_rows(cluster))
        print(f"\nThe gateway's page: {services.gateway_url(cluster)}/")
        print(f"Consul's web page:  http://127.0.0.1:{port}/ui")
        print("Next: make status (what runs), make logs (what it says), make down (stop it)")
    return 0


def down(run: Path, *, purge: bool) -> int:
    """Stop everything recorded under the run directory: services first, so that they can drain and deregister."""
    with _alone(run):
        stopped = _stop(run, [found.name for found in process.all_recorded(run)])
        print(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")
        if purge:
            for name in ("data", "logs", "consul", "processes"):
                shutil.rmtree(run / name, ignore_errors=True)
            print("removed all data and the logs")
    return 0


def status(run: Path) -> int:
    """Print what runs; 0 if all of it does and passes, else 1."""
    rows = _rows(Cluster(run, ports_from(rendered_port(run) or _http_port(run)), Path("consul")))
    _print_table(rows)
    return 0 if all(row.health.startswith("passing") for row in rows) else 1


def logs(run: Path, name: str | None, *, follow: bool) -> int:
    """Print the last lines of each log, and with `follow` whatever is added."""
    chosen = [
        path for path in sorted((run / "logs").glob("*.log")) if name in (None, path.stem, path.stem.rpartition("-")[0])
    ]
    if not chosen:
        raise LocalError(
            f"expected logs{f' of {name}' if name else ''} in {run / 'logs'}, found none: start with make up"
        )
    width = max(len(path.stem) for path in chosen)
    ends = {path: path.stat().st_size for path in chosen}
    for path in chosen:
        for line in process.tail(path, LOG_LINES).splitlines():
            print(f"{path.stem:<{width}} | {line.removeprefix('    ')}")
    while follow:
        time.sleep(FOLLOW_SECONDS)  # there is no portable way to be told
        for path in chosen:
            ends[path] = _print_added(path, ends[path], f"{path.stem:<{width}} | ")
    return 0


def _print_added(path: Path, start: int, prefix: str) -> int:
    """Print the whole lines added to a log since `start` and return where they end."""
    size = path.stat().st_size
    if size < start:  # begun anew
        start = 0
    with path.open("rb") as file:
        file.seek(start)
        added, newline, _ = file.read(size - start).rpartition(b"\n")
    for line in added.decode(errors="replace").splitlines():
        print(f"{prefix}{line}", flush=True)
    return start + len(added) + len(newline)


def _http_port(run: Path) -> int:
    """Return the port that is set, refusing one that does not fit what runs already."""
    setting = os.environ.get("CONSUL_HTTP_PORT") or "8500"
    if not setting.isdecimal() or not 1 <= int(setting) <= 65535 - SPAN:
        raise LocalError(f"CONSUL_HTTP_PORT should be a port between 1 and {65535 - SPAN}, but it is '{setting}'")
    used = rendered_port(run)
    if used not in (None, int(setting)) and any(process.running(run, f"consul-{n}") for n in SERVERS):
        raise LocalError(
            f"CONSUL_HTTP_PORT is {setting}, but Consul runs with {used} already: make down first, or unset it"
        )
    return int(setting)


def _rows(cluster: Cluster) -> list[services.Row]:
    health = cluster.get("/v1/operator/autopilot/health") or {}
    known = {server["Name"]: server for server in health.get("Servers") or ()}
    rows = []
    for n, address in zip(SERVERS, cluster.addresses, strict=True):
        server = known.get(f"consul-{n}", {})
        if not cluster.running(n):
            state = "not running"
        elif cluster.server(n).frozen():
            state = "frozen"
        elif server.get("Healthy") and server.get("Voter"):
            state = "passing, leader" if server["Leader"] else "passing"
        else:
            state = "running, but not a healthy voter"
        rows.append(services.Row("consul", f"consul-{n}", address, state, str(cluster.log(n))))
    return rows + services.rows(cluster)


def _print_table(rows: Iterable[services.Row]) -> None:
    lines = [("NAME", "ID", "ADDRESS", "HEALTH", "LOG")]
    for row in rows:
        log = Path(row.log)
        shown = log.relative_to(Path.cwd()) if log.is_relative_to(Path.cwd()) else log
        lines.append((row.name, row.id, row.address or "-", row.health, str(shown)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _undo(run: Path, names: list[str]) -> None:
    for sig in process.INTERRUPTS:
        signal.signal(sig, signal.SIG_IGN)  # it is bounded, and half done it would leave strays
    stopped = _stop(run, names)
    if stopped:
        say(f"stopped again: {', '.join(stopped)}")


def _stop(run: Path, names: list[str]) -> list[str]:
    """Stop these by name, services before servers, and return the names of those that ran."""
    found = [running for name in names if (running := process.running(run, name))]
    servers = [each for each in found if each.name.startswith("consul-")]
    draining = [each for each in found if each not in servers]
    with Progress("stopping") as progress:
        for group, grace in ((draining, DRAIN_SECONDS), (servers, STOP_SECONDS)):
            progress(", ".join(each.name for each in group))
            for killed in process.stop_all(group, grace):
                say(f"{killed.name} should have gone within {grace:g} s of SIGTERM, but had to be killed")
    for name in names:
        process.forget(run, name)
    return [each.name for each in found]


def _alone(run: Path) -> AbstractContextManager[None]:
    return locked(run / "lock", "another 'make up' or 'make down'", LOCK_SECONDS)


if __name__ == "__main__":
    sys.exit(main())

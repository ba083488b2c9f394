"""python -m deploy.local up|down|status|logs: Rollcall on this machine. The Makefile's targets of those names call it.

Settings, from the environment:
  CONSUL_HTTP_PORT   HTTP port P of the first Consul server (8500). The others follow: HTTP P to P+2, RPC P+10 to P+12,
                     LAN gossip P+20 to P+22, WAN gossip P+30 to P+32; P+40 is abacus's, the service that is not
                     ours, P+41 and P+42 are the gateway's. The other services choose free ports.
  REGISTRY           mdns: no Consul at all; the services find each other by multicast, on the network interface with
                     the address in MDNS_INTERFACE (127.0.0.1), or on all of them (all).
  AGENTS             client: a Consul agent in client mode runs beside the servers, at P+6, and the services register
                     through it.
  DATACENTERS        2: a second datacenter beside the first, with three servers, at P+3 to P+5, and services of its
                     own; what does not pass in one is called in the other.
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
from deploy.local.cluster import AGENT, STOP_SECONDS
from deploy.local.consul_binary import consul_binary
from deploy.local.lock import locked
from deploy.local.progress import Progress, say

try:
    from deploy.local import services
    from deploy.local.sites import ConsulSite
    from deploy.local.topology import Topology
except ModuleNotFoundError as missing:
    sys.exit(
        f"expected the module {missing.name}, found none: run 'make up', which installs and generates what it needs"
    )

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from deploy.local.cluster import Cluster
    from deploy.local.sites import Site

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
        topology = Topology.chosen(run)
        sites = topology.sites(run)
        clusters = [site.cluster for site in sites if isinstance(site, ConsulSite)]
        absent = {cluster: [n for n in cluster.ports if not cluster.running(n)] for cluster in clusters}
        if any(absent.values()):
            for cluster, numbers in absent.items():
                cluster.check_ports(numbers)  # before minutes may go into getting a binary
            binary = consul_binary()
            for cluster in clusters:
                cluster.binary = binary
        missing = {site: services.missing(site) for site in sites}
        topology.save(run)
        try:
            _start(clusters, missing)
            calls = {site: services.example_calls(site) for site in sites}
        except BaseException:
            started = [name for names in missing.values() for name in names]
            _undo(run, [*started, *(cluster.name(n) for cluster, numbers in absent.items() for n in numbers)])
            raise
        for site in sites:
            if len(sites) > 1:
                print(f"From {site.title}:")
            print("\n".join(calls[site]), end="\n\n")
        _print_table(row for site in sites for row in _rows(site))
        print(f"\nThe gateway's page: http://127.0.0.1:{sites[0].gateway}/")
        if clusters:
            print(f"Consul's web page:  http://127.0.0.1:{topology.port}/ui")
        print("Next: make status (what runs), make logs (what it says), make down (stop it)")
    return 0


def _start(clusters: Iterable[Cluster], missing: dict[Site, list[str]]) -> None:
    """Start what is missing, and wait until all of it passes."""
    for cluster in clusters:
        cluster.start()
    for cluster in clusters:
        cluster.wait_for_others()
    for site, names in missing.items():
        services.start(site, names)
    for site in missing:
        services.wait_until_passing(site)


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
    topology = Topology.known(run) or Topology.wanted()
    rows = [row for site in topology.sites(run) for row in _rows(site)]
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


def _rows(site: Site) -> list[services.Row]:
    return [*(_servers(site.cluster) if isinstance(site, ConsulSite) else ()), *services.rows(site)]


def _servers(cluster: Cluster) -> list[services.Row]:
    health = cluster.get("/v1/operator/autopilot/health") or {}
    known = {server["Name"]: server for server in health.get("Servers") or ()}
    rows = []
    for n in sorted(cluster.ports, key=lambda n: (n == AGENT, n)):
        server = known.get(cluster.name(n), {})
        if not cluster.running(n):
            state = "not running"
        elif cluster.server(n).frozen():
            state = "frozen"
        elif n == AGENT:
            state = "passing" if cluster.joined(n) else "running, but has not joined the servers"
        elif server.get("Healthy") and server.get("Voter"):
            state = "passing, leader" if server["Leader"] else "passing"
        else:
            state = "running, but not a healthy voter"
        rows.append(services.Row("consul", cluster.name(n), cluster.address(n), state, str(cluster.log(n))))
    return rows


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

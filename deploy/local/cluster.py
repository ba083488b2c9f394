"""Three Consul servers on loopback: what `make up` starts, and what the integration tests kill, freeze and restart.

Beside them there can be a client agent, for services to register through, and the servers of another datacenter.

The configuration is plain Consul files in deploy/local/consul. A Cluster renders each server's file into its run
directory with its own ports, because Consul appends lists (retry_join) from later files and so cannot override them.

What the files cannot say for themselves, being JSON:

- leave_on_terminate is false: a server stopped here comes back, with its data. Were it to leave, stopping all three
  would shrink the peer set to one, and that one would be alone with the data on the next start.
- autopilot.min_quorum is 3, so that a killed server stays a voter and counts as soon as it is back. Otherwise it would
  be pruned and return as a non-voter, and killing a second one meanwhile would lose the quorum.
- autopilot.last_contact_threshold is raised from 200 ms: a busy laptop is late now and then without being unwell.
- abacus.json describes a service that is not ours, see abacus.py. Every server is given it, so that the service stays
  listed while one of them is away; to those who look for it the three entries are one instance, as they have one id.
- http_max_conns_per_client is raised from 200, as every watcher of every service here comes from the same loopback
  address; it stays below 4096, the file descriptors some systems allow, for Consul refuses to start otherwise.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import psutil
import requests

from deploy.local import LocalError, process
from deploy.local.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

CONFIG = Path(__file__).parent / "consul"
HOST = "127.0.0.1"
SERVERS = (1, 2, 3)
AGENT = 0
"""The number that the client agent goes by, where there is one."""
START_SECONDS = 30.0
STOP_SECONDS = 10.0
ABORT_SECONDS = 1.0  # Consul loses a SIGTERM that comes while it starts
REQUEST_SECONDS = 1.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one server, named as in Consul's configuration."""

    http: int
    server: int
    serf_lan: int
    serf_wan: int


DEFAULT_PORT = 8500
"""The first server's HTTP port, unless something else is said."""
ABACUS, GATEWAY = 40, 41
"""How far above the first server's HTTP port abacus's port is, and the first of the gateway's two."""
SPAN = 42
"""How far above it the last of the ports is that follow from it."""
AGENT_PORTS = ("http", "serf_lan")
"""What a client agent listens on."""
PURPOSES = {"http": "HTTP", "server": "RPC", "serf_lan": "LAN gossip", "serf_wan": "WAN gossip"}


def ports_from(http: int, datacenter: int = 1) -> tuple[Ports, ...]:
    """Return the ports of a datacenter's servers, which follow from the first one's HTTP port P.

    HTTP is P to P+2 for servers 1 to 3, RPC P+10 to P+12, LAN gossip P+20 to P+22, WAN gossip P+30 to P+32; the second
    datacenter's are the next three of each. P+40 to P+42 are left to the services whose ports are fixed.
    """
    first = http + len(SERVERS) * (datacenter - 1)
    return tuple(_ports(first + i) for i in range(len(SERVERS)))


def agent_ports_from(http: int, datacenter: int = 1) -> Ports:
    """Return the ports of a datacenter's client agent: HTTP P+6 or P+7, and LAN gossip 20 above it."""
    return _ports(http + 2 * len(SERVERS) + datacenter - 1)


def _ports(http: int) -> Ports:
    return Ports(http, http + 10, http + 20, http + 30)


def free_ports(count: int = len(SERVERS)) -> tuple[Ports, ...]:
    """Pick loopback ports for so many servers, free for TCP and UDP.

    They come from below the range the kernel gives to outgoing connections (from 32768 on Linux, 49152 on macOS), so
    that nothing takes them by accident before the servers do; and they are this process' until it ends, so that nobody
    who asks here is given them, in another process either, while a server is away.
    """
    candidates = iter(random.sample(range(15000, 24000), 400))
    kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    free = (port for port in candidates if all(_bindable(port, kind) for kind in kinds) and reserve(port))
    try:
        return tuple(Ports(next(free), next(free), next(free), next(free)) for _ in range(count))
    except (StopIteration, RuntimeError) as error:
        raise LocalError(f"expected {4 * count} free loopback ports between 15000 and 24000, found fewer") from error


_reserved: list[BinaryIO] = []


def reserve(port: int) -> bool:
    """Have a port be this process' until it ends, as far as others look here; say whether it was nobody's."""
    folder = Path(tempfile.gettempdir()) / f"rollcall-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    file = (folder / str(port)).open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    _reserved.append(file)
    return True


class Cluster:
    """Three Consul servers of a datacenter, their files under one directory; data and logs stay across restarts.

    with Cluster(Path(".run"), ports_from(8500), consul_binary()) as cluster:
        cluster.stop_server(cluster.leader(), signal.SIGKILL)
        cluster.wait_for_leader()

    Servers are known by number, 1 to 3, and with the ports for it there is a client agent, number 0. What already runs
    under the directory is adopted, not started again. `on_start` is called with the pid of every one started (see
    guard.py). With `abacus`, a port, the servers are told of the service that is not ours; it is not started here.
    `others` are the ports of the servers in each of the other datacenters, for these to join.
    """

    def __init__(
        self,
        run: Path,
        ports: Sequence[Ports],
        binary: Path,
        *,
        datacenter: int = 1,
        agent: Ports | None = None,
        others: Mapping[str, Sequence[Ports]] | None = None,
        on_start: Callable[[int], None] | None = None,
        abacus: int | None = None,
    ) -> None:
        self.run = run.resolve()
        self.ports = dict(zip(SERVERS, ports, strict=True))
        if agent:
            self.ports[AGENT] = agent
        self.binary = binary
        self.number = datacenter
        self.others = others or {}
        self.abacus = abacus
        self._on_start = on_start
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no business on loopback

    @property
    def addresses(self) -> list[str]:
        """The servers' HTTP addresses, each as host:port."""
        return [self.address(n) for n in SERVERS]

    @property
    def entrance(self) -> list[str]:
        """The HTTP addresses for services to register at: the client agent's where there is one, else the servers'."""
        return [self.address(AGENT)] if AGENT in self.ports else self.addresses

    @property
    def datacenter(self) -> str:
        """What Consul calls it."""
        return f"dc{self.number}"

    def address(self, n: int) -> str:
        """Return the HTTP address of a server, or of the agent, as host:port."""
        return f"{HOST}:{self.ports[n].http}"

    def name(self, n: int) -> str:
        """Return the name of a server, or of the agent, which is that of its process and its node."""
        return f"consul-{n + len(SERVERS) * (self.number - 1)}" if n else f"consul-agent-{self.number}"

    def start(self, timeout: float = START_SECONDS) -> list[int]:
        """Start what does not run and wait for a healthy cluster; return the numbers of those started.

        Raises LocalError when a port is taken, a server exits, or there is no leader in `timeout` seconds. Whatever was
        started is stopped again then.
        """
        missing = [n for n in self.ports if not self.running(n)]
        self.check_ports(missing)
        try:
            for n in missing:
                self._spawn(n)
            self._until(timeout, self._whole, starting=missing)
            if AGENT in self.ports:
                self._until(timeout, self._agent_joined, starting=missing)
        except BaseException:
            self._stop(missing, ABORT_SECONDS)
            raise
        return missing

    def start_server(self, n: int, timeout: float = START_SECONDS) -> None:
        """Start one server and wait until it answers HTTP; with or without a leader."""
        if self.running(n):
            return
        self.check_ports([n])
        self._spawn(n)
        self._until(timeout, lambda: self._answering(n), starting=[n])

    def stop_server(self, n: int, sig: signal.Signals = signal.SIGTERM) -> None:
        """Send one server a signal: SIGTERM and SIGKILL wait until it has gone, SIGSTOP freezes, SIGCONT thaws."""
        found = self.server(n)
        if sig == signal.SIGSTOP:
            found.freeze()
        elif sig == signal.SIGCONT:
            found.signal(sig)
        elif sig == signal.SIGKILL:
            found.kill()
        else:
            found.stop(STOP_SECONDS)

    def wipe_data(self, n: int) -> None:
        """Remove the data of a stopped server, its node id included."""
        if self.running(n):
            raise LocalError(f"{self.name(n)} should be stopped before its data is removed, but it runs: stop it first")
        shutil.rmtree(self._data(n), ignore_errors=True)

    def wait_for_leader(self, timeout: float = START_SECONDS) -> int:
        """Wait until the cluster is as whole as it can be and return the leader's number.

        That is: every running server names the same leader, knows three peers, and is a healthy voter in autopilot's
        eyes. Having a leader is not enough: a server that rejoined is no voter at first, and stopping the next one
        could lose the quorum. Dead and frozen servers are left out.
        """
        return self._until(timeout, self._whole)

    def wait_for_others(self, timeout: float = START_SECONDS) -> None:
        """Wait until the servers have joined those of the other datacenters."""

        def joined() -> int | str:
            lacking = set(self.others).difference(self.get("/v1/catalog/datacenters") or ())
            return f"{self.datacenter} does not know {', '.join(sorted(lacking))}" if lacking else 1

        self._until(timeout, joined)

    def leader(self) -> int:
        """Return the leader's number as the running servers see it now; 0 without a leader they agree on."""
        votes = {self._get(n, "/v1/status/leader") for n in self._awake()}
        return next((n for n in self._awake() if votes == {self._rpc(n)}), 0)

    def joined(self, n: int) -> bool:
        """Whether this server, or the agent, knows a leader."""
        return bool(self._get(n, "/v1/status/leader"))

    def get(self, path: str) -> Any:
        """Return what the first server to answer says to this path of the HTTP API; None if none answers."""
        return next((found for n in self._awake() if (found := self._get(n, path)) is not None), None)

    def running(self, n: int) -> bool:
        """Whether this server runs (frozen counts)."""
        return process.running(self.run, self.name(n)) is not None

    def server(self, n: int) -> process.Process:
        """Return this server's process, running or not; raises LocalError if it was never started."""
        found = process.recorded(self.run, self.name(n))
        if not found:
            raise LocalError(f"{self.name(n)} should have been started before, but {self.run} has no record of it")
        return found

    def log(self, n: int) -> Path:
        """Return this server's log file."""
        return self.run / "logs" / f"{self.name(n)}.log"

    def stop(self) -> list[int]:
        """Stop all that runs and return their numbers; the data stays."""
        return self._stop(self.ports, STOP_SECONDS)

    def check_ports(self, servers: Iterable[int] = SERVERS) -> None:
        """Raise LocalError, naming port, purpose and holder, if a port these servers need is taken."""
        for n in servers:
            used = asdict(self.ports[n])
            for field, port in used.items() if n else [(field, used[field]) for field in AGENT_PORTS]:
                kinds = [socket.SOCK_STREAM, *([socket.SOCK_DGRAM] if field.startswith("serf") else [])]
                if not all(_bindable(port, kind) for kind in kinds):
                    what = f"port {port} ({PURPOSES[field]} of {self.name(n)})"
                    raise LocalError(
                        f"{what} should be free, but {_holder(port)} has it: stop that, or set CONSUL_HTTP_PORT to a "
                        f"port with {SPAN + 1} free ones from it"
                    )

    def render(self, n: int) -> Path:
        """Write this server's configuration, with its own ports, into the run directory; return the folder."""
        file = CONFIG / (f"server-{n}/server.json" if n else "agent/agent.json")
        config = json.loads(file.read_text())
        used = asdict(self.ports[n])
        config["ports"] = {field: used[field] for field in config["ports"]}
        config["retry_join"] = [f"{HOST}:{self.ports[server].serf_lan}" for server in SERVERS]
        if n and self.others:
            config["retry_join_wan"] = [f"{HOST}:{each.serf_wan}" for ports in self.others.values() for each in ports]
        if self.number > 1:
            config |= {"node_name": self.name(n), "datacenter": self.datacenter}
        target = self.run / "consul" / self.name(n) / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(config, indent=2) + "\n")
        return target.parent

    def render_abacus(self, port: int) -> Path:
        """Write the description of the service that is not ours, with its port, into the run directory; return it."""
        description = json.loads((CONFIG / "abacus.json").read_text())
        description["service"]["port"] = port
        description["service"]["check"]["grpc"] = f"{HOST}:{port}"
        target = self.run / "consul" / "abacus.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(description, indent=2) + "\n")
        return target

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, n: int) -> None:
        config = self.render(n)
        command = [str(self.binary), "agent", "-config-file", str(CONFIG / "common.json")]
        command += ["-config-dir", str(config), "-data-dir", str(self._data(n))]
        if self.abacus and n:
            command += ["-config-file", str(self.render_abacus(self.abacus))]
        started = process.start(self.name(n), command, run=self.run)
        if self._on_start:
            self._on_start(started.pid)

    def _stop(self, servers: Iterable[int], grace: float) -> list[int]:
        stopping = {n: found for n in servers if (found := process.running(self.run, self.name(n)))}
        process.stop_all(stopping.values(), grace)
        for n in stopping:
            process.forget(self.run, self.name(n))
        return list(stopping)

    def _until(self, timeout: float, check: Callable[[], int | str], starting: Iterable[int] = ()) -> int:
        """Wait until `check` returns a server's number and return it; until then it says what is lacking.

        Raises LocalError with that when time is up, and at once when a server that is `starting` exits.
        """
        deadline = time.monotonic() + timeout
        with Progress("waiting for Consul") as progress:
            while isinstance(found := check(), str):
                for n in starting:
                    if not self.running(n):
                        said = f"the last lines of {self.log(n)}:\n{self.server(n).tail()}"
                        raise LocalError(f"{self.name(n)} exited while starting; {said}")
                if time.monotonic() >= deadline:
                    raise LocalError(
                        f"expected Consul to be ready within {timeout:g} s, but {found}: see {self.run}/logs"
                    )
                progress(found)
                time.sleep(POLL_SECONDS)
        return found

    def _answering(self, n: int) -> int | str:
        # Without a leader the answer is an empty string, which is an answer.
        return f"{self.name(n)} does not answer" if self._get(n, "/v1/status/leader") is None else n

    def _agent_joined(self) -> int | str:
        return AGENT if self.joined(AGENT) else f"{self.name(AGENT)} has not joined the servers"

    def _whole(self) -> int | str:
        awake = self._awake()
        leader = self.leader()
        if not leader:
            return f"the running servers ({', '.join(map(self.name, awake)) or 'none'}) agree on no leader"
        health = self._get(leader, "/v1/operator/autopilot/health") or {}
        voters = {server["ID"] for server in health.get("Servers") or () if server["Healthy"] and server["Voter"]}
        _, goal = self._raft(leader)
        for n in awake:
            if len(self._get(n, "/v1/status/peers") or ()) != len(SERVERS):
                return f"{self.name(n)} does not know {len(SERVERS)} peers"
            # Autopilot looks around every two seconds only. So compare the id, which is new for a server that has lost
            # its data, and see for ourselves whether one that has been away has caught up.
            node, applied = self._raft(n)
            if node not in voters:
                return f"{self.name(n)} is not a healthy voter"
            if applied < goal:
                return f"{self.name(n)} has not caught up"
        return leader

    def _raft(self, n: int) -> tuple[str, int]:
        """Return a server's node id and the index of the last Raft entry it has applied; -1 if it does not answer."""
        found = self._get(n, "/v1/agent/self")
        return (found["Config"]["NodeID"], int(found["Stats"]["raft"]["applied_index"])) if found else ("", -1)

    def _awake(self) -> list[int]:
        found = {n: process.running(self.run, self.name(n)) for n in SERVERS}
        return [n for n, server in found.items() if server and not server.frozen()]

    def _get(self, n: int, path: str) -> Any:
        """Return a server's answer, whatever its status says; None without one."""
        try:
            return self._session.get(f"http://{HOST}:{self.ports[n].http}{path}", timeout=REQUEST_SECONDS).json()
        except (requests.RequestException, ValueError):
            return None

    def _rpc(self, n: int) -> str:
        return f"{HOST}:{self.ports[n].server}"

    def _data(self, n: int) -> Path:
        return self.run / "data" / self.name(n)


def _bindable(port: int, kind: socket.SocketKind) -> bool:
    with closing(socket.socket(socket.AF_INET, kind)) as probe:
        if kind == socket.SOCK_STREAM:  # as Consul does: connections that linger after a restart do not hold a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _holder(port: int) -> str:
    try:
        pids = {c.pid for c in psutil.net_connections("inet") if c.laddr and c.laddr.port == port and c.pid}
        for pid in pids:
            return f"{psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:  # macOS tells root only
        pass
    return "another process"

"""Three Consul servers on loopback: what `make up` starts, and what the integration tests kill, freeze and restart.

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

import json
import random
import shutil
import signal
import socket
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
import requests

from deploy.local import LocalError, process
from deploy.local.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

CONFIG = Path(__file__).parent / "consul"
HOST = "127.0.0.1"
SERVERS = (1, 2, 3)
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


ABACUS, GATEWAY = 40, 41
"""How far above the first server's HTTP port abacus's port is, and the first of the gateway's two."""
SPAN = 42
"""How far above it the last of the ports is that follow from it."""
PURPOSES = {"http": "HTTP", "server": "RPC", "serf_lan": "LAN gossip", "serf_wan": "WAN gossip"}


def ports_from(http: int) -> tuple[Ports, ...]:
    """Return the ports that follow from the first server's HTTP port P.

    HTTP is P to P+2 for servers 1 to 3, RPC P+10 to P+12, LAN gossip P+20 to P+22, WAN gossip P+30 to P+32. P+40 to
    P+42 are left to the services whose ports are fixed.
    """
    return tuple(Ports(http + i, http + 10 + i, http + 20 + i, http + 30 + i) for i in range(len(SERVERS)))


def rendered_port(run: Path) -> int | None:
    """Return the first server's HTTP port as rendered for the last start under this directory, if there was one."""
    try:
        return int(json.loads(_rendered(run, 1).read_text())["ports"]["http"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def free_ports() -> tuple[Ports, ...]:
    """Pick loopback ports for three servers, free for TCP and UDP.

    They come from below the range the kernel gives to outgoing connections (from 32768 on Linux, 49152 on macOS), so
    that nothing takes them by accident before the servers do.
    """
    candidates = iter(random.sample(range(15000, 32000), 400))
    free = (port for port in candidates if _bindable(port, socket.SOCK_STREAM) and _bindable(port, socket.SOCK_DGRAM))
    try:
        return tuple(Ports(next(free), next(free), next(free), next(free)) for _ in SERVERS)
    except (StopIteration, RuntimeError) as error:
        raise LocalError("expected 12 free loopback ports between 15000 and 32000, found fewer") from error


class Cluster:
    """Three Consul servers with their files under one directory; data and logs stay there across restarts.

    with Cluster(Path(".run"), ports_from(8500), consul_binary()) as cluster:
        cluster.stop_server(cluster.leader(), signal.SIGKILL)
        cluster.wait_for_leader()

    Servers are known by number, 1 to 3. What already runs under the directory is adopted, not started again.
    `on_start` is called with the pid of every server started (see guard.py). With `abacus`, a port, the servers are
    told of the service that is not ours; it is not started here.
    """

    def __init__(
        self,
        run: Path,
        ports: Sequence[Ports],
        binary: Path,
        *,
        on_start: Callable[[int], None] | None = None,
        abacus: int | None = None,
    ) -> None:
        self.run = run.resolve()
        self.ports = dict(zip(SERVERS, ports, strict=True))
        self.binary = binary
        self.abacus = abacus
        self._on_start = on_start
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no business on loopback

    @property
    def addresses(self) -> list[str]:
        """The servers' HTTP addresses, each as host:port."""
        return [f"{HOST}:{ports.http}" for ports in self.ports.values()]

    def start(self, timeout: float = START_SECONDS) -> list[int]:
        """Start the servers that do not run and wait for a healthy cluster; return the numbers of those started.

        Raises LocalError when a port is taken, a server exits, or there is no leader in `timeout` seconds. Whatever was
        started is stopped again then.
        """
        missing = [n for n in SERVERS if not self.running(n)]
        self.check_ports(missing)
        try:
            for n in missing:
                self._spawn(n)
            self._until(timeout, self._whole, starting=missing)
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
            raise LocalError(f"{_name(n)} should be stopped before its data is removed, but it runs: stop it first")
        shutil.rmtree(self._data(n), ignore_errors=True)

    def wait_for_leader(self, timeout: float = START_SECONDS) -> int:
        """Wait until the cluster is as whole as it can be and return the leader's number.

        That is: every running server names the same leader, knows three peers, and is a healthy voter in autopilot's
        eyes. Having a leader is not enough: a server that rejoined is no voter at first, and stopping the next one
        could lose the quorum. Dead and frozen servers are left out.
        """
        return self._until(timeout, self._whole)

    def leader(self) -> int:
        """Return the leader's number as the running servers see it now; 0 without a leader they agree on."""
        votes = {self._get(n, "/v1/status/leader") for n in self._awake()}
        return next((n for n in self._awake() if votes == {self._rpc(n)}), 0)

    def get(self, path: str) -> Any:
        """Return what the first server to answer says to this path of the HTTP API; None if none answers."""
        return next((found for n in self._awake() if (found := self._get(n, path)) is not None), None)

    def running(self, n: int) -> bool:
        """Whether this server runs (frozen counts)."""
        return process.running(self.run, _name(n)) is not None

    def server(self, n: int) -> process.Process:
        """Return this server's process, running or not; raises LocalError if it was never started."""
        found = process.recorded(self.run, _name(n))
        if not found:
            raise LocalError(f"{_name(n)} should have been started before, but {self.run} has no record of it")
        return found

    def log(self, n: int) -> Path:
        """Return this server's log file."""
        return self.run / "logs" / f"{_name(n)}.log"

    def stop(self) -> list[int]:
        """Stop every server that runs and return their numbers; the data stays."""
        return self._stop(SERVERS, STOP_SECONDS)

    def check_ports(self, servers: Iterable[int] = SERVERS) -> None:
        """Raise LocalError, naming port, purpose and holder, if a port these servers need is taken."""
        for n in servers:
            for field, port in asdict(self.ports[n]).items():
                kinds = [socket.SOCK_STREAM, *([socket.SOCK_DGRAM] if field.startswith("serf") else [])]
                if not all(_bindable(port, kind) for kind in kinds):
                    raise LocalError(
                        f"port {port} ({PURPOSES[field]} of {_name(n)}) should be free, but {_holder(port)} has it: "
                        f"stop that, or set CONSUL_HTTP_PORT to a port with {SPAN + 1} free ones from it"
                    )

    def render(self, n: int) -> Path:
        """Write this server's configuration, with its own ports, into the run directory; return the folder."""
        config = json.loads((CONFIG / f"server-{n}" / "server.json").read_text())
        config["ports"] = asdict(self.ports[n])
        config["retry_join"] = [f"{HOST}:{ports.serf_lan}" for ports in self.ports.values()]
        target = _rendered(self.run, n)
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
        if self.abacus:
            command += ["-config-file", str(self.render_abacus(self.abacus))]
        started = process.start(_name(n), command, run=self.run)
        if self._on_start:
            self._on_start(started.pid)

    def _stop(self, servers: Iterable[int], grace: float) -> list[int]:
        stopping = {n: found for n in servers if (found := process.running(self.run, _name(n)))}
        process.stop_all(stopping.values(), grace)
        for n in stopping:
            process.forget(self.run, _name(n))
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
                        last = self.server(n).tail()
                        raise LocalError(f"{_name(n)} exited while starting; the last lines of {self.log(n)}:\n{last}")
                if time.monotonic() >= deadline:
                    raise LocalError(
                        f"expected Consul to be ready within {timeout:g} s, but {found}: see {self.run}/logs"
                    )
                progress(found)
                time.sleep(POLL_SECONDS)
        return found

    def _answering(self, n: int) -> int | str:
        # Without a leader the answer is an empty string, which is an answer.
        return f"{_name(n)} does not answer" if self._get(n, "/v1/status/leader") is None else n

    def _whole(self) -> int | str:
        awake = self._awake()
        leader = self.leader()
        if not leader:
            return f"the running servers ({', '.join(map(_name, awake)) or 'none'}) agree on no leader"
        health = self._get(leader, "/v1/operator/autopilot/health") or {}
        voters = {server["ID"] for server in health.get("Servers") or () if server["Healthy"] and server["Voter"]}
        _, goal = self._raft(leader)
        for n in awake:
            if len(self._get(n, "/v1/status/peers") or ()) != len(SERVERS):
                return f"{_name(n)} does not know {len(SERVERS)} peers"
            # Autopilot looks around every two seconds only. So compare the id, which is new for a server that has lost
            # its data, and see for ourselves whether one that has been away has caught up.
            node, applied = self._raft(n)
            if node not in voters:
                return f"{_name(n)} is not a healthy voter"
            if applied < goal:
                return f"{_name(n)} has not caught up"
        return leader

    def _raft(self, n: int) -> tuple[str, int]:
        """Return a server's node id and the index of the last Raft entry it has applied; -1 if it does not answer."""
        found = self._get(n, "/v1/agent/self")
        return (found["Config"]["NodeID"], int(found["Stats"]["raft"]["applied_index"])) if found else ("", -1)

    def _awake(self) -> list[int]:
        found = {n: process.running(self.run, _name(n)) for n in SERVERS}
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
        return self.run / "data" / _name(n)


def _rendered(run: Path, n: int) -> Path:
    return run / "consul" / f"server-{n}" / "server.json"


def _name(n: int) -> str:
    return f"consul-{n}"


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

"""What `make up` is to bring up, as its settings say; remembered beside what runs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from deploy.local import LocalError, process
from deploy.local.cluster import ABACUS, DEFAULT_PORT, SPAN, Cluster, agent_ports_from, ports_from
from deploy.local.sites import ConsulSite, MdnsSite

if TYPE_CHECKING:
    from deploy.local.sites import Site

DATACENTERS = 2
"""How many there can be."""


@dataclass(frozen=True)
class Topology:
    """The shape of the system. Each field is set by the environment variable that stands beside it."""

    port: int = DEFAULT_PORT
    """CONSUL_HTTP_PORT: see `ports_from`."""
    registry: str = "consul"
    """REGISTRY: consul; or mdns, with no Consul at all."""
    interface: str = "127.0.0.1"
    """MDNS_INTERFACE: the address of the network interface that mdns uses."""
    agents: str = ""
    """AGENTS: with `client`, each datacenter has a client agent, and services register through it."""
    datacenters: int = 1
    """DATACENTERS: each has three servers and services; what is lacking in one is called in the other."""

    @classmethod
    def wanted(cls) -> Self:
        """Return what the environment says. Raises LocalError for what cannot be."""
        port = os.environ.get("CONSUL_HTTP_PORT") or str(DEFAULT_PORT)
        if not port.isdecimal() or not 1 <= int(port) <= 65535 - SPAN:
            raise LocalError(f"CONSUL_HTTP_PORT should be a port between 1 and {65535 - SPAN}, but it is '{port}'")
        agents = os.environ.get("AGENTS", "")
        if agents not in ("", "client"):
            raise LocalError(f"AGENTS should be 'client' or unset, but it is '{agents}'")
        datacenters = os.environ.get("DATACENTERS") or "1"
        if datacenters not in map(str, range(1, DATACENTERS + 1)):
            raise LocalError(f"DATACENTERS should be 1 or {DATACENTERS}, but it is '{datacenters}'")
        registry = os.environ.get("REGISTRY") or "consul"
        if registry not in ("consul", "mdns"):
            raise LocalError(f"REGISTRY should be consul or mdns, but it is '{registry}'")
        if registry == "mdns" and (agents or datacenters != "1"):
            raise LocalError("REGISTRY should be consul where there are AGENTS or DATACENTERS, but it is mdns")
        return cls(int(port), registry, os.environ.get("MDNS_INTERFACE") or "127.0.0.1", agents, int(datacenters))

    @classmethod
    def known(cls, run: Path) -> Self | None:
        """Return what was started last under this directory; None if nothing was."""
        try:
            return cls(**json.loads(_file(run).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @classmethod
    def chosen(cls, run: Path) -> Self:
        """Return what is wanted, refusing it with LocalError where it does not fit what runs already."""
        wanted, known = cls.wanted(), cls.known(run)
        if known and wanted != known and any(each.running() for each in process.all_recorded(run)):
            settings = {
                "port": "CONSUL_HTTP_PORT",
                "registry": "REGISTRY",
                "interface": "MDNS_INTERFACE",
                "agents": "AGENTS",
                "datacenters": "DATACENTERS",
            }
            here, there = asdict(known), asdict(wanted)
            differing = [
                f"{setting} {here[name] or 'unset'}, not {there[name] or 'unset'}"
                for name, setting in settings.items()
                if here[name] != there[name]
            ]
            raise LocalError(f"what runs was started with {', '.join(differing)}: make down first, or set it so")
        return wanted

    def save(self, run: Path) -> None:
        """Remember it under this directory."""
        file = _file(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self)) + "\n")

    def sites(self, run: Path) -> list[Site]:
        """Return where services run: in each datacenter, or where there is no Consul, here."""
        if self.registry == "mdns":
            return [MdnsSite(run, self.port, self.interface)]
        return [ConsulSite(cluster) for cluster in self.clusters(run)]

    def clusters(self, run: Path, binary: Path = Path("consul")) -> list[Cluster]:
        """Return the clusters that it has, one per datacenter, started or not; none without Consul."""
        numbers = range(1, self.datacenters + 1) if self.registry == "consul" else ()
        return [
            Cluster(
                run,
                ports_from(self.port, number),
                binary,
                datacenter=number,
                agent=agent_ports_from(self.port, number) if self.agents else None,
                others={f"dc{other}": ports_from(self.port, other) for other in numbers if other != number},
                abacus=self.port + ABACUS if number == 1 else None,
            )
            for number in numbers
        ]


def _file(run: Path) -> Path:
    return run / "consul" / "topology.json"

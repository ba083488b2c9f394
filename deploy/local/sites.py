"""Where services run and find each other: beside a cluster of Consul's, or without any."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import rollcall
from deploy.local import LocalError
from deploy.local.cluster import DEFAULT_PORT, GATEWAY
from rollcall.registry.mdns import MdnsRegistry

if TYPE_CHECKING:
    from deploy.local.cluster import Cluster


@dataclass(frozen=True)
class Listed:
    """A registration, as the registry lists it."""

    id: str
    address: str
    port: int
    passing: bool


class Site(ABC):
    """What the services that run side by side have in common."""

    run: Path
    """The folder with their logs and data."""
    port: int
    """The port that all fixed ports follow from."""
    number: int = 1
    """Which of the datacenters it is."""
    abacus: int | None = None
    """The port of the service that is not ours, where there is one."""

    @property
    def gateway(self) -> int:
        """The port of the gateway's first instance."""
        return self.port + GATEWAY

    @property
    def title(self) -> str:
        """What to call it where there are others beside it."""
        return f"dc{self.number}"

    @abstractmethod
    def flags(self) -> list[str]:
        """Return what tells an instance where to register."""

    @abstractmethod
    def registry(self) -> rollcall.Registry:
        """Return the registry, as those who call from here ask it."""

    @abstractmethod
    def listed(self, name: str) -> list[Listed] | None:
        """Return what is registered of a service here; None when the registry does not answer."""


class ConsulSite(Site):
    """Beside a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.run, self.number, self.abacus = cluster.run, cluster.number, cluster.abacus
        self.port = cluster.ports[1].http

    def flags(self) -> list[str]:
        """See `Site.flags`."""
        failover = ["--consul-failover", ",".join(self.cluster.others)] if self.cluster.others else []
        return ["--consul", ",".join(self.cluster.entrance), *failover]

    def registry(self) -> rollcall.Registry:
        """See `Site.registry`."""
        return rollcall.ConsulRegistry(self.cluster.entrance, failover=list(self.cluster.others))

    def listed(self, name: str) -> list[Listed] | None:
        """See `Site.listed`. Only those servers are asked that can answer: none that is frozen."""
        found = self.cluster.get(f"/v1/health/service/{name}")
        if found is None:
            return None
        return [
            Listed(
                each["Service"]["ID"],
                each["Service"]["Address"],
                each["Service"]["Port"],
                all(check["Status"] == "passing" for check in each["Checks"]),
            )
            for each in found
        ]


class MdnsSite(Site):
    """On a network interface, with multicast DNS for a registry."""

    def __init__(self, run: Path, port: int, interface: str) -> None:
        self.run, self.port = run.resolve(), port
        self._interface = interface

    def flags(self) -> list[str]:
        """See `Site.flags`."""
        host = [] if self._interface.startswith("127.") else ["--host", "0.0.0.0"]  # noqa: S104 (as it was asked for)
        mdns = ["--mdns-interface", self._interface, "--mdns-group", self._group]
        return ["--registry", "mdns", *mdns, *host]

    def registry(self) -> rollcall.Registry:
        """See `Site.registry`."""
        return self._registry

    def listed(self, name: str) -> list[Listed] | None:
        """See `Site.listed`."""
        try:
            found = self._registry.instances(name, failing=True)
        except rollcall.RegistryError as error:
            raise LocalError(str(error)) from error
        return [Listed(each.id, each.address, each.port, each.passing) for each in found]

    @property
    def _group(self) -> str:
        return "rollcall" if self.port == DEFAULT_PORT else f"rollcall-{self.port}"  # the default needs no setting

    @cached_property
    def _registry(self) -> MdnsRegistry:
        return MdnsRegistry(self._interface, self._group)

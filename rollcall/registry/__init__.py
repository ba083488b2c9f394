"""What a registry is: where instances sign up under a service's name, and where callers look them up.

`Registry` is the whole of it. `rollcall.registry.consul` is the one to deploy, `rollcall.registry.kubernetes` that of
clusters without Consul, `rollcall.registry.mdns` that of one laptop or LAN; `rollcall.registry.memory` serves tests.
All methods block, and are safe to call from any thread.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self, TypeAlias, TypeVar, runtime_checkable

T_co = TypeVar("T_co", covariant=True)


class RegistryError(Exception):
    """The registry has answered, and the answer is no. The message says what to do."""


class RegistryUnavailableError(RegistryError):
    """No server of the registry could be asked. Worth trying again."""


class DuplicateInstanceError(RegistryError):
    """Another instance that is alive is registered under the same id."""

    @classmethod
    def of(cls, instance_id: str, name: str, target: str) -> Self:
        """Return the error that says who the id belongs to."""
        return cls(
            f"instance id {instance_id!r} belongs to an instance of {name!r} at {target}, which is alive: "
            f"give each instance an id of its own"
        )


def target(address: str, port: int) -> str:
    """Return HOST:PORT, with an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass(frozen=True)
class Instance:
    """One running copy of a service, as the registry knows it."""

    id: str
    """Unique among all instances of all services."""
    name: str
    """The service that this is an instance of. Spaces and upper case are fine."""
    address: str
    """An IP address, or a host name that callers can resolve."""
    port: int
    version: str = ""
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)
    weight: int = 1
    datacenter: str = ""
    priority: int = 0
    """The registry's to say: those with a higher number are called only while none with a lower one can be."""
    passing: bool = True
    """Whether it passed its checks when looked up. In a registration, only a registry without checks reads this."""

    def __post_init__(self) -> None:
        for name in ("id", "name", "address"):
            if not getattr(self, name):
                raise ValueError(f"an instance's {name} must not be empty: {self}")
        if not 0 < self.port < 65536:  # noqa: PLR2004
            raise ValueError(f"an instance's port must be from 1 to 65535: {self}")
        if not 0 < self.weight < 65536:  # noqa: PLR2004
            raise ValueError(f"an instance's weight must be from 1 to 65535: {self}")

    @property
    def target(self) -> str:
        """HOST:PORT, with an IPv6 address in brackets."""
        return target(self.address, self.port)


@dataclass(frozen=True)
class GrpcCheck:
    """The registry calls grpc.health.v1 at the instance. Times are in seconds."""

    service: str = ""
    """The name to ask the health service for, such as `sum.v1.SumService`; empty asks for the whole server."""
    interval: float = 1.0
    timeout: float = 1.0


@dataclass(frozen=True)
class TcpCheck:
    """The registry opens a connection to the instance. Times are in seconds."""

    interval: float = 1.0
    timeout: float = 1.0


@dataclass(frozen=True)
class HttpCheck:
    """The registry gets a URL; any 2xx passes. Times are in seconds."""

    url: str = ""
    """Empty in the check of a service: the instance's own /livez, which is filled in when it registers."""
    interval: float = 1.0
    timeout: float = 1.0


@dataclass(frozen=True)
class TtlCheck:
    """The instance reports that it is well; it counts as failed when it has not done so for `ttl` seconds."""

    ttl: float = 5.0


Check: TypeAlias = GrpcCheck | TcpCheck | HttpCheck | TtlCheck


class Watch(Protocol[T_co]):
    """What a registry answers to one question, each time the answer changes."""

    def __iter__(self) -> Iterator[T_co]:
        """Yield what is there now, then each change, until closed. Rides out a registry that is away."""

    def close(self) -> None:
        """End the iteration, now or when the query under way returns. Harmless when repeated."""


class Registry(Protocol):
    """Where instances sign up and are looked up."""

    def register(self, instance: Instance, check: Check, *, passing: bool = False) -> None:
        """Sign the instance up, with the check that decides whether it passes.

        Until the first check has run it does not pass; with `passing` it does, for a caller who knows that it serves.
        Registering the same instance again renews it. Raises `DuplicateInstanceError` when its id belongs to an
        instance at another address that passes its check, `RegistryUnavailableError` when no server could be reached,
        and `RegistryError` when the registration was refused.
        """

    def confirm(self, instance: Instance) -> bool:
        """Wait about a second, or until something happens to the registration; say whether it still stands.

        To be called again and again while the registration is wanted: this is also what keeps a TTL check passing.
        Raises `RegistryUnavailableError` when the server that holds it has gone, and `DuplicateInstanceError` when
        somebody else has registered under the same id.
        """

    def deregister(self, instance_id: str) -> None:
        """Remove the registration from wherever it may be. Harmless when it has gone already.

        Raises `RegistryUnavailableError` when no server could be asked.
        """

    def instances(
        self, name: str, tag: str = "", *, failing: bool = False, certain: bool = False
    ) -> tuple[Instance, ...]:
        """Return the instances of a service that pass their checks now, by id; with a tag, those that have it.

        With `failing` also those that do not pass, which say so in `passing`. With `certain` what the registry as a
        whole holds true, not one of its servers that may be behind: raises `RegistryUnavailableError` where nobody can
        say that, as in a cluster without a leader.
        """

    def services(self) -> tuple[str, ...]:
        """Return the names of the services that have a registration, passing or not, in alphabetical order."""

    def diagnose(self) -> tuple[str, ...]:
        """Return what is wrong with the registry itself, a sentence for each thing; nothing when it is well.

        Takes a few seconds when servers do not answer, and raises nothing.
        """

    def watch(self, name: str, tag: str = "", *, failing: bool = False) -> Watch[tuple[Instance, ...]]:
        """Follow what `instances` returns."""

    def watch_services(self, tag: str = "") -> Watch[tuple[str, ...]]:
        """Follow what `services` returns; with a tag, the names of those that have a registration with it."""

    def __str__(self) -> str:
        """Say in a few words which registry this is, for error messages: `Consul at 127.0.0.1:8500`."""


@runtime_checkable
class Keys(Protocol):
    """What some registries are besides: texts under keys, which look like paths."""

    def keys(self, prefix: str) -> dict[str, str]:
        """Return what is under the keys that begin like this. Raises `RegistryError`."""

    def watch_keys(self, prefix: str) -> Watch[dict[str, str]]:
        """Follow what `keys` returns."""

    def put(self, key: str, text: str) -> None:
        """Put a text under a key, in the place of another. Raises `RegistryError`."""

    def delete(self, key: str) -> None:
        """Remove a key. Harmless when it is not there. Raises `RegistryError`."""

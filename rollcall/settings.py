"""Settings: by flag, else by environment, else by default; a bad one is refused by name before anything starts."""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, NoDecode, SettingsConfigDict, SettingsError

from rollcall.registry import Registry
from rollcall.registry.consul import ConsulRegistry
from rollcall.registry.kubernetes import KubernetesRegistry, own_api

S = TypeVar("S", bound=BaseSettings)

PREFIX = "ROLLCALL_"

MULTICAST = ("224.0.0.251", 5353)
"""Where multicast DNS is spoken (RFC 6762)."""
META_KEYS = 32  # Consul takes 64 of one registration, and some of those are ours
META_VALUE = 512  # bytes; Consul refuses a registration with a longer one
OUR_META = ("calls", "http_port", "protocol", "version")
"""What every instance registers by itself."""


class BadSettingError(ValueError):
    """A setting has a value that it cannot have. The message names the setting, the value, and what was expected."""


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _meta(pairs: tuple[str, ...]) -> tuple[str, ...]:
    keys = [pair.partition("=")[0] for pair in pairs]
    for pair, key in zip(pairs, keys, strict=True):
        if not re.fullmatch(r"(?!consul-)[A-Za-z0-9_-]{1,128}=\S.*", pair) or len(pair) - len(key) - 1 > META_VALUE:
            raise ValueError(
                "expected KEY=VALUE by commas, keys of letters, digits, - and _ that do not begin with consul-, "
                f"values of 1 to {META_VALUE} characters"
            )
        if key in OUR_META:
            raise ValueError(f"expected keys other than those that an instance sets itself: {', '.join(OUR_META)}")
    if len(set(keys)) < len(keys) or len(keys) > META_KEYS:
        raise ValueError(f"expected each key once, and {META_KEYS} at most")
    return pairs


@dataclass(frozen=True)
class _Live:
    """Marks a setting that may change while an instance runs."""


LIVE = _Live()
"""To be put into the annotation of a setting: it can be changed by a key in the registry, see `rollcall.live`.

Whoever uses such a setting reads it from the settings each time: `settings.max_calls`, not a copy of it. What it can
be, its annotation says: `Annotated[int, Field(ge=1), LIVE]`. Validators of the class are not asked."""

Strings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class RegistrySettings(BaseSettings):
    """Which registry there is, where it is, and how to be let in."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    registry: Literal["consul", "kubernetes", "mdns"] = Field(
        "consul",
        description="where instances register and are found: consul; kubernetes, by its EndpointSlices; or mdns, by "
        "multicast, without a server",
    )
    kubernetes_api: str = Field(
        "", description="with kubernetes, the URL of its API; default: that of the pod's cluster"
    )
    kubernetes_namespace: str = Field(
        "", description="with kubernetes, the namespace to look in; default: the pod's own"
    )
    mdns_interface: str = Field(
        "127.0.0.1", min_length=1, description="with mdns, the address of the network interface to use; or all"
    )
    mdns_group: str = Field(
        "rollcall", min_length=1, max_length=100, description="with mdns, whose instances find each other on a network"
    )
    consul: Strings = Field(
        ("127.0.0.1:8500",), min_length=1, description="Consul servers as HOST:PORT or http(s)://HOST:PORT, by commas"
    )
    consul_failover: Strings = Field(
        (),
        description="other datacenters, by commas: where no instance of a service can be called in Consul's own, those "
        "there are, in this order",
    )
    consul_token_file: str = Field(
        "",
        description="file that holds the ACL token, read at every request; or put the token itself into "
        f"{PREFIX}CONSUL_TOKEN (there is no flag for it: everybody on the machine can read a command line)",
    )
    consul_ca: str = Field(
        "", description="PEM file of the authority that signed the servers' certificates; turns on https"
    )
    consul_cert: str = Field("", description="PEM file of the client certificate")
    consul_key: str = Field("", description="PEM file of the client certificate's key")

    def open_registry(self) -> Registry:
        """Return the registry that these settings describe, the same one each time. Raises `BadSettingError`."""
        return self._registry

    @cached_property
    def _registry(self) -> Registry:
        return {"consul": self._consul, "kubernetes": self._kubernetes, "mdns": self._mdns}[self.registry]()

    def _consul(self) -> Registry:
        try:
            return ConsulRegistry(
                self.consul,
                failover=self.consul_failover,
                token=os.environ.get(f"{PREFIX}CONSUL_TOKEN", ""),
                token_file=self.consul_token_file,
                ca=self.consul_ca,
                cert=self.consul_cert,
                key=self.consul_key,
            )
        except ValueError as error:
            raise BadSettingError(f"{PREFIX}CONSUL: {error}") from None

    def _kubernetes(self) -> Registry:
        if self.kubernetes_api and not self.kubernetes_namespace:
            raise BadSettingError(f"{PREFIX}KUBERNETES_NAMESPACE: expected the namespace to look in, found none")
        try:
            return KubernetesRegistry(self.kubernetes_api, self.kubernetes_namespace)
        except ValueError as error:
            raise BadSettingError(f"{PREFIX}KUBERNETES_API: {error}") from None

    def _mdns(self) -> Registry:
        try:
            from rollcall.registry.mdns import MdnsRegistry  # noqa: PLC0415 (who has Consul does without zeroconf)
        except ModuleNotFoundError as error:
            raise BadSettingError(
                f"{PREFIX}REGISTRY: mdns needs {error.name}: pip install 'rollcall-chassis[mdns]'"
            ) from None
        return MdnsRegistry(self.mdns_interface, self.mdns_group)


class CallSettings(BaseSettings):
    """How a caller treats the services it dials."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    deadline: Annotated[float, Field(gt=0, le=86_400), LIVE] = Field(
        5.0, description="seconds for a call with one answer that was given no timeout of its own"
    )
    retries: Annotated[int, Field(ge=0, le=4), LIVE] = Field(
        3,
        description="how often a call of an idempotent method that found its server unavailable, or stopping, is tried "
        "again",
    )
    subset: Annotated[int, Field(ge=1, le=10_000)] = Field(64, description="most instances of a service to connect to")
    max_requests: Annotated[int, Field(ge=1, le=2**32 - 1), LIVE] = Field(
        1024, description="most calls in flight to one service; more are refused at once (circuit breaker)"
    )
    failure_percent: Annotated[int, Field(ge=0, le=100), LIVE] = Field(
        85, description="an instance is ejected when more than this share of its calls fail in a second; 0: never"
    )
    ejection: Annotated[float, Field(ge=1, le=3600), LIVE] = Field(
        8.0, description="longest time in seconds that an instance is ejected before it is tried again"
    )
    ejection_percent: Annotated[int, Field(ge=0, le=100), LIVE] = Field(
        30, description="no further instance is ejected once this share of them is"
    )
    empty_grace: Annotated[Seconds, LIVE] = Field(
        15.0,
        description="seconds, in which the registry is certain of it, for which a service that loses all its instances "
        "at once keeps those it had",
    )


class ServiceSettings(RegistrySettings):
    """The settings of one instance."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    id: str = Field("", description="the instance's id, unique among all; default: SERVICE-HOSTNAME-PORT")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 in a container")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="port to listen on; 0: any that is free")
    advertise: str = Field(
        "", description="address that others reach this instance at; default: --host, or the one towards the registry"
    )
    http_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="port for /metrics, /livez and /readyz; 0: any that is free"
    )
    tags: Strings = Field((), description="tags to register with, by commas")
    meta: Annotated[Strings, AfterValidator(_meta)] = Field(
        (), description="more to register, as KEY=VALUE by commas: node=worker-1, say"
    )
    version: str = Field("", description="version to register with and to report in build_info")
    weight: Annotated[int, Field(ge=1, le=65535)] = Field(1, description="weight to register with")
    check: Literal["", "grpc", "tcp", "http", "ttl"] = Field(
        "", description="how Consul finds out whether this instance is well; default: the service's own way"
    )
    check_interval: Annotated[float, Field(gt=0, le=3600)] | None = Field(
        None,
        description="seconds between two checks, 1 unless the service has its own; with ttl, a third of the time "
        "the instance has to report in",
    )
    check_timeout: Annotated[float, Field(gt=0, le=3600)] | None = Field(
        None, description="seconds a check may take, 1 unless the service has its own"
    )
    drain: Annotated[Seconds, LIVE] = Field(
        2.0,
        description="seconds between deregistering and refusing calls: time for callers to hear of it; more, up to "
        "half the grace, while gRPC calls go on coming",
    )
    grace: Annotated[Seconds, LIVE] = Field(
        20.0, description="seconds that calls in flight get to finish, less what the drain took of it"
    )
    log_format: Literal["text", "json"] = Field("text", description="how log lines look")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], LIVE] = Field(
        "info", description="the least that is logged"
    )

    def extra_meta(self) -> dict[str, str]:
        """Return what `meta` says, by key."""
        return dict(pair.split("=", 1) for pair in self.meta)

    def advertised(self) -> str:
        """Return the address to register: the given one, or the one listened on, or this machine's own."""
        if self.advertise:
            return self.advertise
        if self.host not in ("0.0.0.0", "::"):  # noqa: S104 (compared with, not bound)
            return self.host
        try:
            # The host's name would often stand for a loopback address. UDP's connect sends nothing.
            (family, kind, _, _, there), *_ = socket.getaddrinfo(*self._towards(), type=socket.SOCK_DGRAM)
            with socket.socket(family, kind) as probe:
                probe.connect(there)
                return str(probe.getsockname()[0])
        except OSError as error:
            raise BadSettingError(
                f"--advertise ({PREFIX}ADVERTISE): this machine's own address cannot be found ({error}): give one"
            ) from None

    def _towards(self) -> tuple[str | None, int | None]:
        """Return a host and port that lie in the direction of those who call."""
        if self.registry == "mdns":
            return MULTICAST if self.mdns_interface == "all" else (self.mdns_interface, MULTICAST[1])
        first = self.consul[0] if self.registry == "consul" else self.kubernetes_api or own_api()
        server = urlsplit(first if "://" in first else f"//{first}")
        return server.hostname, server.port or 443


def load(
    kind: type[S], argv: Sequence[str] | None = None, program: str = "", overrides: Mapping[str, Any] | None = None
) -> S:
    """Read settings of a kind: `overrides`, then flags (where `argv` is given), then the environment, then defaults.

    Raises `BadSettingError`; `--help` prints help and exits.
    """
    try:
        if argv is None:
            return kind(**(overrides or {}))
        source = CliSettingsSource[Any](
            kind, cli_parse_args=list(argv), cli_prog_name=program or None, cli_exit_on_error=False
        )
        return kind(_cli_settings_source=source, **(overrides or {}))
    except ValidationError as error:
        flags = argv is not None
        raise BadSettingError("; ".join(_complaint(each, flags=flags) for each in error.errors())) from None
    except SettingsError as error:
        raise BadSettingError(f"{error}; --help lists the settings") from None


def live(kind: type[BaseSettings]) -> list[str]:
    """Return the names of the fields of a kind of settings that are marked as `LIVE`."""
    return [name for name, field in kind.model_fields.items() if LIVE in field.metadata]


def parse(kind: type[BaseSettings], name: str, text: str) -> Any:
    """Return the value of one field that a text stands for. Raises ValueError with what was expected."""
    field = kind.model_fields[name]
    annotation: Any = Annotated[field.annotation, *field.metadata]
    try:
        return TypeAdapter(annotation).validate_python(text)
    except ValidationError as error:
        raise ValueError("; ".join(each["msg"] for each in error.errors())) from None


def source(settings: BaseSettings, name: str) -> str:
    """Say where the value of a field comes from: `default`, `environment` or `flag`."""
    if name not in settings.model_fields_set:
        return "default"
    given = os.environ.get(f"{PREFIX}{name.upper()}")
    try:
        stands = given is not None and parse(type(settings), name, given) == getattr(settings, name)
    except ValueError:
        stands = False
    return "environment" if stands else "flag"


def _complaint(error: Any, *, flags: bool) -> str:
    name = ".".join(str(part) for part in error["loc"])
    shown = f"--{name.replace('_', '-')}" if flags else name
    problem = error["msg"].removeprefix("Value error, ")
    return f"setting {shown} ({PREFIX}{name.upper()}): {problem}; found {error['input']!r}"

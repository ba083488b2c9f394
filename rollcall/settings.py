"""Settings: by flag, else by environment, else by default; a bad one is refused by name before anything starts."""

import os
import socket
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, NoDecode, SettingsConfigDict, SettingsError

from rollcall.registry import Registry
from rollcall.registry.consul import ConsulRegistry

S = TypeVar("S", bound=BaseSettings)

PREFIX = "ROLLCALL_"


class BadSettingError(ValueError):
    """A setting has a value that it cannot have. The message names the setting, the value, and what was expected."""


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Strings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class ConsulSettings(BaseSettings):
    """Where Consul is, and how to be let in."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    consul: Strings = Field(
        ("127.0.0.1:8500",), min_length=1, description="Consul servers as HOST:PORT or http(s)://HOST:PORT, by commas"
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

    def registry(self) -> Registry:
        """Return the registry that these settings describe, the same one each time."""
        return self._registry

    @cached_property
    def _registry(self) -> Registry:
        try:
            return ConsulRegistry(
                self.consul,
                token=os.environ.get(f"{PREFIX}CONSUL_TOKEN", ""),
                token_file=self.consul_token_file,
                ca=self.consul_ca,
                cert=self.consul_cert,
                key=self.consul_key,
            )
        except ValueError as error:
            raise BadSettingError(f"{PREFIX}CONSUL: {error}") from None


class CallSettings(BaseSettings):
    """How a caller treats the services it dials."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    deadline: Annotated[float, Field(gt=0, le=86_400)] = Field(
        5.0, description="seconds for a call with one answer that was given no timeout of its own"
    )
    retries: Annotated[int, Field(ge=0, le=4)] = Field(
        3, description="how often a call of an idempotent method that found its server unavailable is tried again"
    )
    subset: Annotated[int, Field(ge=1, le=10_000)] = Field(64, description="most instances of a service to connect to")
    max_requests: Annotated[int, Field(ge=1)] = Field(
        1024, description="most calls in flight to one service; more are refused at once (circuit breaker)"
    )
    failure_percent: Annotated[int, Field(ge=0, le=100)] = Field(
        85, description="an instance is ejected when more than this share of its calls fail in a second; 0: never"
    )
    ejection: Annotated[float, Field(ge=1, le=3600)] = Field(
        8.0, description="longest time in seconds that an instance is ejected before it is tried again"
    )
    ejection_percent: Annotated[int, Field(ge=0, le=100)] = Field(
        30, description="no further instance is ejected once this share of them is"
    )
    empty_grace: Seconds = Field(
        15.0, description="seconds for which a service that loses all its instances at once keeps those it had"
    )


class ServiceSettings(ConsulSettings):
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
        "", description="address that others reach this instance at; default: --host, or the one towards Consul"
    )
    http_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="port for /metrics, /livez and /readyz; 0: any that is free"
    )
    tags: Strings = Field((), description="tags to register with, by commas")
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
    drain: Seconds = Field(
        2.0, description="seconds between deregistering and refusing calls: time for callers to hear of it"
    )
    grace: Seconds = Field(20.0, description="seconds that calls in flight get to finish")
    log_format: Literal["text", "json"] = Field("text", description="how log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least that is logged")

    def advertised(self) -> str:
        """Return the address to register: the given one, or the one listened on, or this machine's own."""
        if self.advertise:
            return self.advertise
        if self.host not in ("0.0.0.0", "::"):  # noqa: S104 (compared with, not bound)
            return self.host
        server = urlsplit(self.consul[0] if "://" in self.consul[0] else f"//{self.consul[0]}")
        try:
            # The host's name would often stand for a loopback address. UDP's connect sends nothing.
            (family, kind, _, _, there), *_ = socket.getaddrinfo(server.hostname, server.port, type=socket.SOCK_DGRAM)
            with socket.socket(family, kind) as probe:
                probe.connect(there)
                return str(probe.getsockname()[0])
        except OSError as error:
            raise BadSettingError(
                f"--advertise ({PREFIX}ADVERTISE): this machine's own address cannot be found ({error}): give one"
            ) from None


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


def _complaint(error: Any, *, flags: bool) -> str:
    name = ".".join(str(part) for part in error["loc"])
    shown = f"--{name.replace('_', '-')}" if flags else name
    problem = error["msg"].removeprefix("Value error, ")
    return f"setting {shown} ({PREFIX}{name.upper()}): {problem}; found {error['input']!r}"

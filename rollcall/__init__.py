"""Rollcall: the chassis of a gRPC service that registers with Consul, is found through it, and is called directly."""

from rollcall.channel import Channel, SyncChannel, default_registry, dial, dial_sync
from rollcall.errors import refuse
from rollcall.registry import (
    Check,
    DuplicateInstanceError,
    GrpcCheck,
    HttpCheck,
    Instance,
    Registry,
    RegistryError,
    RegistryUnavailableError,
    TcpCheck,
    TtlCheck,
    Watch,
)
from rollcall.registry.consul import ConsulRegistry
from rollcall.registry.memory import MemoryRegistry
from rollcall.service import Service
from rollcall.settings import LIVE, BadSettingError, CallSettings, ServiceSettings

__all__ = [
    "LIVE",
    "BadSettingError",
    "CallSettings",
    "Channel",
    "Check",
    "ConsulRegistry",
    "DuplicateInstanceError",
    "GrpcCheck",
    "HttpCheck",
    "Instance",
    "MemoryRegistry",
    "Registry",
    "RegistryError",
    "RegistryUnavailableError",
    "Service",
    "ServiceSettings",
    "SyncChannel",
    "TcpCheck",
    "TtlCheck",
    "Watch",
    "default_registry",
    "dial",
    "dial_sync",
    "refuse",
]

"""The registry that is nobody's: instances tell each other of themselves, by multicast DNS (RFC 6762, RFC 6763).

For one laptop, or one LAN that lets multicasts through; there is no server to run, or to lose. What that costs:

- There is nobody to check an instance. It announces itself each second, and counts as gone when it has not for `TTL`
  seconds, or at once when it says goodbye. So an instance passes as long as its process runs: one whose network is
  parted, or that answers no call, is found out by its callers alone. Only a TTL check means what it says elsewhere: an
  instance that does not confirm its registration in that time is not announced any more.
- Nothing is certain: each process knows what it has heard, and for its first `SETTLE` seconds it listens before it says
  anything. Of two instances with one id, the one that was registered later gives way as soon as it hears of the other.
- A registration is at most `MOST` bytes as JSON, for it travels in one packet.
- Whoever can send on the network can register, and remove, what they like.
- It keeps no keys, and there are no datacenters.

The library is zeroconf. Every instance is one DNS-SD service of the type `_rollcall._tcp`, whose TXT record has all
that is known of it, so that any DNS-SD browser lists them.
"""

import ipaddress
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, TypeVar

from zeroconf import (
    InterfaceChoice,
    IPVersion,
    RecordUpdate,
    RecordUpdateListener,
    ServiceBrowser,
    ServiceInfo,
    Zeroconf,
)

from rollcall.registry import (
    Check,
    DuplicateInstanceError,
    Instance,
    RegistryError,
    RegistryUnavailableError,
    TtlCheck,
)
from rollcall.registry.memory import MemoryWatch

T = TypeVar("T")
log = logging.getLogger(__name__)

TYPE = "_rollcall._tcp.local."
TXT = 16
"""The type of the records that have what is known of an instance (RFC 1035)."""
TTL = 5  # seconds for which an announcement holds
ANNOUNCE = 1.0  # seconds between two announcements of an instance
SETTLE = 1.25  # seconds after which everybody who is there has been heard
CONFIRM_WAIT = 1.0  # seconds
GOODBYES = 3  # how often a goodbye is said: a packet may be lost
MOST = 4000  # bytes of a registration; a packet takes 8,966 of zeroconf's
CHUNK = 250  # bytes of it in one string of the TXT record, which takes 255 with its key
HEARD = 10_000  # most instances that are remembered

KINDS = {"id": str, "name": str, "address": str, "version": str, "port": int, "weight": int, "passing": bool}
"""What the fields of an instance are, that somebody has announced."""

EVERYWHERE = "all"
"""The interface that stands for all there are."""


@dataclass
class _Heard:
    """An instance that somebody has announced."""

    instance: Instance
    since: int
    """When it was registered, in nanoseconds since 1970 by its own clock."""
    until: float
    """How long that holds, by `time.monotonic`."""


@dataclass
class _Own:
    """An instance that was registered here, and is announced from here."""

    instance: Instance
    info: ServiceInfo
    since: int
    ttl: float
    """The seconds it may go unconfirmed; infinite where nothing says so."""
    confirmed: float
    announced: bool = True
    rival: str = ""
    """Where another instance with its id is, that was there first."""

    def well(self, now: float) -> bool:
        """Say whether it is to be announced, at a time by `time.monotonic`."""
        return not self.rival and now - self.confirmed <= self.ttl


class MdnsRegistry:
    """A `Registry` by multicast DNS on one network interface, given by its address, or on all of them.

    Those of the same `group` find each other. Raises `RegistryUnavailableError`, from its methods, for an interface
    that is not there.
    """

    def __init__(self, interface: str = "127.0.0.1", group: str = "rollcall") -> None:
        self._interface, self._group = interface, group
        self._heard: dict[str, _Heard] = {}
        self._own: dict[str, _Own] = {}
        self._removed: dict[str, _Own] = {}  # by others; zeroconf still knows of them
        self._changed = threading.Condition()
        self._opening = threading.Lock()
        self._network: Zeroconf | None = None
        self._settled = 0.0

    def __str__(self) -> str:
        return f"mDNS on {'all interfaces' if self._interface == EVERYWHERE else self._interface}, group {self._group}"

    def register(self, instance: Instance, check: Check, *, passing: bool = False) -> None:  # noqa: ARG002 (nobody checks)
        network = self._settle()
        since = time.time_ns()
        info = self._info(instance, since)
        with self._changed:
            holder = self._alive(instance.id)
            if holder and holder.instance.passing and holder.instance.target != instance.target:
                raise DuplicateInstanceError.of(instance.id, holder.instance.name, holder.instance.target)
            known = self._own.get(instance.id) or self._removed.pop(instance.id, None)
            ttl = check.ttl if isinstance(check, TtlCheck) else float("inf")
            self._own[instance.id] = _Own(instance, info, since, ttl, time.monotonic())
            self._heard[instance.id] = _Heard(instance, since, float("inf"))
            self._changed.notify_all()
        if known:
            network.update_service(info)
        else:
            network.register_service(info, ttl=TTL, cooperating_responders=True)

    def confirm(self, instance: Instance) -> bool:
        def happened() -> bool:
            own = self._own.get(instance.id)
            return own is None or bool(own.rival)

        with self._changed:
            own = self._own.get(instance.id)
            wait = CONFIRM_WAIT if own is None else min(CONFIRM_WAIT, own.ttl / 3)
            self._changed.wait_for(happened, timeout=wait)
            own = self._own.get(instance.id)
            if own is None:
                return False
            if own.rival:
                raise DuplicateInstanceError(
                    f"instance id {instance.id!r} belongs to one at {own.rival}, which was first"
                )
            own.confirmed = time.monotonic()
        return True

    def deregister(self, instance_id: str) -> None:
        network = self._settle()
        with self._changed:
            own, heard = self._own.pop(instance_id, None), self._heard.pop(instance_id, None)
            self._changed.notify_all()
        if own:
            network.unregister_service(own.info)
        elif heard:  # another's: its owner hears the goodbye as well
            goodbye = network.generate_service_broadcast(self._info(heard.instance, heard.since), 0)
            for _ in range(GOODBYES):
                network.send(goodbye)

    def instances(
        self,
        name: str,
        tag: str = "",
        *,
        failing: bool = False,
        certain: bool = False,  # noqa: ARG002 (it never is)
    ) -> tuple[Instance, ...]:
        self._settle()
        return self._listed(name, tag, failing=failing)

    def services(self) -> tuple[str, ...]:
        self._settle()
        return self._names("")

    def diagnose(self) -> tuple[str, ...]:
        try:
            self._settle()
        except RegistryError as error:
            return (str(error),)
        return ()

    def watch(self, name: str, tag: str = "", *, failing: bool = False) -> "_Watch[tuple[Instance, ...]]":
        return _Watch(self._changed, lambda: self._listed(name, tag, failing=failing), self._settle)

    def watch_services(self, tag: str = "") -> "_Watch[tuple[str, ...]]":
        return _Watch(self._changed, lambda: self._names(tag), self._settle)

    def close(self) -> None:
        """Say goodbye for all that was registered here, and leave the network."""
        with self._opening:
            network, self._network = self._network, None
        with self._changed:
            self._own.clear()
            self._heard.clear()
            self._changed.notify_all()
        if network:
            network.close()  # which says goodbye

    def _listed(self, name: str, tag: str, *, failing: bool) -> tuple[Instance, ...]:
        found = [each for each in self._all(tag) if each.name == name and (failing or each.passing)]
        return tuple(sorted(found, key=lambda each: each.id))

    def _names(self, tag: str) -> tuple[str, ...]:
        return tuple(sorted({each.name for each in self._all(tag)}))

    def _all(self, tag: str) -> list[Instance]:
        with self._changed:
            alive = [heard.instance for id_ in self._heard if (heard := self._alive(id_))]
        return [each for each in alive if not tag or tag in each.tags]

    def _alive(self, instance_id: str) -> _Heard | None:
        heard = self._heard.get(instance_id)
        return heard if heard and heard.until > time.monotonic() else None

    # On the network.

    def _settle(self) -> Zeroconf:
        """Open the network at the first use, and wait until all who are there have been heard."""
        with self._opening:
            if self._network is None:
                self._network = self._open()
                self._settled = time.monotonic() + SETTLE
                threading.Thread(target=self._announce, args=(self._network,), name="mdns", daemon=True).start()
            network = self._network
        time.sleep(max(0.0, self._settled - time.monotonic()))  # there is nobody who could say that all have answered
        return network

    def _open(self) -> Zeroconf:
        interfaces: Any = InterfaceChoice.All if self._interface == EVERYWHERE else [self._interface]
        try:
            if interfaces == [self._interface]:
                ipaddress.IPv4Address(self._interface)  # IPv6 is not spoken here
            network = Zeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)
        except (OSError, ValueError, RuntimeError) as error:
            raise RegistryUnavailableError(
                f"{self}: {error}: expected the address of a network interface of this machine that takes multicasts, "
                f"or {EVERYWHERE}"
            ) from None
        network.add_listener(_Listener(self._hear), None)
        ServiceBrowser(network, TYPE, handlers=[lambda **_: None])  # asks who is there; the listener hears the answers
        return network

    def _announce(self, network: Zeroconf) -> None:
        """Say each second who is here, and forget who has not been heard for long."""
        while network is self._network:
            time.sleep(ANNOUNCE)
            for own, well in self._present():
                try:
                    if well and own.announced:
                        network.send(network.generate_service_broadcast(own.info, TTL))
                    elif well:
                        network.register_service(own.info, ttl=TTL, cooperating_responders=True)
                    elif own.announced:
                        network.unregister_service(own.info)
                    own.announced = well
                except Exception:  # whatever it is, an instance that fell silent here would be found no more
                    log.exception("%s could not be announced", own.info.name)

    def _present(self) -> list[tuple[_Own, bool]]:
        """Bring what has been heard up to the present; return who was registered here, and whether they are well."""
        now = time.monotonic()
        with self._changed:
            before = set(self._heard)
            well = {id_: own for id_, own in self._own.items() if own.well(now)}
            lapsed = {id_ for id_, own in self._own.items() if id_ not in well and not own.rival}
            self._heard = {
                **{id_: heard for id_, heard in self._heard.items() if heard.until > now and id_ not in lapsed},
                **{id_: _Heard(own.instance, own.since, float("inf")) for id_, own in well.items()},
            }
            if set(self._heard) != before:
                self._changed.notify_all()
            removed = [(own, False) for own in self._removed.values()]
            self._removed.clear()
            return [*((own, id_ in well) for id_, own in self._own.items()), *removed]

    def _hear(self, text: bytes, *, leaving: bool) -> None:
        """Take over what somebody has announced."""
        said = _parsed(text)
        if said is None or said[0] != self._group:
            return
        _, instance, since = said
        with self._changed:
            own = self._own.get(instance.id)
            if leaving:
                if own and since == own.since and own.well(time.monotonic()):  # somebody else has removed it
                    self._removed[instance.id] = self._own.pop(instance.id)
                heard = self._heard.get(instance.id)
                if instance.id not in self._own and heard and heard.since == since:
                    del self._heard[instance.id]
            elif own and since != own.since:  # one that was registered later gives way
                if (since, instance.target) < (own.since, own.instance.target):
                    own.rival = instance.target
                    self._heard[instance.id] = _Heard(instance, since, time.monotonic() + TTL)
            elif not own and (len(self._heard) < HEARD or instance.id in self._heard):
                self._heard[instance.id] = _Heard(instance, since, time.monotonic() + TTL)
            self._changed.notify_all()

    def _info(self, instance: Instance, since: int) -> ServiceInfo:
        """Return an instance as DNS-SD has it. Raises `RegistryError` for one that is too large."""
        fields = {key: value for key, value in asdict(instance).items() if key not in ("datacenter", "priority")}
        said = json.dumps({"group": self._group, "since": since, **fields}, ensure_ascii=False).encode()
        if len(said) > MOST:
            raise RegistryError(f"{instance.id}: expected a registration of at most {MOST} bytes, found {len(said)}")
        chunks = [said[start : start + CHUNK] for start in range(0, len(said), CHUNK)]
        readable = re.sub(r"[^A-Za-z0-9-]", "-", instance.id)[:40]
        digest = blake2b(f"{self._group}\0{instance.id}".encode(), digest_size=8).hexdigest()
        try:
            addresses = [str(ipaddress.ip_address(instance.address))]
        except ValueError:  # a host name: who calls it resolves that
            addresses = []
        return ServiceInfo(
            TYPE,
            f"{readable}-{digest}.{TYPE}",
            port=instance.port,
            parsed_addresses=addresses,
            properties={str(number): chunk for number, chunk in enumerate(chunks)},
            server=f"{digest}.local.",
            host_ttl=TTL,
            other_ttl=TTL,
        )


class _Watch(MemoryWatch[T]):
    """A `Watch` on what is heard; it begins once that is all there is."""

    def __init__(self, changed: threading.Condition, now: Callable[[], T], settle: Callable[[], object]) -> None:
        super().__init__(changed, now)
        self._settle = settle

    def __iter__(self) -> Iterator[T]:
        said = False
        while not self._closed:
            try:
                self._settle()
            except RegistryError as error:  # an interface may come up later
                if not said:
                    log.warning("%s; trying again until it is there", error)
                said = True
                time.sleep(ANNOUNCE)
            else:
                break
        yield from super().__iter__()


class _Listener(RecordUpdateListener):
    """Hands on the TXT record of each instance that is announced, the same again as well."""

    def __init__(self, hear: Callable[..., None]) -> None:
        super().__init__()
        self._hear = hear

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:  # noqa: ARG002
        for each in records:
            record: Any = each.new
            # What has expired is told of as well, by zeroconf's own housekeeping: nobody has said that again.
            again = each.old is each.new and each.new.is_expired(now)
            if record.type == TXT and record.name.endswith(f".{TYPE}") and not again:
                self._hear(record.text, leaving=record.ttl <= 1)  # a goodbye has a TTL of 0, for which 1 may be written

    def async_update_records_complete(self) -> None:
        """Do nothing more."""


def _parsed(text: bytes) -> tuple[str, Instance, int] | None:
    """Return the group, the instance and when it was registered, of a TXT record; None for one that is not ours."""
    info = ServiceInfo(TYPE, f"x.{TYPE}", properties=text)
    try:
        chunks = {int(key): value or b"" for key, value in info.properties.items()}
        said = json.loads(b"".join(chunk for _, chunk in sorted(chunks.items())))
        group, since = str(said.pop("group")), int(said.pop("since"))
        said |= {"tags": tuple(map(str, said["tags"])), "meta": {str(k): str(v) for k, v in said["meta"].items()}}
        if any(type(said[name]) is not kind for name, kind in KINDS.items()):
            raise TypeError(f"expected {KINDS}, found {said}")  # noqa: TRY301 (all that is wrong is passed over below)
        return group, Instance(**said), since
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        log.debug("an announcement is no instance's: %s", error)
        return None

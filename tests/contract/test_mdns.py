"""What the mDNS registry promises beyond the contract of all; on loopback, where multicasts go round."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from zeroconf import IPVersion, ServiceInfo, Zeroconf

from rollcall.registry import DuplicateInstanceError, Instance, RegistryError, RegistryUnavailableError, TtlCheck
from rollcall.registry import mdns as module
from rollcall.registry.mdns import MdnsRegistry
from rollcall.settings import BadSettingError, ServiceSettings, load
from tests.making import ROOT
from tests.waiting import Following, eventually

CHECK = TtlCheck(60)
ONE = Instance(id="one-1", name="one", address="127.0.0.1", port=1)
Open = Callable[..., MdnsRegistry]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Return a function that opens a registry, as another process would, in one group unless it says another."""
    common = uuid.uuid4().hex
    registries: list[MdnsRegistry] = []

    def open_(group: str = common, interface: str = "127.0.0.1") -> MdnsRegistry:
        registries.append(MdnsRegistry(interface, group))
        return registries[-1]

    yield open_
    for registry in registries:
        registry.close()


def ids(registry: MdnsRegistry) -> list[str]:
    return [each.id for each in registry.instances("one")]


def test_a_goodbye_is_heard_at_once(opened: Open) -> None:
    here, there = opened(), opened()
    here.register(ONE, CHECK)
    watch = there.watch("one")
    with Following(watch, watch.close) as watched:
        watched.until("it is heard", lambda seen: seen == (ONE,))
        begun = time.monotonic()
        here.deregister(ONE.id)
        watched.until("it has gone", lambda seen: seen == ())
        assert time.monotonic() - begun < 1


def own_address() -> str:
    """Return an address of this machine's on a network that is not loopback; loopback's where there is none."""
    settings = load(ServiceSettings, ["--host", "::", "--registry", "mdns", "--mdns-interface", "all"])
    try:
        return settings.advertised()
    except BadSettingError:
        return "127.0.0.1"


@pytest.mark.parametrize("interface", [module.EVERYWHERE, own_address()])
def test_on_a_network(opened: Open, interface: str) -> None:
    here, there = opened(interface=interface), opened(interface=interface)
    here.register(ONE, CHECK)
    eventually("it is heard", lambda: ids(there) == [ONE.id])
    here.deregister(ONE.id)
    eventually("it has gone", lambda: ids(there) == [])


HOUSEKEEPING = 11  # seconds; zeroconf looks for what has expired each ten
HOLDER = """
import sys, time
from rollcall.registry import Instance, TtlCheck
from rollcall.registry.mdns import MdnsRegistry
MdnsRegistry(group=sys.argv[1]).register(Instance(id="one-1", name="one", address="127.0.0.1", port=1), TtlCheck(60))
time.sleep(60)
"""


def test_one_that_dies_without_a_word_is_gone_when_its_time_is_over(opened: Open) -> None:
    group = uuid.uuid4().hex
    there = opened(group)
    with subprocess.Popen([sys.executable, "-c", HOLDER, group], cwd=ROOT) as holder:
        try:
            eventually("it is heard", lambda: ids(there) == [ONE.id])
            holder.kill()
            begun = time.monotonic()
            eventually("it has gone", lambda: ids(there) == [], 2 * module.TTL)
            assert time.monotonic() - begun > module.TTL - 2 * module.ANNOUNCE
            ends = time.monotonic() + HOUSEKEEPING
            while time.monotonic() < ends:
                assert ids(there) == [], "it stays gone"
        finally:
            holder.kill()


def test_one_that_does_not_confirm_in_its_own_time_is_not_announced(opened: Open) -> None:
    here, there = opened(), opened()
    here.register(ONE, TtlCheck(4))
    eventually("it is heard", lambda: here.confirm(ONE) and ids(there) == [ONE.id])
    eventually("it has gone here", lambda: ids(here) == [])
    eventually("and there", lambda: ids(there) == [])
    eventually("it is back", lambda: here.confirm(ONE) and ids(there) == [ONE.id])
    ends = time.monotonic() + module.TTL + 2
    while time.monotonic() < ends:
        assert here.confirm(ONE)
        assert ids(there) == [ONE.id], "it stays for as long as it confirms"


def test_of_two_that_register_one_id_at_a_time_the_later_gives_way(opened: Open) -> None:
    first, second = opened(), opened()
    first.instances("one")
    second.instances("one")  # both have listened, and heard nobody
    first.register(ONE, CHECK)
    second._heard.clear()  # as if the packet had not come yet
    second.register(replace(ONE, port=2), CHECK)

    def refused() -> bool:
        try:
            return not second.confirm(ONE)
        except DuplicateInstanceError as error:
            return "belongs to one at 127.0.0.1:1" in str(error)

    eventually("it is refused", refused)
    assert first.confirm(ONE)
    assert [each.port for each in first.instances("one")] == [1]
    assert [each.port for each in opened().instances("one")] == [1]


def test_groups_do_not_hear_each_other(opened: Open) -> None:
    here, there = opened(), opened(uuid.uuid4().hex)
    here.register(ONE, CHECK)
    there.register(replace(ONE, port=2), CHECK)
    assert [each.port for each in here.instances("one")] == [1]
    assert [each.port for each in there.instances("one")] == [2]
    here.deregister(ONE.id)
    time.sleep(2 * module.ANNOUNCE)  # for which it is to stay
    assert [each.port for each in there.instances("one")] == [2]


@pytest.mark.parametrize(
    "properties", [{}, {"0": b"{}"}, {"0": b"["}, {"a": b"b"}, {"0": b'{"group": 1, "since": "x"}'}]
)
def test_what_is_not_ours_is_passed_over(opened: Open, properties: dict[str, bytes]) -> None:
    here = opened()
    here.register(ONE, CHECK)
    stranger = Zeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
    try:
        name = f"stranger-{uuid.uuid4().hex[:8]}.{module.TYPE}"
        info = ServiceInfo(module.TYPE, name, port=9, parsed_addresses=["127.0.0.1"], properties=properties)
        stranger.register_service(info, cooperating_responders=True)
        other = opened()
        assert ids(other) == ids(here) == [ONE.id]
    finally:
        stranger.close()


@pytest.mark.parametrize("field", ["id", "name", "address", "version", "port", "weight", "passing"])
def test_a_field_of_another_kind_is_passed_over(opened: Open, field: str) -> None:
    group = uuid.uuid4().hex
    here = opened(group)
    here.register(ONE, CHECK)
    said = {**vars(replace(ONE, id="one-2")), field: ["odd"], "group": group, "since": 1}
    text = json.dumps({key: value for key, value in said.items() if key not in ("datacenter", "priority")})
    here._hear(ServiceInfo(module.TYPE, f"x.{module.TYPE}", properties={"0": text}).text, leaving=False)
    assert ids(here) == [ONE.id]
    assert here.services() == ("one",)


def test_a_registration_that_is_too_large_is_refused(opened: Open) -> None:
    here = opened()
    with pytest.raises(RegistryError, match="expected a registration of at most 4000 bytes, found"):
        here.register(replace(ONE, meta={"note": "x" * 4000}), CHECK)
    assert ids(here) == []
    largest = replace(ONE, meta={"note": "x" * 3700})
    here.register(largest, CHECK)
    assert opened().instances("one") == (largest,)


def test_one_that_another_has_removed_is_gone_until_it_registers_again(opened: Open) -> None:
    here, there = opened(), opened()
    here.register(ONE, CHECK)
    eventually("it is heard", lambda: ids(there) == [ONE.id])
    there.deregister(ONE.id)
    eventually("it is told", lambda: not here.confirm(ONE))
    ends = time.monotonic() + 3 * module.ANNOUNCE
    while time.monotonic() < ends:
        assert ids(here) == ids(there) == []
    assert ids(opened()) == [], "nobody answers for it any more"
    here.register(ONE, CHECK)
    eventually("it is heard again", lambda: ids(there) == [ONE.id])
    there.deregister(ONE.id)
    here.register(ONE, CHECK)  # at once
    eventually("it is heard again", lambda: ids(there) == [ONE.id])
    assert here.confirm(ONE)


def test_any_browser_lists_it(opened: Open) -> None:
    opened().register(ONE, CHECK)
    browser = Zeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
    try:
        found = opened()._info(ONE, 0)
        info = browser.get_service_info(module.TYPE, found.name, timeout=5000)
        assert info is not None
        assert (info.parsed_addresses(), info.port) == (["127.0.0.1"], 1)
    finally:
        browser.close()


@pytest.mark.parametrize("interface", ["203.0.113.1", "::1", "fe80::1", "eth0"])
def test_an_interface_that_is_not_there_is_said(interface: str) -> None:
    registry = MdnsRegistry(interface)
    with pytest.raises(RegistryUnavailableError, match="expected the address of a network interface of this machine"):
        registry.instances("one")
    assert len(registry.diagnose()) == 1


def test_a_watch_waits_for_an_interface_that_is_not_there_yet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = MdnsRegistry("203.0.113.1", uuid.uuid4().hex)
    watch = registry.watch("one")
    with Following(watch, watch.close) as watched:
        eventually("it is said", lambda: "trying again until it is there" in caplog.text)
        monkeypatch.setattr(registry, "_interface", "127.0.0.1")  # it is, now
        watched.until("nobody is there", lambda seen: seen == ())
        registry.register(ONE, CHECK)
        watched.until("somebody is", lambda seen: seen == (ONE,))
    registry.close()

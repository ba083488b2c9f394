"""What every registry promises that takes registrations. Run against each, and with python-consul as with py-consul.

Kubernetes takes none: what it says of its own is asked for in tests/kind.
"""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from rollcall.registry import DuplicateInstanceError, Instance, Keys, Registry, TcpCheck, TtlCheck, Watch, mdns
from rollcall.registry.consul import ConsulRegistry
from rollcall.registry.mdns import MdnsRegistry
from rollcall.registry.memory import MemoryRegistry
from tests.waiting import Following, eventually, free_port

CHECK = TtlCheck(60)  # passes from the start, and for longer than any test here
NAMES = ["grpc And consul", "a/b?c=d&e#f", '100% "a%20b\\', "a+b~c.d", "點名"]
Open = Callable[[], Registry]
T = TypeVar("T")


def opener(kind: str, request: pytest.FixtureRequest) -> Open:
    if kind == "memory":
        memory = MemoryRegistry()
        return lambda: memory
    if kind == "consul":
        cluster = request.getfixturevalue("cluster")
        return lambda: ConsulRegistry(cluster.addresses)
    group = uuid.uuid4().hex
    patch = request.getfixturevalue("monkeypatch")
    patch.setattr(mdns, "ANNOUNCE", 0.3)  # seconds; what it takes a registry to begin follows from that
    patch.setattr(mdns, "SETTLE", 0.4)

    def open_() -> MdnsRegistry:
        registry = MdnsRegistry(group=group)
        request.addfinalizer(registry.close)
        return registry

    return open_


@pytest.fixture(params=["memory", "consul", "mdns"])
def opened(request: pytest.FixtureRequest) -> Open:
    """Return a function that opens the same registry again and again, as different processes do."""
    return opener(request.param, request)


@pytest.fixture
def registry(opened: Open) -> Registry:
    return opened()


def an_instance(name: str = "", **fields: Any) -> Instance:
    """Return an instance of a service that no other test uses."""
    unique = uuid.uuid4().hex[:8]
    return Instance(
        **{"id": f"id-{unique}", "name": name or f"name-{unique}", "address": "127.0.0.1", "port": 1, **fields}
    )


def an_ill_instance(**fields: Any) -> Instance:
    """Return one that fails its checks: Consul finds that nothing listens there, and in memory it is believed."""
    return an_instance(port=free_port(), passing=False, **fields)


def following(watch: Watch[T]) -> Following[T]:
    return Following(watch, watch.close)


def listed(registry: Registry, *expected: Instance, tag: str = "") -> Callable[[], bool]:
    """Return a condition: exactly these are listed. The datacenter is the registry's to say."""

    def check() -> bool:
        found = registry.instances(expected[0].name, tag)
        return tuple(replace(each, datacenter="") for each in found) == expected

    return check


def test_what_is_registered_is_found_with_all_its_fields(registry: Registry) -> None:
    instance = an_instance(
        address="10.1.2.3",
        port=65535,
        version="1.2.3",
        tags=("a b", "B/c", "點"),
        meta={"k": "v w", "note": "ü"},
        weight=7,
    )
    registry.register(instance, CHECK)
    eventually("it is found", listed(registry, instance))


def test_what_is_certain_is_what_is_listed(registry: Registry) -> None:
    instance = an_instance(tags=("t",))
    ill = replace(an_ill_instance(), name=instance.name, id=f"z-{instance.id}")
    registry.register(instance, CHECK)
    registry.register(ill, TcpCheck())

    def ids(*tag: str, failing: bool = False) -> list[str]:
        return [each.id for each in registry.instances(instance.name, *tag, failing=failing, certain=True)]

    eventually("both are found", lambda: ids(failing=True) == [instance.id, ill.id])
    assert ids() == [instance.id]
    assert ids("t", failing=True) == [instance.id]
    eventually("both are listed", lambda: len(registry.instances(instance.name, failing=True)) == 2)
    registry.deregister(instance.id)
    assert ids() == []
    registry.deregister(ill.id)


def test_least_fields(registry: Registry) -> None:
    instance = an_instance(address="::1")
    registry.register(instance, CHECK)
    eventually("it is found", listed(registry, instance))
    assert registry.instances(instance.name)[0].target == "[::1]:1"


def test_unknown_service_has_no_instances(registry: Registry) -> None:
    assert registry.instances(f"unknown-{uuid.uuid4()}") == ()


@pytest.mark.parametrize("name", NAMES)
def test_any_name_and_id_will_do(registry: Registry, name: str) -> None:
    instance = an_instance(f"{name} {uuid.uuid4().hex[:8]}", id=f"{name} {uuid.uuid4().hex[:8]}")
    registry.register(instance, CHECK)
    eventually("it is found", listed(registry, instance))
    assert instance.name in registry.services()
    with following(registry.watch(instance.name)) as watched:
        watched.until("the watch shows it", lambda seen: [each.id for each in seen] == [instance.id])
        registry.deregister(instance.id)
        watched.until("the watch shows that it has gone", lambda seen: seen == ())
    eventually("it has gone", lambda: registry.instances(instance.name) == ())


def test_any_id_is_confirmed(registry: Registry) -> None:
    instances = [an_instance(id=f"{name} {uuid.uuid4().hex[:8]}", port=port) for port, name in enumerate(NAMES, 1)]
    for instance in instances:
        registry.register(instance, CHECK)
    with ThreadPoolExecutor(len(instances)) as pool:
        confirmed = dict(zip(NAMES, pool.map(registry.confirm, instances), strict=True))
    assert all(confirmed.values()), confirmed


def test_instances_are_in_the_order_of_their_ids(registry: Registry) -> None:
    one = an_instance()
    instances = [replace(one, id=f"{letter}-{one.id}", port=port) for port, letter in enumerate("cab", 1)]
    for instance in instances:
        registry.register(instance, CHECK)
    eventually("all are found", listed(registry, *sorted(instances, key=lambda instance: instance.id)))


def test_deregistering(registry: Registry, opened: Open) -> None:
    instance = an_instance()
    registry.register(instance, CHECK)
    eventually("it is found", listed(registry, instance))
    opened().deregister(instance.id)  # from any process
    eventually("it has gone", lambda: registry.instances(instance.name) == ())
    registry.deregister(instance.id)  # twice is harmless
    assert not registry.confirm(instance)


def test_deregistering_what_was_never_there_is_harmless(registry: Registry) -> None:
    registry.deregister(f"unknown-{uuid.uuid4()}")


def test_tags_filter(registry: Registry) -> None:
    stable = an_instance(tags=("stable", "eu west"))
    canary = replace(stable, id=f"z-{stable.id}", port=2, tags=("canary",))
    for instance in (stable, canary):
        registry.register(instance, CHECK)
    eventually("both are found", listed(registry, stable, canary))
    assert listed(registry, stable, tag="eu west")()
    assert listed(registry, canary, tag="canary")()
    assert registry.instances(stable.name, "stab") == ()
    watch = registry.watch(stable.name, "canary")
    with following(watch) as watched:
        watched.until("the watch shows the one with the tag", lambda seen: [each.id for each in seen] == [canary.id])


def test_registering_again_renews(registry: Registry, opened: Open) -> None:
    instance = an_instance(tags=("old",), version="1")
    registry.register(instance, CHECK)
    renewed = replace(instance, tags=("new",), version="2")
    registry.register(renewed, CHECK)
    eventually("it is as registered last, once", listed(registry, renewed))
    opened().register(renewed, CHECK)  # as a process does that was restarted
    assert registry.confirm(renewed)
    assert listed(registry, renewed)()


@pytest.mark.parametrize("same_name", [True, False])
def test_an_id_belongs_to_one_instance(opened: Open, same_name: bool) -> None:  # noqa: FBT001
    first = opened()
    holder = an_instance(port=1001)
    intruder = replace(holder, port=1002, name=holder.name if same_name else f"other-{holder.name}")
    first.register(holder, CHECK)
    for second in [opened() for _ in range(6)]:  # each may ask another server of the registry's
        eventually("everybody knows the first", listed(second, holder))
        with pytest.raises(DuplicateInstanceError) as caught:
            second.register(intruder, CHECK)
        assert repr(holder.id) in str(caught.value)
        assert "127.0.0.1:1001" in str(caught.value)
        assert "give each instance an id of its own" in str(caught.value)
    assert first.confirm(holder)
    assert listed(first, holder)()


def test_an_id_is_free_again_once_deregistered(opened: Open) -> None:
    first, second = opened(), opened()
    holder = an_instance(port=1001)
    first.register(holder, CHECK)
    eventually("everybody knows the first", listed(second, holder))
    first.deregister(holder.id)
    eventually("everybody knows that it has gone", lambda: second.instances(holder.name) == ())
    successor = replace(holder, port=1002)
    second.register(successor, CHECK)
    eventually("its successor is found", listed(second, successor))


def test_confirm_is_true_while_it_stands_and_false_promptly_once_gone(registry: Registry, opened: Open) -> None:
    instance = an_instance()
    assert not registry.confirm(instance)
    registry.register(instance, CHECK)
    for _ in range(2):
        begun = time.monotonic()
        assert registry.confirm(instance)
        assert time.monotonic() - begun < 2
    answered = threading.Event()

    def hold() -> None:
        while registry.confirm(instance):
            pass
        answered.set()

    threading.Thread(target=hold, daemon=True).start()
    another = opened()
    eventually("another has heard of it", listed(another, instance))
    begun = time.monotonic()
    another.deregister(instance.id)
    assert answered.wait(5)
    assert time.monotonic() - begun < 1.5, "about a second is promised"


def test_watch_shows_what_is_there_then_each_change_until_closed(registry: Registry) -> None:
    instance = an_instance(weight=3, tags=("t",), meta={"k": "v"})
    with following(registry.watch(instance.name)) as watched:
        watched.until("it begins with none", lambda seen: seen == (), seconds=2)
        registry.register(instance, CHECK)
        (shown,) = watched.until("it comes", lambda seen: len(seen) == 1)
        assert replace(shown, datacenter="") == instance
        registry.register(replace(instance, weight=4), CHECK)
        watched.until("it changes", lambda seen: [each.weight for each in seen] == [4])
        with following(registry.watch(instance.name)) as late:
            late.until("a watch that begins now shows what is there", lambda seen: len(seen) == 1, seconds=2)
        registry.deregister(instance.id)
        watched.until("it goes", lambda seen: seen == ())
        states = len(watched.seen)
        watched.close()
        watched.close()  # harmless
        registry.register(instance, CHECK)  # a query under way returns
        eventually("the iteration ends", lambda: watched.ended)
        assert len(watched.seen) == states, "nothing is shown after the close"
    assert all(one != other for one, other in zip(watched.seen, watched.seen[1:], strict=False)), (
        "only changes are shown"
    )


def test_those_that_fail_are_left_out_unless_a_watch_asks_for_them(registry: Registry) -> None:
    ill = an_ill_instance(tags=("t",))
    well = replace(ill, passing=True)
    other = replace(well, id=f"z-{ill.id}", tags=())
    watch, filtered = registry.watch(ill.name, failing=True), registry.watch(ill.name, "t", failing=True)
    with following(watch) as watched, following(filtered) as tagged, following(registry.watch(ill.name)) as passing:
        registry.register(ill, TcpCheck())
        registry.register(other, CHECK)

        def shown(seen: tuple[Instance, ...]) -> tuple[Instance, ...]:
            return tuple(replace(each, datacenter="") for each in seen)

        watched.until("it shows both", lambda seen: shown(seen) == (ill, other))
        tagged.until("it shows the one with the tag", lambda seen: shown(seen) == (ill,))
        passing.until("it shows the one that passes", lambda seen: shown(seen) == (other,))
        eventually("it is listed alone", listed(registry, other))  # another server may be a moment behind
        registry.register(well, CHECK)
        watched.until("it shows that both pass", lambda seen: shown(seen) == (well, other))
        passing.until("it shows both", lambda seen: shown(seen) == (well, other))
        registry.register(ill, TcpCheck())
        watched.until("it shows that one fails again", lambda seen: shown(seen) == (ill, other))
        passing.until("it shows the other", lambda seen: shown(seen) == (other,))
        registry.deregister(ill.id)
        watched.until("it shows that one has gone", lambda seen: shown(seen) == (other,))
    registry.deregister(other.id)


def test_an_id_of_one_that_fails_may_be_taken(registry: Registry) -> None:
    ill = an_ill_instance()
    registry.register(ill, TcpCheck())
    successor = replace(ill, port=1, passing=True)
    registry.register(successor, CHECK)
    eventually("it is found", listed(registry, successor))
    registry.deregister(successor.id)


def test_the_names_of_services_are_watched(registry: Registry) -> None:
    tag = f"tag {uuid.uuid4().hex[:8]}"
    public, hidden, ill = an_instance(tags=("t", tag)), an_instance(), an_ill_instance(tags=(tag,))
    another = replace(public, id=f"z-{public.id}", port=2, tags=())
    with following(registry.watch_services()) as watched, following(registry.watch_services(tag)) as tagged:
        tagged.until("it begins with none", lambda seen: seen == (), seconds=2)
        for instance in (public, hidden):
            registry.register(instance, CHECK)
        watched.until("it shows both", lambda seen: {public.name, hidden.name} <= set(seen))
        tagged.until("it shows the one with the tag", lambda seen: seen == (public.name,))
        registry.register(ill, TcpCheck())
        both = tuple(sorted((public.name, ill.name)))
        tagged.until("it shows one that fails as well", lambda seen: seen == both)
        registry.register(another, CHECK)
        registry.deregister(public.id)
        tagged.until("it shows that nobody has the tag any more", lambda seen: seen == (ill.name,))
        assert public.name in registry.services()
        registry.deregister(another.id)
        watched.until("it shows that the service has gone", lambda seen: public.name not in seen)
        registry.deregister(ill.id)
        tagged.until("it shows that all have gone", lambda seen: seen == ())
        states = len(tagged.seen)
        tagged.close()
        tagged.close()  # harmless
        registry.register(public, CHECK)  # a query under way returns
        eventually("the iteration ends", lambda: tagged.ended)
        assert len(tagged.seen) == states, "nothing is shown after the close"
    assert all(list(names) == sorted(names) for names in watched.seen)
    assert all(one != other for one, other in zip(watched.seen, watched.seen[1:], strict=False)), (
        "only changes are shown"
    )
    for instance in (public, hidden):
        registry.deregister(instance.id)


def test_services_are_listed_in_alphabetical_order(registry: Registry) -> None:
    instances = [an_instance(), an_instance(), an_instance()]
    for instance in instances:
        registry.register(instance, CHECK)
    names = {instance.name for instance in instances}
    eventually("all are listed", lambda: names <= set(registry.services()))
    assert list(registry.services()) == sorted(registry.services())


@pytest.fixture(params=["memory", "consul"])
def kept(request: pytest.FixtureRequest) -> Keys:
    found = opener(request.param, request)()
    assert isinstance(found, Keys)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["", "7", "two words", "點\n\0", "a" * 100_000])
def test_what_is_put_under_a_key_is_found_there(kept: Keys, name: str, text: str) -> None:
    key = f"{uuid.uuid4()}/{name}"
    kept.put(key, "another")
    kept.put(key, text)
    assert kept.keys(key) == {key: text}
    kept.delete(key)
    kept.delete(key)  # harmless
    assert kept.keys(key) == {}


def test_keys_are_found_by_how_they_begin(kept: Keys) -> None:
    root = str(uuid.uuid4())
    for key in ("a/b", "a/c/d", "ab", "b"):
        kept.put(f"{root}/{key}", key)
    assert list(kept.keys(f"{root}/a/").values()) == ["a/b", "a/c/d"]
    assert list(kept.keys(f"{root}/a").values()) == ["a/b", "a/c/d", "ab"]
    for key in ("a/b", "a/c/d", "ab", "b"):
        kept.delete(f"{root}/{key}")


def test_keys_are_watched(kept: Keys) -> None:
    root = f"{uuid.uuid4()}/"
    with following(kept.watch_keys(root)) as watched:
        watched.until("it begins with none", lambda seen: seen == {})
        kept.put(f"{root}a", "1")
        watched.until("one is there", lambda seen: seen == {f"{root}a": "1"})
        kept.put(f"{root}a", "2")
        watched.until("it is another", lambda seen: seen == {f"{root}a": "2"})
        kept.put(f"{root}b", "3")
        kept.delete(f"{root}a")
        watched.until("one has taken the other's place", lambda seen: seen == {f"{root}b": "3"})
        kept.delete(f"{root}b")
        watched.until("none is there", lambda seen: seen == {})
    with following(kept.watch_keys(root)) as watched:
        kept.put(f"{root}a", "1")
        watched.until("it is told", lambda seen: seen == {f"{root}a": "1"})
        kept.delete(f"{root}a")


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": ""},
        {"name": ""},
        {"address": ""},
        {"port": 0},
        {"port": 65536},
        {"port": -1},
        {"weight": 0},
        {"weight": 65536},
    ],
)
def test_an_invalid_instance_is_refused(wrong: dict[str, Any]) -> None:
    (field,) = wrong
    with pytest.raises(ValueError, match=f"instance's {field} must"):
        an_instance(**{"name": "n", **wrong}) if field != "name" else Instance(id="i", name="", address="a", port=1)

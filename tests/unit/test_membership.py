"""Who is to be called, as the registry's answers come and go."""

import queue
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import rollcall
from rollcall.discovery.membership import Membership, all_answered, dialled
from rollcall.policy import Policy
from rollcall.registry import Instance, TtlCheck
from tests.waiting import eventually

ONE = Instance(id="one-1", name="one", address="127.0.0.1", port=1)
OTHER = Instance(id="one-2", name="one", address="127.0.0.1", port=2)


class Told:
    """Follows a service and keeps what is told, and when."""

    def __init__(self, registry: rollcall.MemoryRegistry, **settings: Any) -> None:
        self.changes: list[tuple[float, tuple[Instance, ...]]] = []
        self.members = Membership("one", "", registry, Policy(settings), "caller", self._note)

    def _note(self, instances: tuple[Instance, ...]) -> None:
        self.changes.append((time.monotonic(), instances))

    def until(self, *instances: Instance) -> float:
        """Wait until these are who is to be called; return when that was told."""
        eventually(f"{instances} are told", lambda: self.changes and set(self.changes[-1][1]) == set(instances))
        return self.changes[-1][0]


def test_instances_come_and_go() -> None:
    registry = rollcall.MemoryRegistry()
    registry.register(ONE, TtlCheck(), passing=True)
    told = Told(registry)
    told.until(ONE)
    registry.register(OTHER, TtlCheck(), passing=True)
    told.until(ONE, OTHER)
    registry.deregister(ONE.id)
    told.until(OTHER)
    told.members.close()


class Repeating(rollcall.MemoryRegistry):
    """A registry whose watch yields what it is told to, the same thing twice as well, as Consul's may."""

    def __init__(self) -> None:
        super().__init__()
        self.yields: queue.SimpleQueue[tuple[Instance, ...] | None] = queue.SimpleQueue()

    def watch(self, name: str, tag: str = "", *, failing: bool = False) -> Any:  # noqa: ARG002 (the contract's)
        return self

    def __iter__(self) -> Iterator[tuple[Instance, ...]]:
        while (instances := self.yields.get()) is not None:
            yield instances

    def close(self) -> None:
        self.yields.put(None)


def test_strangers_alone_do_not_take_the_place_of_all_at_once() -> None:
    """As when the first leader after Consul's return lists one that was killed before it went, and nobody else."""
    ghost = replace(ONE, id="one-3", port=3)
    registry = Repeating()
    registry.yields.put((ONE, OTHER))
    told = Told(registry, empty_grace=1.0)
    told.until(ONE, OTHER)
    registry.yields.put((ghost,))
    told.until(ghost, ONE, OTHER)
    registry.yields.put(())
    told.until(ONE, OTHER)
    registry.yields.put((ghost, OTHER))  # one of them is back: what is listed is true again
    told.until(ghost, OTHER)
    registry.yields.put((ONE,))
    begun = told.until(ONE, ghost, OTHER)
    assert told.until(ONE) - begun >= 0.9
    told.members.close()


def test_another_part_of_a_larger_service_takes_the_place_of_the_former_at_once() -> None:
    """Those that are not chosen any more are there still: nothing has been lost."""
    many = [replace(ONE, id=f"one-{port}", port=port) for port in range(1, 41)]
    former = many[1:3]
    registry = Repeating()
    registry.yields.put(tuple(former))
    told = Told(registry, subset=2)
    told.until(*former)
    registry.yields.put(tuple(many))
    eventually("others are chosen", lambda: not {*former} & {*told.changes[-1][1]})
    assert [len(instances) for _, instances in told.changes] == [2, 2]
    told.members.close()


def test_each_priority_has_a_part_of_its_own() -> None:
    near = [replace(ONE, id=f"one-{port}", port=port) for port in range(1, 11)]
    far = [replace(ONE, id=f"far-{port}", port=port, priority=1) for port in range(11, 21)]
    registry = Repeating()
    registry.yields.put((*near, *far))
    told = Told(registry, subset=3)
    eventually("they are told", lambda: told.changes)
    assert [each.priority for each in told.changes[-1][1]] == [0, 0, 0, 1, 1, 1]
    registry.yields.put((*far,))  # not all of them: nothing is at fault
    eventually("only those are left", lambda: {each.priority for each in told.changes[-1][1]} == {1})
    told.members.close()


def test_the_only_instance_may_be_replaced() -> None:
    registry = Repeating()
    registry.yields.put((ONE,))
    told = Told(registry)
    told.until(ONE)
    registry.yields.put((OTHER,))
    told.until(OTHER)
    told.members.close()


def test_the_last_ones_are_kept_for_the_grace_and_no_longer() -> None:
    registry = Repeating()
    registry.yields.put((ONE,))
    told = Told(registry, empty_grace=1.0)
    told.until(ONE)
    begun = time.monotonic()
    while told.changes[-1][1] != ():
        registry.yields.put(())  # again and again: that must not make the grace longer
        assert time.monotonic() - begun < 5, "the grace does not end"
        time.sleep(0.05)
    assert told.until() - begun >= 0.9
    assert "no instance of service 'one' passes its checks" in told.members.explanation()
    registry.yields.put((OTHER,))
    told.until(OTHER)
    told.members.close()


def test_while_the_registry_is_away_its_last_word_is_not_believed() -> None:
    """Consul's servers, stopped in order, list nobody any more, and are away then."""

    class Leaving(Repeating):
        away = True
        asked = 0

        def instances(self, name: str, tag: str = "", **flags: bool) -> tuple[Instance, ...]:
            assert flags == {"certain": True}
            self.asked += 1
            if self.away:
                raise rollcall.RegistryUnavailableError("away")
            return super().instances(name, tag)

    registry = Leaving()
    registry.yields.put((ONE, OTHER))
    told = Told(registry, empty_grace=0.6)
    told.until(ONE, OTHER)
    registry.yields.put(())
    eventually("it is asked again and again", lambda: registry.asked > 4)  # which takes longer than the grace
    told.until(ONE, OTHER)
    begun = time.monotonic()
    registry.away = False
    assert told.until() - begun >= 0.5, "from now on it counts"
    told.members.close()


def test_what_a_server_that_is_behind_lists_is_not_believed() -> None:
    """One that is back and not of the cluster yet lists nobody, while the cluster has them all."""
    registry = Repeating()
    registry.register(OTHER, TtlCheck(), passing=True)
    registry.yields.put((ONE, OTHER))
    told = Told(registry, empty_grace=0.6)
    told.until(ONE, OTHER)
    registry.yields.put(())
    time.sleep(1.5)  # more than the grace, in which nothing may happen
    told.until(ONE, OTHER)
    registry.deregister(OTHER.id)
    told.until()
    told.members.close()


def test_the_last_ones_are_kept_as_well_when_no_name_can_be_resolved() -> None:
    registry = Repeating()
    registry.yields.put((ONE,))
    told = Told(registry, empty_grace=1.0)
    told.until(ONE)
    registry.yields.put((replace(OTHER, address="no-such-host.invalid"),))
    begun = time.monotonic()
    assert told.until() - begun >= 0.9
    registry.yields.put((replace(OTHER, address="localhost"),))
    told.until(OTHER)
    told.members.close()


def test_who_is_dialled_is_known_until_the_last_one_is_closed() -> None:
    registry = rollcall.MemoryRegistry()
    one, other = Told(registry), Told(registry)
    assert "one" in dialled()
    one.members.close()
    one.members.close()  # harmless
    assert "one" in dialled()
    other.members.close()
    assert "one" not in dialled()


def test_nobody_from_the_beginning() -> None:
    begun = time.monotonic()
    told = Told(rollcall.MemoryRegistry())
    assert told.until() - begun < 3
    told.members.close()


def test_what_has_not_been_answered_yet() -> None:
    registry = Repeating()
    assert all_answered()
    told = Told(registry)
    assert not all_answered()
    registry.yields.put(())
    eventually("nobody is an answer", all_answered)
    other = Told(Repeating())
    assert not all_answered()
    other.members.close()
    assert all_answered()
    told.members.close()

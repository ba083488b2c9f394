"""A registration is held: made again when it is lost, refused when the id is somebody else's, taken back at the end."""

import logging
import threading
import time
from typing import Any

import pytest

from rollcall import registration as module
from rollcall.registration import Registration
from rollcall.registry import DuplicateInstanceError, Instance, RegistryUnavailableError, TtlCheck
from rollcall.registry.consul import ConsulRegistry
from rollcall.registry.memory import MemoryRegistry
from tests.waiting import eventually, free_port

INSTANCE = Instance(id="sum-1", name="sum", address="127.0.0.1", port=1)
HOLDER = Instance(id="sum-1", name="sum", address="127.0.0.1", port=2)
CHECK = TtlCheck(0.1)
Changes = list[bool | DuplicateInstanceError]


def test_it_registers_holds_and_deregisters() -> None:
    registry, changes = MemoryRegistry(), Changes()
    registration = Registration(registry, INSTANCE, CHECK, changes.append)
    assert registry.services() == (), "nothing happens before the start"
    registration.start()
    eventually("it is told that it stands", lambda: changes == [True])
    assert registry.instances("sum") == (INSTANCE,)
    begun = time.monotonic()
    registration.close()
    assert time.monotonic() - begun < 2
    assert registry.instances("sum") == ()
    assert changes == [True], "an end that was asked for is no loss"


def test_a_registration_that_is_lost_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    registry, changes = MemoryRegistry(), Changes()
    registration = Registration(registry, INSTANCE, CHECK, changes.append)
    registration.start()
    eventually("it stands", lambda: changes == [True])
    begun = time.monotonic()
    registry.deregister(INSTANCE.id)
    eventually("it stands again", lambda: changes == [True, False, True])
    assert time.monotonic() - begun < 2
    assert registry.instances("sum") == (INSTANCE,)
    assert "it is no longer there" in caplog.text
    registration.close()


def test_an_id_that_is_somebody_else_s_is_refused_for_good_and_left_alone() -> None:
    registry, changes = MemoryRegistry(), Changes()
    registry.register(HOLDER, CHECK)
    registration = Registration(registry, INSTANCE, CHECK, changes.append)
    registration.start()
    eventually("it is told", lambda: changes, 20)
    assert len(changes) == 1
    assert isinstance(changes[0], DuplicateInstanceError)
    assert registry.instances("sum") == (HOLDER,)


def test_an_id_that_is_somebody_else_s_is_left_alone_by_one_that_gives_up_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry, changes = MemoryRegistry(), Changes()
    registry.register(HOLDER, CHECK)
    registration = Registration(registry, INSTANCE, CHECK, changes.append)
    registration.start()
    eventually("it waits", lambda: "waiting" in caplog.text)
    registration.close()
    assert changes == []
    assert registry.instances("sum") == (HOLDER,)


def test_also_when_the_registry_has_been_away_since() -> None:
    class Away(MemoryRegistry):
        attempts = 0

        def register(self, *arguments: Any, **named: Any) -> None:
            self.attempts += 1
            if self.attempts > 1:
                raise RegistryUnavailableError("expected a leader, found an election")
            super().register(*arguments, **named)

    registry, changes = Away(), Changes()
    MemoryRegistry.register(registry, HOLDER, CHECK)
    registration = Registration(registry, INSTANCE, CHECK, changes.append)
    registration.start()
    eventually("it knows less than it did", lambda: changes)
    registration.close()
    assert registry.instances("sum") == (HOLDER,)


def test_an_end_that_fails_in_a_way_that_was_not_foreseen_is_an_end(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(MemoryRegistry):
        def deregister(self, instance_id: str) -> None:
            raise OSError(f"no way to remove {instance_id}")

    registry, changes = Broken(), Changes()
    registration = Registration(registry, INSTANCE, CHECK, changes.append)
    registration.start()
    eventually("it stands", lambda: changes == [True])
    registration.close()
    assert "no way to remove sum-1" in caplog.text


def test_a_predecessor_that_is_dying_is_waited_for() -> None:
    registry, changes = MemoryRegistry(), Changes()
    registry.register(HOLDER, CHECK)
    registration = Registration(registry, INSTANCE, TtlCheck(5), changes.append)
    registration.start()
    registry.deregister(HOLDER.id)
    eventually("it stands", lambda: changes == [True])
    assert registry.instances("sum") == (INSTANCE,)
    registration.close()


def test_a_registry_that_is_away_is_told_of_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    changes = Changes()
    registration = Registration(ConsulRegistry([f"127.0.0.1:{free_port()}"]), INSTANCE, CHECK, changes.append)
    registration.start()
    eventually("it has tried some times", lambda: len(changes) > 4)
    assert set(changes) == {False}
    assert caplog.text.count("is not registered, trying again until it is") == 1
    begun = time.monotonic()
    registration.close()
    assert time.monotonic() - begun < 3
    assert "could not deregister" in caplog.text


def test_it_waits_until_the_instance_is_fit_to_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, changes = MemoryRegistry(), Changes()
    fit = threading.Event()
    registration = Registration(registry, INSTANCE, CHECK, changes.append, fit=fit.is_set)
    registration.start()
    time.sleep(0.3)  # for which nothing is to happen
    assert registry.instances("sum") == ()
    fit.set()
    eventually("it stands", lambda: changes == [True])
    registration.close()
    monkeypatch.setattr(module, "FIT_WITHIN", 0.3)
    registration = Registration(registry, INSTANCE, CHECK, changes.append, fit=lambda: False)
    registration.start()
    eventually("it is registered in the end", lambda: registry.instances("sum"))
    registration.close()


def test_it_can_be_closed_while_the_instance_is_not_fit() -> None:
    registry, changes = MemoryRegistry(), Changes()
    registration = Registration(registry, INSTANCE, CHECK, changes.append, fit=lambda: False)
    registration.start()
    begun = time.monotonic()
    registration.close()
    assert time.monotonic() - begun < 2
    assert registry.instances("sum") == ()
    assert changes == []

"""A registry inside the process, for unit tests. It runs no checks: an instance passes unless it says that it fails."""

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from rollcall.registry import Check, DuplicateInstanceError, Instance

T = TypeVar("T")


class MemoryRegistry:
    """A `Registry`, with `Keys`, that lives and dies with the process."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}
        self._keys: dict[str, str] = {}
        self.changed = threading.Condition()

    def register(self, instance: Instance, check: Check, *, passing: bool = False) -> None:  # noqa: ARG002 (the contract's)
        with self.changed:
            holder = self._instances.get(instance.id)
            if holder and holder.passing and holder.target != instance.target:
                raise DuplicateInstanceError(
                    f"instance id {instance.id!r} belongs to {holder.name} at {holder.target}, which is alive: "
                    f"give each instance an id of its own"
                )
            self._instances[instance.id] = instance
            self.changed.notify_all()

    def confirm(self, instance: Instance) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: instance.id not in self._instances, timeout=1)
            return instance.id in self._instances

    def deregister(self, instance_id: str) -> None:
        with self.changed:
            self._instances.pop(instance_id, None)
            self.changed.notify_all()

    def instances(
        self,
        name: str,
        tag: str = "",
        *,
        failing: bool = False,
        certain: bool = False,  # noqa: ARG002 (it always is)
    ) -> tuple[Instance, ...]:
        return tuple(each for each in self._registered(tag) if each.name == name and (failing or each.passing))

    def services(self) -> tuple[str, ...]:
        return self._names("")

    def diagnose(self) -> tuple[str, ...]:
        return ()

    def watch(self, name: str, tag: str = "", *, failing: bool = False) -> "MemoryWatch[tuple[Instance, ...]]":
        return MemoryWatch(self.changed, lambda: self.instances(name, tag, failing=failing))

    def watch_services(self, tag: str = "") -> "MemoryWatch[tuple[str, ...]]":
        return MemoryWatch(self.changed, lambda: self._names(tag))

    def keys(self, prefix: str) -> dict[str, str]:
        with self.changed:
            return {key: text for key, text in sorted(self._keys.items()) if key.startswith(prefix)}

    def watch_keys(self, prefix: str) -> "MemoryWatch[dict[str, str]]":
        return MemoryWatch(self.changed, lambda: self.keys(prefix))

    def put(self, key: str, text: str) -> None:
        with self.changed:
            self._keys[key] = text
            self.changed.notify_all()

    def delete(self, key: str) -> None:
        with self.changed:
            self._keys.pop(key, None)
            self.changed.notify_all()

    def __str__(self) -> str:
        return "the registry in memory"

    def _registered(self, tag: str) -> list[Instance]:
        with self.changed:
            found = [each for each in self._instances.values() if not tag or tag in each.tags]
        return sorted(found, key=lambda instance: instance.id)

    def _names(self, tag: str) -> tuple[str, ...]:
        return tuple(sorted({each.name for each in self._registered(tag)}))


class MemoryWatch(Generic[T]):
    """A `Watch` on what a `MemoryRegistry` answers now, which `changed` is notified of."""

    def __init__(self, changed: threading.Condition, now: Callable[[], T]) -> None:
        self._changed, self._now = changed, now
        self._closed = False

    def __iter__(self) -> Iterator[T]:
        seen: T | None = None
        while True:
            with self._changed:  # reentrant: a Condition stands on an RLock
                while not self._closed and self._now() == seen:
                    self._changed.wait()
                if self._closed:
                    return
                seen = self._now()
            yield seen

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

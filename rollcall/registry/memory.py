"""A registry inside the process, for unit tests. It runs no checks: what is registered passes."""

import threading
from collections.abc import Iterator

from rollcall.registry import Check, DuplicateInstanceError, Instance


class MemoryRegistry:
    """A `Registry` that lives and dies with the process."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}
        self.changed = threading.Condition()

    def register(self, instance: Instance, check: Check, *, passing: bool = False) -> None:  # noqa: ARG002 (the contract's)
        with self.changed:
            holder = self._instances.get(instance.id)
            if holder and holder.target != instance.target:
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

    def instances(self, name: str, tag: str = "") -> tuple[Instance, ...]:
        with self.changed:
            found = [each for each in self._instances.values() if each.name == name and (not tag or tag in each.tags)]
        return tuple(sorted(found, key=lambda instance: instance.id))

    def services(self) -> tuple[str, ...]:
        with self.changed:
            return tuple(sorted({instance.name for instance in self._instances.values()}))

    def watch(self, name: str, tag: str = "") -> "MemoryWatch":
        return MemoryWatch(self, name, tag)

    def __str__(self) -> str:
        return "the registry in memory"


class MemoryWatch:
    """A `Watch` on a `MemoryRegistry`."""

    def __init__(self, registry: MemoryRegistry, name: str, tag: str) -> None:
        self._registry, self._name, self._tag = registry, name, tag
        self._closed = False

    def __iter__(self) -> Iterator[tuple[Instance, ...]]:
        seen: tuple[Instance, ...] | None = None
        while True:
            with self._registry.changed:  # reentrant: a Condition stands on an RLock
                while not self._closed and self._now() == seen:
                    self._registry.changed.wait()
                if self._closed:
                    return
                seen = self._now()
            yield seen

    def close(self) -> None:
        with self._registry.changed:
            self._closed = True
            self._registry.changed.notify_all()

    def _now(self) -> tuple[Instance, ...]:
        return self._registry.instances(self._name, self._tag)

"""Holding a registration: made, watched, made again elsewhere, and taken back at the end."""

import logging
import random
import threading
import time
from collections.abc import Callable

from rollcall.registry import Check, DuplicateInstanceError, Instance, Registry, RegistryError, TtlCheck

log = logging.getLogger(__name__)

BACKOFF = (0.1, 1.0)  # seconds: the first and the longest pause after a failed attempt


class Registration:
    """One instance's registration, held from `start` to `close` by a thread of its own.

    `on_change` is called from that thread: with True when the registration stands, with False when it has been lost,
    and with the error when it was refused for good because another instance that is alive has the id.
    """

    def __init__(
        self,
        registry: Registry,
        instance: Instance,
        check: Check,
        on_change: Callable[[bool | DuplicateInstanceError], None],
    ) -> None:
        self._registry, self._instance, self._check = registry, instance, check
        self._on_change = on_change
        self._closed = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._hold, name=f"registration {instance.id}", daemon=True)

    def start(self) -> None:
        """Begin to register; does not wait."""
        self._thread.start()

    def close(self) -> None:
        """Deregister. A registry that is away is left to find out by its check."""
        self._closed.set()
        with self._writing:  # no registration under way may come after this
            try:
                self._registry.deregister(self._instance.id)
            except RegistryError as error:
                log.warning("%s: could not deregister, its check will fail there: %s", self._instance.id, error)
        self._thread.join(timeout=5)

    def _hold(self) -> None:
        # A predecessor that was killed passes until its next check: only one that still does after that is alive.
        check = self._check
        patience = check.ttl if isinstance(check, TtlCheck) else check.interval + check.timeout
        refused_since: float | None = None
        failures = 0
        while not self._closed.is_set():
            try:
                if not self._register():
                    return
                self._on_change(True)  # noqa: FBT003
                log.info("%s is registered in %s", self._instance.id, self._registry)
                while self._registry.confirm(self._instance):
                    failures, refused_since = 0, None
                    if self._closed.is_set():
                        return
                lost = "it is no longer there"
            except DuplicateInstanceError as error:
                refused_since = refused_since or time.monotonic()
                if time.monotonic() - refused_since > patience + 1:
                    self._on_change(error)
                    return
                self._closed.wait(BACKOFF[1] / 2)
                continue
            except RegistryError as error:
                lost = str(error)
            if self._closed.is_set():
                return
            self._on_change(False)  # noqa: FBT003
            if not failures:  # said once, until it stands again
                log.warning("%s is not registered, trying again until it is: %s", self._instance.id, lost)
            else:
                pause = min(BACKOFF[0] * 2 ** min(failures, 10), BACKOFF[1])
                self._closed.wait(pause * random.uniform(0.5, 1))  # noqa: S311 (spreads attempts, guards nothing)
            failures += 1

    def _register(self) -> bool:
        with self._writing:
            if self._closed.is_set():
                return False
            self._registry.register(self._instance, self._check, passing=True)
            return True

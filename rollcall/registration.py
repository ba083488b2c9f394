"""Holding a registration: made, watched, made again elsewhere, and taken back at the end."""

import logging
import random
import threading
import time
from collections.abc import Callable

from rollcall.registry import Check, DuplicateInstanceError, Instance, Registry, RegistryError, TtlCheck

log = logging.getLogger(__name__)

BACKOFF = (0.1, 1.0)  # seconds: the first and the longest pause after a failed attempt
FIT_WITHIN = 10.0  # seconds for an instance to become fit to be called
LOOK = 0.05  # seconds between two looks whether it is
DEAD_WITHIN = 10.0  # seconds that Consul may take to find out that a server of its own is dead


class Registration:
    """One instance's registration, held from `start` to `close` by a thread of its own.

    `on_change` is called from that thread: with True when the registration stands, with False when it has been lost,
    and with the error when it was refused for good because another instance that is alive has the id. While the
    instance is not `fit` to be called, it is not registered, for up to `FIT_WITHIN` seconds at each attempt.
    """

    def __init__(
        self,
        registry: Registry,
        instance: Instance,
        check: Check,
        on_change: Callable[[bool | DuplicateInstanceError], None],
        fit: Callable[[], bool] = lambda: True,
    ) -> None:
        self._registry, self._instance, self._check = registry, instance, check
        self._on_change, self._fit = on_change, fit
        self._closed = threading.Event()
        self._writing = threading.Lock()
        self._tried = False  # whether this instance may be registered
        self._theirs = False  # whether it is another that was found under the id
        self._failures = 0
        self._refused_since: float | None = None
        self._thread = threading.Thread(target=self._hold, name=f"registration {instance.id}", daemon=True)

    def start(self) -> None:
        """Begin to register; does not wait."""
        self._thread.start()

    def close(self) -> None:
        """Deregister. A registry that is away is left to find out by its check. Harmless when repeated."""
        self._closed.set()
        with self._writing:  # no registration under way may come after this
            try:
                if self._tried and not self._theirs:
                    self._registry.deregister(self._instance.id)
            except RegistryError as error:
                log.warning("%s: could not deregister, its check will fail there: %s", self._instance.id, error)
            except Exception:  # whatever it is, the calls in flight are still to be finished
                log.exception("%s: deregistering failed in a way that was not foreseen", self._instance.id)
            self._tried = False
        self._thread.join(timeout=5)

    def _hold(self) -> None:
        while not self._closed.is_set():
            try:
                self._stand()
            except DuplicateInstanceError as error:
                self._theirs = True
                if self._give_way(error):
                    return
            except RegistryError as error:
                self._lose(str(error))
            except Exception:  # whatever it is, an instance that gave up here would never be found again
                log.exception("%s: the registration failed in a way that was not foreseen", self._instance.id)
                self._lose("see above")

    def _stand(self) -> None:
        """Register, and confirm the registration for as long as it stands."""
        patience = time.monotonic() + FIT_WITHIN
        while not self._fit() and time.monotonic() < patience and not self._closed.wait(LOOK):
            pass
        with self._writing:
            if self._closed.is_set():
                return
            self._tried = True
            try:
                self._registry.register(self._instance, self._check, passing=True)
            except DuplicateInstanceError:
                self._theirs = True  # before `close` may look
                raise
            self._theirs = False
        self._on_change(True)  # noqa: FBT003
        log.info("%s is registered in %s", self._instance.id, self._registry)
        while self._registry.confirm(self._instance):
            self._failures, self._refused_since = 0, None
            if self._closed.is_set():
                return
        self._lose("it is no longer there")

    def _lose(self, reason: str) -> None:
        """Tell that the registration does not stand, and wait before the next attempt."""
        if self._closed.is_set():
            return
        self._refused_since = None
        self._on_change(False)  # noqa: FBT003
        if not self._failures:  # said once, until it stands again
            log.warning("%s is not registered, trying again until it is: %s", self._instance.id, reason)
        else:
            self._closed.wait(min(BACKOFF[0] * 2 ** min(self._failures, 10), BACKOFF[1]) * random.uniform(0.5, 1))  # noqa: S311 (spreads attempts, guards nothing)
        self._failures += 1

    def _give_way(self, error: DuplicateInstanceError) -> bool:
        """Say whether the other instance with this id is there to stay."""
        # A predecessor that was killed passes until its next check, or, if the server that checked it died as well,
        # until the cluster has found that out: only one that still passes after that is alive.
        ttl_or_check = (
            self._check.ttl if isinstance(self._check, TtlCheck) else self._check.interval + self._check.timeout
        )
        patience = max(DEAD_WITHIN, ttl_or_check)
        if self._refused_since is None:
            self._refused_since = time.monotonic()
            log.warning("%s; waiting up to %g s for it to go", error, patience)
        if time.monotonic() - self._refused_since > patience:
            self._on_change(error)
            return True
        self._closed.wait(BACKOFF[1] / 2)
        return False

"""Who is there to be called: the instances of a service, as far as this process knows.

What a registry says is not taken at its word in one case: a service that loses all of its instances at once. More
likely than that they are gone is that the registry is at fault, so they are kept for a while, beside any new ones. Only
the time counts in which the registry is certain that none of them is there. Consul's servers, stopped in order, each
take the registrations that they hold out of the list before they go, and the last word of a registry that is away may
be that there is nobody; a server that is back, but not in the cluster yet, may say so for a minute more.

Everything here runs on threads of its own: an event loop that the application blocks must not stop discovery.
"""

import ipaddress
import itertools
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from rollcall.discovery.subset import subset
from rollcall.policy import Policy
from rollcall.registry import Instance, Registry, RegistryError

log = logging.getLogger(__name__)

PATIENCE = 0.5
"""The share of the default deadline after which a registry that has not answered is given up on, for now."""

SECOND_LOOK = 1.0
"""The seconds for which a service that had no instances when it was dialled may still get some before calls fail."""

LOOK = 0.5
"""The seconds between two questions to the registry whether all are gone for certain."""

_followed: Counter[str] = Counter()
"""How many memberships there are of each service in this process."""
_unanswered: set["Membership"] = set()
"""Those of which the registry has said nothing yet."""
_counting = threading.Lock()


def dialled() -> tuple[str, ...]:
    """Return the names of the services that this process has open channels to, in alphabetical order."""
    with _counting:
        return tuple(sorted(_followed))


def all_answered() -> bool:
    """Say whether the registry has told, of each service that this process calls, who is there."""
    with _counting:
        return not _unanswered


class Membership:
    """The instances of a service that a caller should call, followed from now until `close`.

    `on_change` gets them each time they change, host names resolved, from a thread of this object's and never twice at
    the same time; an empty tuple when there is nobody to call, which `explanation` puts into words. `caller` decides
    which part of a large service is chosen, see `subset`.
    """

    def __init__(
        self,
        name: str,
        tag: str,
        registry: Registry,
        policy: Policy,
        caller: str,
        on_change: Callable[[tuple[Instance, ...]], None],
    ) -> None:
        self.name, self.tag = name, tag
        self.registry, self._policy = registry, policy
        self._caller, self._on_change = caller, on_change
        self._current: tuple[Instance, ...] | None = None  # None until the registry, or our patience, has spoken
        self._listed: tuple[Instance, ...] = ()  # what the registry has listed last
        self._kept: tuple[Instance, ...] = ()  # what it does not list any more, and is not yet believed to be gone
        self._missed = 0.0  # seconds for which it has been certain of that
        self._answered = self._waiting = self._closed = False
        self._lock = threading.Lock()
        self._watch = registry.watch(name, tag)
        self._giving_up = self._timer(PATIENCE * policy.settings.deadline)
        with _counting:
            _followed[name] += 1
            _unanswered.add(self)
        threading.Thread(target=self._follow, name=f"watch {name}", daemon=True).start()

    def close(self) -> None:
        """Stop following; `on_change` is not called any more. Harmless when repeated."""
        self._watch.close()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._giving_up.cancel()
        with _counting:
            _unanswered.discard(self)
            _followed[self.name] -= 1
            if not _followed[self.name]:
                del _followed[self.name]

    def explanation(self) -> str:
        """Say why there is nobody to call: what was looked for, where, and what is there. Asks the registry."""
        wanted = f"service {self.name!r}" + (f" with tag {self.tag!r}" if self.tag else "")
        if not self._answered:  # asking again would take longer than the call has
            return f"no instance of {wanted} is known: {self.registry} has not answered yet"
        try:
            registered = ", ".join(self.registry.services()) or "nothing"
        except RegistryError as error:
            return f"no instance of {wanted} is known: {error}"
        return f"no instance of {wanted} passes its checks in {self.registry}; registered there: {registered}"

    def _follow(self) -> None:
        for instances in self._watch:
            try:
                self._update(instances)
            except Exception:  # whatever it is, a watch that ended here would leave its callers in the past
                log.exception("a change of %r could not be taken over", self.name)

    def _update(self, instances: tuple[Instance, ...]) -> None:
        log.debug("%r passes at %s", self.name, ", ".join(each.target for each in instances) or "no instance")
        resolved = [_resolved(each) for each in self._subset(instances)]
        chosen = tuple(each for each in resolved if each)
        with self._lock:
            if self._closed:
                return
            self._answered = True
            self._listed = chosen
            had = self._kept or self._current or ()
            if had and _all_gone(had, (*chosen, *instances) if chosen else ()):
                # More likely a fault of the registry's than the truth: keep them for a while.
                if not self._kept:
                    log.warning("%s lists none of the instances of %r any more; keeping them", self.registry, self.name)
                    self._kept, self._missed = had, 0.0
                    self._wait(min(LOOK, self._policy.settings.empty_grace))
                self._tell((*chosen, *self._kept))
            elif chosen:
                self._giving_up.cancel()
                self._waiting, self._kept = False, ()
                self._tell(chosen)
            elif not self._waiting and self._current is None:
                # Just dialled, perhaps just registered: a server may be a moment behind the one that took it.
                self._wait(min(SECOND_LOOK, PATIENCE * self._policy.settings.deadline))
        with _counting:
            _unanswered.discard(self)

    def _subset(self, instances: tuple[Instance, ...]) -> list[Instance]:
        """Choose from the instances of each priority those that this caller connects to."""
        grouped = itertools.groupby(sorted(instances, key=_priority), key=_priority)
        size = self._policy.settings.subset
        return [each for _, group in grouped for each in subset(list(group), self._caller, size)]

    def _wait(self, seconds: float) -> None:
        """Give the service this long to have instances again."""
        self._giving_up.cancel()
        self._waiting = True
        self._giving_up = self._timer(seconds)

    def _timer(self, seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, lambda: self._give_up(timer))
        timer.daemon = True
        timer.start()
        return timer

    def _give_up(self, timer: threading.Timer) -> None:
        certain = not self._kept or self._gone(self._kept)
        with self._lock:
            if self._closed or timer.finished.is_set():  # cancelled while this waited
                return
            if self._kept:
                self._missed = self._missed + timer.interval if certain else 0.0
                if self._missed < self._policy.settings.empty_grace:
                    self._wait(timer.interval)
                    return
            self._kept = ()
            self._tell(self._listed)

    def _gone(self, instances: tuple[Instance, ...]) -> bool:
        """Say whether none of these is there any more, for certain."""
        try:
            there = self.registry.instances(self.name, self.tag, certain=True)
        except RegistryError:
            return False
        return not {each.target for each in instances} & {each.target for each in map(_resolved, there) if each}

    def _tell(self, instances: tuple[Instance, ...]) -> None:
        if instances != self._current:
            self._current = instances
            self._on_change(instances)


def _priority(instance: Instance) -> int:
    return instance.priority


def _all_gone(had: tuple[Instance, ...], found: tuple[Instance, ...]) -> bool:
    """Say whether all instances of a service are gone at once.

    When all of Consul returns from being away, its first leader may for a moment list but one that was killed long ago:
    so strangers are not enough to believe that. Where there was only one, that is how it looks when it has restarted.
    """
    if not found:
        return True
    targets = {each.target for each in found}
    return len(had) > 1 and all(each.target not in targets for each in had)


def _resolved(instance: Instance) -> Instance | None:
    """Return an instance with an IP address: xDS takes no host names. None, with a warning, when there is none."""
    try:
        ipaddress.ip_address(instance.address)
    except ValueError:
        pass
    else:
        return instance
    try:
        address = socket.getaddrinfo(instance.address, instance.port, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
        log.warning("instance %s of %r is left out: %s: %s", instance.id, instance.name, instance.address, error)
        return None
    return replace(instance, address=str(address))

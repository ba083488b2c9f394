"""What tests wait with: conditions with a deadline, never a fixed time."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, Self, TypeVar

from deploy.local.cluster import free_ports

T = TypeVar("T")

PAUSE = 0.01  # seconds between two looks


def eventually(what: str, found: Callable[[], T], seconds: float = 30.0) -> T:
    """Ask until the answer is true, and return it. Fails when it does not come in time."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(PAUSE)
    return answer


def free_port() -> int:
    """Return a loopback port that nothing listens on.

    From below the range the kernel gives to outgoing connections: whoever is to listen there later, or again after it
    was killed, must not find that one of these has taken the port meanwhile.
    """
    return free_ports(1)[0].http


class Following(Generic[T]):
    """Iterates over something endless, a watch, on a thread of its own and keeps what it yields."""

    def __init__(self, endless: Iterable[T], close: Callable[[], None]) -> None:
        self.seen: list[T] = []
        self._endless, self.close = endless, close
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        for each in self._endless:
            self.seen.append(each)

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def until(self, what: str, fits: Callable[[T], bool], seconds: float = 20.0) -> T:
        """Wait until the newest of what was yielded fits, and return it. Longer than a watch may be in the dark."""
        try:
            eventually(what, lambda: self.seen and fits(self.seen[-1]), seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; newest: {self.seen[-1:]}") from None
        return self.seen[-1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""A lock between processes, on a file: the kernel lets go of it when its holder dies, in whatever way."""

from __future__ import annotations

import fcntl
import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from deploy.local import LocalError
from deploy.local.progress import Progress, say

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POLL_SECONDS = 0.1


@contextmanager
def locked(path: Path, holder: str, timeout: float) -> Iterator[None]:
    """Hold the lock on `path`; wait up to `timeout` seconds for `holder`, which is said, to let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if not _taken(file):
            say(f"waiting for {holder} to end")
            _wait(file, holder, timeout)
        yield


def _wait(file: IO[str], holder: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with Progress(f"waiting for {holder}") as progress:
        while not _taken(file):
            if time.monotonic() >= deadline:
                raise LocalError(f"expected {holder} to end within {timeout:g} s, but it still runs: end it, or wait")
            progress("it still runs")
            time.sleep(POLL_SECONDS)


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

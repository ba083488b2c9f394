"""Say how far something long has come: one rewritten line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Self

TERMINAL_SECONDS = 0.1
PLAIN_SECONDS = 10.0


class Progress:
    """A context manager around something long; call it with the state of things as often as you like.

    It writes to stderr, with the time it has taken so far, and nothing at all for what is over within a moment.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._shown = self._began

    def __call__(self, state: str) -> None:
        """Show the state, unless it was shown just now."""
        now = time.monotonic()
        if now - self._shown < (TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS):
            return
        self._shown = now
        line = f"{self._what}: {state}, {duration(now - self._began)}"
        if self._terminal:
            line = f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K"
        print(line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Write a line for the user to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as people write them: 8 s, 3 min 8 s."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

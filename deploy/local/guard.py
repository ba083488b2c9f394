"""Kill what a test session started when the session dies, even by SIGKILL.

The guard is a small child that reads process ids from a pipe. When the session goes, in whatever way, the kernel closes
the pipe; the guard sees its end, kills every registered process group and goes too. Works wherever pipes do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import IO, Self

import psutil

SAME_START_SECONDS = 2.0  # as in process.py, which is not imported: the guard runs as a lone script


class Guard:
    """A context manager; whatever was given to `watch` and still runs is killed on leaving it.

    with Guard() as guard, Cluster(run, free_ports(), binary, on_start=guard.watch) as cluster: ...
    """

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,  # signals meant for the session must not stop its guard
        )

    def watch(self, pid: int) -> None:
        """Have this process group killed when the session ends; `pid` is its leader."""
        with contextlib.suppress(psutil.NoSuchProcess):
            line = f"{pid} {psutil.Process(pid).create_time()}\n"
            self._pipe.write(line.encode())
            self._pipe.flush()

    def close(self) -> None:
        """Kill whatever still runs, now."""
        self._pipe.close()
        self._child.wait(timeout=10)

    @property
    def _pipe(self) -> IO[bytes]:
        if self._child.stdin is None:
            raise RuntimeError("the guard's pipe should be open")
        return self._child.stdin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Read `pid start-time` lines until the pipe ends, then kill those process groups."""
    watched = [line.split() for line in sys.stdin]
    for pid, create_time in watched:
        with contextlib.suppress(psutil.NoSuchProcess):  # its group may outlive it
            if abs(psutil.Process(int(pid)).create_time() - float(create_time)) > SAME_START_SECONDS:
                continue  # the pid belongs to a stranger by now
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; or, on macOS, all zombies
            os.killpg(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    main()

"""Processes that outlive the command that started them, each with a record, so that only our own are ever signalled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# The kernel derives a start time from the wall clock, which drifts a little; pids do not come round in two seconds.
SAME_START_SECONDS = 2.0
POLL_SECONDS = 0.02
KILL_SECONDS = 5.0
LOG_BYTES = 10_000_000
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Process:
    """A process started here: the leader of its own session, writing to its own log file.

    A pid alone may belong to a stranger by now, so a process is the pid together with the time it was started.
    """

    name: str
    pid: int
    create_time: float
    command: tuple[str, ...]
    log: str
    log_start: int
    """Where its own lines begin in the log, which is kept across restarts."""

    def running(self) -> bool:
        """Whether it still runs; frozen (SIGSTOP) counts as running, a zombie does not, unless it has threads left."""
        return self._find() is not None

    def frozen(self) -> bool:
        """Whether it is stopped by SIGSTOP."""
        found = self._find()
        with contextlib.suppress(psutil.NoSuchProcess):
            return found is not None and found.status() == psutil.STATUS_STOPPED
        return False

    def signal(self, sig: signal.Signals) -> None:
        """Send a signal to the process and whatever it has started; nothing happens when it has gone."""
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, sig)

    def freeze(self) -> None:
        """SIGSTOP, and wait until it has taken effect: signals are delivered in their own time."""
        self.signal(signal.SIGSTOP)
        deadline = time.monotonic() + KILL_SECONDS
        while self.running() and not self.frozen() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def stop(self, grace: float) -> bool:
        """SIGTERM, wait up to `grace` seconds, then SIGKILL; whether it went within the grace."""
        return not stop_all([self], grace)

    def kill(self) -> None:
        """SIGKILL, and wait until it has gone."""
        self.signal(signal.SIGKILL)
        self.wait(KILL_SECONDS)

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for it to go; whether it has."""
        deadline = time.monotonic() + timeout
        while self.running():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def tail(self, lines: int = 10) -> str:
        """Return the last lines that it has written to its log, indented, for a message."""
        return tail(Path(self.log), lines, self.log_start)

    def _find(self) -> psutil.Process | None:
        try:
            found = psutil.Process(self.pid)
            if abs(found.create_time() - self.create_time) > SAME_START_SECONDS:
                return None
            # The last thread to end gives the ports and files back, when the first may have been a zombie for a while.
            if found.status() == psutil.STATUS_ZOMBIE and found.num_threads() <= 1:
                with contextlib.suppress(ChildProcessError):  # then its parent is someone else, and reaps it
                    os.waitpid(self.pid, os.WNOHANG)
                return None
        except psutil.NoSuchProcess:
            return None
        return found


def start(
    name: str,
    command: Sequence[str],
    *,
    run: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Process:
    """Start `command` detached, with its log in run/logs and its record in run/processes."""
    log = run / "logs" / f"{name}.log"
    record = _record(run, name)
    for folder in (log.parent, record.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.old"))
    log_start = log.stat().st_size if log.exists() else 0
    with uninterrupted(), log.open("ab") as output:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,  # Ctrl-C in the terminal is for us, not for it
        )
        child.returncode = 0  # it is meant to outlive this object: keep Popen from warning of that
        try:
            create_time = psutil.Process(child.pid).create_time()
            process = Process(name, child.pid, create_time, tuple(command), str(log), log_start)
            draft = record.with_suffix(".tmp")
            draft.write_text(json.dumps(asdict(process), indent=2) + "\n")
            draft.replace(record)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            raise
    return process


def stop_all(processes: Iterable[Process], grace: float) -> list[Process]:
    """Stop these side by side: SIGTERM, up to `grace` seconds for all, then SIGKILL; return those that needed it."""
    stopping = list(processes)
    for process in stopping:
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGCONT)  # a frozen process cannot hear SIGTERM
    deadline = time.monotonic() + grace
    stubborn = [process for process in stopping if not process.wait(max(0.0, deadline - time.monotonic()))]
    for process in stubborn:
        process.kill()
    return stubborn


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put SIGINT and SIGTERM off until the end, so that no process is started that nobody has heard of.

    They are not blocked or ignored, as what is started inside would inherit that.
    """
    if threading.current_thread() is not threading.main_thread():  # to which signals are delivered
        yield
        return
    pending: list[int] = []
    before = {sig: signal.signal(sig, lambda number, _: pending.append(number)) for sig in INTERRUPTS}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
        for number in pending:
            signal.raise_signal(number)


def recorded(run: Path, name: str) -> Process | None:
    """Return the process recorded under this name, running or not; None without a record."""
    try:
        fields = json.loads(_record(run, name).read_text())
        return Process(**{**fields, "command": tuple(fields["command"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # absent, or not one of our records
        return None


def running(run: Path, name: str) -> Process | None:
    """Return the process recorded under this name if it still runs."""
    process = recorded(run, name)
    return process if process and process.running() else None


def all_recorded(run: Path) -> list[Process]:
    """Return every recorded process, by name."""
    names = sorted(path.stem for path in (run / "processes").glob("*.json"))
    return [process for name in names if (process := recorded(run, name))]


def forget(run: Path, name: str) -> None:
    """Remove the record of a process that has been stopped."""
    _record(run, name).unlink(missing_ok=True)


def tail(log: Path, lines: int = 10, start: int = 0) -> str:
    """Return the last lines of a log file (of its last 64 kB, and from `start` on), indented."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 65536))
            last = file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        last = []
    return "\n".join(f"    {line}" for line in last or ["(its log is empty)"])


def _record(run: Path, name: str) -> Path:
    return run / "processes" / f"{name}.json"

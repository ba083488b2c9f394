"""Log lines, for people or as JSON: what happens to the instance, and one line per call. Never a message's values."""

import asyncio
import json
import logging
import sys
import time
from typing import Any, Literal

CALLS = logging.getLogger("rollcall.calls")
"""The logger of the lines about calls, all at level INFO. Above that level it is silent."""

FLUSH = 0.02  # seconds that a call's line may wait for others to be written with


def configure(form: Literal["text", "json"], level: str, instance: str) -> None:
    """Send all logs to standard error, in the given form, from `level` up."""
    handler = Stderr(Json(instance) if form == "json" else Text(instance))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    _installed[:] = [handler]
    # Nothing here shows the thread, process or source line, and finding them out for each record would cost as much as
    # writing the line: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined,unused-ignore]  # (since Python 3.12)
    logging._srcfile = None  # type: ignore[attr-defined,unused-ignore]  # noqa: SLF001 (the switch that page names)


def set_level(level: str) -> None:
    """Log from this level up, from now on."""
    logging.root.setLevel(level.upper())


def call(path: str, code: str, seconds: float, trace: str) -> None:
    """Log a call that has been handled; to be called on the event loop.

    A record and a write for each would cost more than all else that is done about a call. So calls are only noted here,
    and become lines many at a time: within `FLUSH` seconds, before any other line, and at exit. A process that is
    killed loses those of its last moment. Where others have added a handler, calls are records like any other.
    """
    if _installed and logging.root.handlers == _installed:
        _calls.append((time.time(), path, code, seconds, trace))
        if len(_calls) == 1:
            asyncio.get_running_loop().call_later(FLUSH, _installed[0].flush)
    else:
        CALLS.info(path, extra={"call": {"code": code, "ms": round(seconds * 1000, 2), "trace": trace}})


class Text(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO sum-1 text key=value ...`."""

    def __init__(self, instance: str) -> None:
        super().__init__()
        self._instance = instance
        self._second = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={value}" for key, value in _call(record).items())
        line = f"{self.stamp(record.created)} {record.levelname} {self._instance} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def call(self, when: float, path: str, code: str, seconds: float, trace: str) -> str:
        """Return what `format` returns for the record of a call."""
        return f"{self.stamp(when)} INFO {self._instance} {path} code={code} ms={seconds * 1000:.2f} trace={trace}"

    def stamp(self, when: float) -> str:
        """Return a time, in seconds since 1970, as UTC with milliseconds."""
        second = int(when)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second)))
        return f"{self._second[1]}{int((when - second) * 1000):03d}Z"


class Json(Text):
    """The same as one JSON object per line."""

    def __init__(self, instance: str) -> None:
        super().__init__(instance)
        self._quoted = _json(instance)

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": self.stamp(record.created),
            "level": record.levelname,
            "instance": self._instance,
            "message": record.getMessage(),
            **_call(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return _json(fields)

    def call(self, when: float, path: str, code: str, seconds: float, trace: str) -> str:
        # Only the instance's id is of somebody's choosing; the rest has no character that JSON would escape.
        return (
            f'{{"time": "{self.stamp(when)}", "level": "INFO", "instance": {self._quoted}, "message": "{path}", '
            f'"code": "{code}", "ms": {seconds * 1000:.2f}, "trace": "{trace}"}}'
        )


class Stderr(logging.StreamHandler[Any]):
    """Standard error; calls that were noted before another line come before it."""

    def __init__(self, form: Text) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(form)
        self._form = form

    def handle(self, record: logging.LogRecord) -> bool:
        self.flush()
        return super().handle(record)

    def flush(self) -> None:
        """Write the lines of the calls noted until now. `logging` asks for it after each line and at exit."""
        self.acquire()
        try:
            calls = _calls.copy()
            del _calls[: len(calls)]  # and no more: others may be noted meanwhile, for this may be on any thread
            if calls and CALLS.isEnabledFor(logging.INFO):
                self.stream.write("".join([f"{self._form.call(*each)}\n" for each in calls]))
            super().flush()
        finally:
            self.release()


_installed: list[Stderr] = []
_calls: list[tuple[float, str, str, float, str]] = []


def _call(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a record tells of a call, if anything."""
    return getattr(record, "call", None) or {}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

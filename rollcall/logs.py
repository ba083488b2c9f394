"""Log lines, for people or as JSON: what happens to the instance, and one line per call. Never a message's values."""

import json
import logging
import sys
import time
from typing import Literal


def configure(form: Literal["text", "json"], level: str, instance: str) -> None:
    """Send all logs to standard error, in the given form, from `level` up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json(instance) if form == "json" else Text(instance))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Nothing here shows the thread, process or source line, and finding them out for each call would cost as much as
    # writing the line: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = logging.logAsyncioTasks = False
    logging._srcfile = None  # type: ignore[attr-defined]  # noqa: SLF001 (the switch that page names)


class Text(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO sum-1 text key=value ...`."""

    def __init__(self, instance: str) -> None:
        super().__init__()
        self._instance = instance
        self._second = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        call = getattr(record, "call", None)
        fields = "".join(f" {key}={value}" for key, value in call.items()) if call else ""
        line = f"{self.stamp(record)} {record.levelname} {self._instance} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def stamp(self, record: logging.LogRecord) -> str:
        """Return the record's time, UTC with milliseconds."""
        second = int(record.created)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        return f"{self._second[1]}.{int(record.msecs):03d}Z"


class Json(Text):
    """The same as one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": self.stamp(record),
            "level": record.levelname,
            "instance": self._instance,
            "message": record.getMessage(),
            **(getattr(record, "call", None) or {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)

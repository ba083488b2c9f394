"""What a call carries along the chain: its trace, and the time that is left for it.

The trace is W3C's traceparent, https://www.w3.org/TR/trace-context/: `00-TRACE-SPAN-FLAGS` in hexadecimal.
"""

import random
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass

TRACEPARENT = "traceparent"
_FORM = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})")
_random = random.Random()  # noqa: S311 (ids need to differ, not to be secret)


@dataclass(slots=True)
class CallContext:
    """The call that is being handled."""

    trace_id: str
    flags: str
    expires: float | None
    """When its deadline is, on `time.monotonic`'s clock; None if it has none."""

    def remaining(self) -> float | None:
        """Return the seconds left, not below 0; None without a deadline."""
        return None if self.expires is None else max(0.0, self.expires - time.monotonic())


current: ContextVar[CallContext | None] = ContextVar("rollcall_call", default=None)
"""The call being handled in this task or thread, if any."""


def new_id() -> str:
    """Return 32 hexadecimal digits that nothing else has."""
    return f"{_random.getrandbits(128):032x}"


def incoming(traceparent: str | bytes | None, expires: float | None) -> CallContext:
    """Return the context of a call that has come in; with a new trace when it brought none, or one out of form."""
    if isinstance(traceparent, str) and (found := _FORM.fullmatch(traceparent)):
        return CallContext(found[1], found[2], expires)
    return CallContext(new_id(), "01", expires)


def outgoing(call: CallContext) -> str:
    """Return the traceparent for a call that is made for the one being handled."""
    return f"00-{call.trace_id}-{_random.getrandbits(64):016x}-{call.flags}"

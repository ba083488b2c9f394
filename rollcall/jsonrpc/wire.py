"""What travels: a stream of JSON objects on one connection, one after the other, with nothing between them.

That is JSON-RPC 1.0 as Go's net/rpc/jsonrpc speaks it. No length says how long an object is and no newline has to end
it, so `Splitter` finds where each one ends, within `Limits`, before anything that recurses sees it.

https://www.jsonrpc.org/specification_v1, https://pkg.go.dev/net/rpc/jsonrpc
"""

import re
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json


@dataclass(frozen=True)
class Limits:
    """What one side puts up with from the other.

    They multiply: a server with all its connections busy may hold `connections` x `calls` x `message` bytes of
    requests, 64 GiB as they are here, and as much again of replies. Lower them where peers may go so far.
    """

    message: int = 1_048_576
    """Bytes of a request or of a reply."""
    nesting: int = 32
    """Levels of objects and arrays in a message, the message itself being the first."""
    calls: int = 64
    """Calls in flight on one connection. A server reads no further while there are so many."""
    connections: int = 1024
    """Connections to one server. One more is told so, and closed."""
    idle: float = 300.0
    """Seconds after which a server closes a connection with no call in flight, or whose peer reads no replies."""
    slow: float = 30.0
    """Seconds that a message may take to arrive, from its first byte to its last."""


LIMITS = Limits()

ELSEWHERE = "call again elsewhere"
"""How the text of an error ends that says: this call has not been run here, and will not be."""

AGAIN = "it may have run; call again"
"""How it ends that says: this call was begun here and will not be finished; make it again if it may run twice."""

_SHOWN = 200  # characters of what somebody sent that an error's text repeats


class MalformedError(ValueError):
    """What has come is not a stream of JSON objects, or is beyond the limits; nothing after it can be read."""


class Splitter:
    """Takes a stream apart into its objects.

    Each byte is looked at a bounded number of times, however the stream is cut into chunks, and nothing is kept but the
    object that has begun. Whether an object is JSON inside is for `parse` to say.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._chunk, self._at = b"", 0  # what was fed last, and where the part not yet looked at begins
        self._begun = bytearray()  # of an object that has not ended: what came before the chunk
        self._depth = 0
        self._in_string = self._escaped = False

    @property
    def amid(self) -> bool:
        """Whether an object has begun that has not ended."""
        return self._depth > 0

    def feed(self, chunk: bytes) -> None:
        """Add what has come next."""
        self._chunk = self._chunk[self._at :] + chunk
        self._at = 0

    def next(self) -> bytes | None:
        """Return the next whole object; None when more has to be fed first. Raises `MalformedError`."""
        if not self._depth:
            found = _VISIBLE.search(self._chunk, self._at)
            if not found:
                self._at = len(self._chunk)
                return None
            self._at = found.start()
            if found[0] != b"{":
                raise MalformedError("expected a JSON object, found something else")
        start = self._at
        self._at = self._end(start)
        if len(self._begun) + self._at - start > self._limits.message:
            raise MalformedError(f"expected at most {self._limits.message} bytes in a message, found more")
        if self._depth:
            self._begun += self._chunk[start:]
            return None
        message = self._chunk[start : self._at]
        if self._begun:
            message = bytes(self._begun) + message
            self._begun.clear()
        return message

    def _end(self, at: int) -> int:
        """Return where the object that is open at this place of the chunk ends, or the end of the chunk."""
        chunk = self._chunk
        while at < len(chunk):
            if self._escaped:
                self._escaped = False
                at += 1
            elif self._in_string:
                found = _STRING.match(chunk, at)
                if not found:
                    raise AssertionError("matches also nothing")
                self._in_string, self._escaped = not found[1], bool(found[2])
                at = found.end()
            else:
                found = _STRUCTURE.match(chunk, at)
                if not found:
                    break
                at = found.end()
                if found.lastindex == _OPENS:
                    self._depth += 1
                    if self._depth > self._limits.nesting:
                        raise MalformedError(f"expected at most {self._limits.nesting} levels of nesting, found more")
                elif found.lastindex == _CLOSES:
                    self._depth -= 1
                    if not self._depth:
                        return at
                else:
                    self._in_string = True
        return len(chunk)


# Possessive quantifiers never look at a byte again that they have passed, and `match`, unlike `search`, does not begin
# anew at every byte: together they keep this linear.
_VISIBLE = re.compile(rb"[^ \t\r\n]")
_STRUCTURE = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+")*+(?:(")|([{\[])|([}\]]))')
"""Up to and with the next bracket, or the quote of a string that has an escape or does not end in this chunk."""
_OPENS, _CLOSES = 2, 3
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+(?:(")|(\\))?', re.DOTALL)
"""The rest of a string: with the quote that ends it, or up to the chunk's end, where a backslash may be left alone."""


def parse(message: bytes) -> dict[str, Any]:
    """Return an object that `Splitter` has found. Raises `MalformedError`.

    Of the parsers at hand this one takes a fifth of the time of `json`'s, and answers everything that is not JSON with
    a ValueError: bad UTF-8, half of a surrogate pair, NaN, numbers of thousands of digits.
    """
    try:
        parsed: dict[str, Any] = from_json(message, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedError(f"expected JSON, found none: {error}") from None
    return parsed


def too_much(message: bytes, limits: Limits) -> str:
    """Say in which way the other side would find a message to be beyond the limits; empty when it is not."""
    if len(message) > limits.message:
        return f"{len(message)} bytes, of which {limits.message} are allowed"
    if message.count(b"[") + message.count(b"{") > limits.nesting:  # most messages have fewer brackets than levels
        splitter = Splitter(limits)
        splitter.feed(message)
        try:
            splitter.next()
        except MalformedError:
            return f"more than {limits.nesting} levels of nesting"
    return ""


def shortened(text: str) -> str:
    """Return what somebody sent, fit to be shown."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

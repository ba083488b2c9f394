"""`Exchange`: what a request brings along beside its message, and the problems that it can meet before any handler."""

import asyncio
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

from rollcall import context as contexts
from rollcall.context import CallContext

Headers = list[tuple[bytes, bytes]]

_ID = 128  # most characters of a request's id
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9, b"": 1.0, b"s": 1.0, b"ms": 1e-3}
_TIMEOUTS = {
    b"grpc-timeout": (
        re.compile(rb"([0-9]{1,8})([HMSmun])"),
        "a number of up to 8 digits and a unit, one of H, M, S, m, u and n, such as 1500m",
    ),
    b"x-request-timeout": (
        re.compile(rb"([0-9]{1,8}(?:\.[0-9]{1,9})?)(s|ms|)"),
        "seconds such as 1.5 or 1.5s, or milliseconds such as 500ms",
    ),
}
_FAR = 365 * 86_400.0  # seconds; gRPC takes a deadline centuries from now for one that is over
_READ = frozenset((b"traceparent", b"x-request-id", *_TIMEOUTS))

ELSEWHERE = "this instance is going; call again, and another will answer"


@dataclass(slots=True)
class Exchange:
    """A request or a WebSocket, as the application finds it in `scope["rollcall"]`."""

    request_id: str
    """The client's `x-request-id`, or a new one. The answer has it too."""
    context: CallContext
    """Its trace, and the deadline of its `grpc-timeout` or `x-request-timeout` header, the sooner of the two.

    grpc-timeout is a number of up to 8 digits with a unit, H, M, S, m (1/1000 s), u or n, as gRPC has it;
    x-request-timeout is in seconds, "1.5" or "1.5s", or in milliseconds, "500ms". The context is also the current one,
    so that calls made for the request carry it along. The deadline is told, and not enforced here.
    """
    leaving: asyncio.Event
    """Set when the instance takes no more requests: what never ends by itself should end now."""
    ending: asyncio.Event
    """Set when the grace is over, just before what still runs is cancelled. It then has about a second to say so."""

    def headers(self) -> Headers:
        """Return what its answer tells of it."""
        return [
            (b"traceparent", contexts.outgoing(self.context).encode()),
            (b"x-request-id", self.request_id.encode()),
        ]


def exchange(
    headers: Iterable[tuple[bytes, bytes]], leaving: asyncio.Event, ending: asyncio.Event
) -> tuple[Exchange, str]:
    """Return what a request with these headers brings along, and what is wrong with them: empty if nothing is."""
    traceparent, request_id, complaint = None, "", ""
    least: float | None = None
    for name, value in headers:
        if name not in _READ:
            continue
        if name == b"traceparent":
            traceparent = value.decode("latin-1")
        elif name == b"x-request-id":
            if len(value) <= _ID and value.isascii() and (text := value.decode()).isprintable():
                request_id = text
        else:
            form, wanted = _TIMEOUTS[name]
            if found := form.fullmatch(value):
                seconds = float(found[1]) * _UNITS[found[2]]
                least = seconds if least is None else min(least, seconds)
            else:
                shown = value[:40].decode("ascii", "backslashreplace")
                complaint = f"expected the header {name.decode()} to be {wanted}; found {shown!r}"
    expires = None if least is None else time.monotonic() + min(least, _FAR)
    context = contexts.incoming(traceparent, expires)
    if not request_id:  # a trace that begins here is as good an id as any
        request_id = contexts.new_id() if traceparent else context.trace_id
    return Exchange(request_id, context, leaving, ending), complaint


def problem(status: int, detail: str, code: str = "") -> tuple[Headers, bytes]:
    """Return the headers and the body of an answer that is a problem (RFC 9457), with the gRPC status it stands for."""
    document = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    body = json.dumps({**document, "code": code} if code else document).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"1"))
    return headers, body

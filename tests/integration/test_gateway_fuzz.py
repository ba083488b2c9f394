"""Ten thousand requests that nobody should send: the gateway answers each as HTTP wants it, or closes, and stays well.

What is sent is made from numbers: `made(7)` is always the same, to be sent again by itself when it has found something.
"""

import json
import socket
import string
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

import h11
import httpx
import psutil
import pytest

from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from tests.integration.fleet import Fleet
from tests.integration.test_gateway import PUBLIC, Gateway
from tests.waiting import eventually

REQUESTS = 10_000
WORKERS = 12
SLOW = 1  # seconds that the gateway waits for what has not been sent whole
LONGEST = 15.0  # seconds until each connection has been answered or closed
DEADLINE = 5.0  # seconds that a call gets whose client gives no deadline
ENOUGH = 32_768  # bytes of a stream that ends much later, or never
GROWTH, SLACK = 1.10, 8 << 20  # how much more memory there may be after the second half than after the first


@dataclass
class Case:
    """What is sent on a connection, and what becomes of the connection then."""

    kind: str
    data: bytes
    answers: int = 1
    """How many answers must come; where it does not `keep`, the connection may be closed instead."""
    end: str = "keep"
    """keep: the next one is sent on it, too. shut: the gateway is told that no more will be sent. drop: it is closed
    after the answer. reset: it is broken off without waiting for one; after the first bytes, where that is a stream."""
    verb: bytes = b"POST"
    seconds: float = DEADLINE
    """Its deadline."""
    frames: bool = False
    """Whether it may become a WebSocket."""
    then: bytes = b""
    """What is sent once it is one."""


class WrongError(Exception):
    """What must not happen has happened."""


# What is sent: values.

PLAIN_NUMBERS = """
0 -0 1 -1 2147483647 2147483648 -2147483649 9223372036854775808 18446744073709551616 1.0 1.5 1e3 1E400 -1e-400 1e308
0.1e1 1e-1 01 +1 .5 1. 0x10 NaN Infinity -Infinity
"""
NUMBERS = [*PLAIN_NUMBERS.split(), "9" * 400, "1" * 5000, f"1e{'9' * 30}"]
PLAIN_TEXTS = r"""
0 5 -7 1e2 NaN -Infinity WEEK_SUNDAY WEEK_NONE true 李白 \u0000 \ud800 \udfff\ud800 \ud83d\ude00 \x \ a\nb %00 MTox MTo1
../../etc/passwd {{7*7}} 1972-01-01T00:00:00Z '); -- é
"""
TEXTS = [*PLAIN_TEXTS.split(), "", "\U0001f600", "\u202e", "\t", "a b", "x" * 101, "y" * 20_000]
FIELDS = {
    "sum/Add": ("num1", "num2"),
    "person/Do": ("name", "age"),
    "greeter/Call": ("name",),
    "greeter/ServerStream": ("count",),
    "student/AddFunc": ("name", "age", "p", "score", "w", "teacher", "class", "id", "total"),
    "student/Get": ("id",),
    "student/List": ("pageSize", "page_size", "pageToken"),
    "hello/HelloWorld": (),
}
GOOD: dict[str, Callable[[Random], Any]] = {
    "num1": lambda rng: rng.randrange(-(2**31), 2**31),
    "num2": lambda rng: str(rng.randrange(-1000, 1000)),
    "name": lambda rng: "".join(rng.choices("abc李白 é", k=rng.randrange(1, 30))),
    "age": lambda rng: rng.randrange(150),
    "count": lambda rng: rng.choice((0, 1, 5, "20")),
    "p": lambda rng: {"weight": rng.randrange(1000)},
    "score": lambda rng: [rng.randrange(1000) for _ in range(rng.randrange(6))],
    "w": lambda rng: rng.choice(("WEEK_SUNDAY", 3, "WEEK_MONDAY")),
    "teacher": lambda _: "贺知章",
    "class": lambda _: None,
    "id": lambda rng: rng.choice((1, "2", 0)),
    "total": lambda _: "0",
    "pageSize": lambda rng: rng.randrange(5),
    "page_size": lambda _: None,
    "pageToken": lambda _: "",
}


def wild(rng: Random, depth: int = 0) -> str:
    """Return JSON, or nearly, of anything."""
    kind = rng.randrange(10 if depth < 4 else 7)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return f'"{rng.choice(TEXTS)}"'
    if kind == 6:
        return rng.choice(("true", "false", "null"))
    if kind == 7:
        return "[" + ",".join(wild(rng, depth + 1) for _ in range(rng.randrange(5))) + "]"
    if kind == 8 and depth == 0:
        nested = rng.choice((10, 49, 51, 99, 101, 5000))
        opened, closed = rng.choice((("[", "]"), ('{"p":', "}")))
        return opened * nested + "1" + closed * nested
    names = (rng.choice((*GOOD, "", "@type", "__proto__", "Name", "é")) for _ in range(rng.randrange(4)))
    return "{" + ",".join(f'"{name}":{wild(rng, depth + 1)}' for name in names) + "}"


def message(rng: Random, path: str) -> bytes:
    """Return a message of a method: a good one, one with something wild in it, or anything."""
    wildness = rng.choice((0.0, 0.3, 0.6))
    if rng.random() < wildness / 3:
        return wild(rng).encode()
    if path == "hello/HelloWorld":
        return json.dumps(GOOD["name"](rng)).encode()
    fields = [name for name in FIELDS.get(path, ("name",)) if rng.random() < 0.7 and (wildness or name != "id")]
    fields += rng.choices(fields, k=1) if fields and rng.random() < wildness / 4 else []  # twice
    values = (wild(rng, 1) if rng.random() < wildness else json.dumps(GOOD[name](rng)) for name in fields)
    return ("{" + ",".join(f'"{name}": {value}' for name, value in zip(fields, values, strict=True)) + "}").encode()


def mutated(rng: Random, data: bytes) -> bytes:
    """Return bytes with a few of them changed, lost, doubled, or put in."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(5):
            case 0:
                found[at : at + 1] = bytes((rng.randrange(256),))
            case 1:
                del found[at : at + rng.randrange(1, 8)]
            case 2:
                found[at:at] = rng.randbytes(rng.randrange(1, 5))
            case 3:
                found[at:at] = found[at : at + rng.randrange(1, 30)]
            case 4:
                found[at:at] = rng.choice((b"\r\n", b"\n", b"\0", b'"', b"{", b"]", b":", b" ", b"\xff\xfe", b"\r"))
    return bytes(found)


# What is sent: headers.

TIMEOUTS = {b"5S": 5.0, b"1H": 3600.0, b"99999999H": 4e11, b"0S": 0.0, b"1n": 0.0, b"20m": 0.02, b"300000u": 0.3}
NO_TIMEOUTS = [*b"S -1S 1.5S 123456789S 5s \xc2\xb2S 1S,2S 1e1S".split(), b"", b"1 S"]
SECONDS = {b"5": 5.0, b"1.5s": 1.5, b"20ms": 0.02, b"0": 0.0, b"0.000000001": 0.0, b"99999999.999999999": 1e8}
NO_SECONDS = [*b"soon -1 1h 1e3 NaN inf .5 1. 1_0 0x1 5S".split(), b"", b"9" * 99]
TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
VALUES: dict[bytes, list[bytes]] = {
    b"traceparent": [TRACE, b"", TRACE[:-1], TRACE.upper(), b"\xff" * 55, b"ff" + TRACE[2:], TRACE + b"-x", TRACE * 50],
    b"x-request-id": [b"mine", b"", b"i" * 128, b"i" * 129, b"\xc3\xa9", b"a\tb"],
    b"idempotency-key": [b"k", b"", b"k" * 1024, b"k" * 1025, b"\xe9", b"a, b", b"a\tb"],
    b"tracestate": [b"a=1", b"", b"=," * 400, b"\x80"],
    b"accept": [b"text/html", b"*/*;q=zero", b""],
    b"range": [b"bytes=9-1", b"bytes=0-0,2-3", b"bytes=-5", b"x"],
    b"content-encoding": [b"gzip", b"identity"],
    b"if-modified-since": [b"never", b"Thu, 01 Jan 2099 00:00:00 GMT"],
    b"upgrade": [b"h2c", b"websocket", b""],
}
MORE = rb"""accept-encoding: gzip, br|cookie: a=b; c|authorization: Bearer x|origin: null|expect: 100-continue
te: trailers|if-none-match: *|grpc-encoding: gzip|grpc-status: 0|!#$%&'*+-.^_`~: odd|x-forwarded-for: 1.2.3.4
forwarded: for=x|expect: x|rollcall-instance: me|grpc-trace-bin: AA==|x-http-method-override: DELETE|via: 1.1 x
keep-alive: timeout=0"""
LINES = [b"%s: %s" % (name, value) for name, values in VALUES.items() for value in values]
LINES += MORE.replace(b"\n", b"|").split(b"|")
MEDIA = [
    b"application/json",
    b"application/json; charset=latin-1",
    b"APPLICATION/JSON ;",
    b"text/plain",
    b"",
    b"a/b;;=",
]


def headers(rng: Random) -> tuple[list[bytes], float]:
    """Return lines that are right as HTTP goes, if not beyond it; and the deadline that they give."""
    lines, seconds = [b"host: localhost"], DEADLINE
    lines.append(b"content-type: " + (rng.choice(MEDIA) if rng.random() < 0.08 else MEDIA[0]))
    while rng.random() < 0.4:
        lines.append(rng.choice(LINES))
    for name, good, bad in ((b"grpc-timeout", TIMEOUTS, NO_TIMEOUTS), (b"x-request-timeout", SECONDS, NO_SECONDS)):
        while rng.random() < 0.1:
            value = rng.choice((*good, *bad))
            lines.append(name + b": " + value)
            seconds = min(seconds, good.get(value, DEADLINE))
    rng.shuffle(lines)
    return lines, seconds


def whole(start: bytes, lines: list[bytes], body: bytes = b"", chunks: Random | None = None) -> bytes:
    """Return a request, with its body as it is or in chunks."""
    if chunks:
        parts = []
        while body:
            size = chunks.randrange(1, len(body) + 1)
            parts.append(b"%x%s\r\n%s\r\n" % (size, chunks.choice((b"", b"", b";a=b")), body[:size]))
            body = body[size:]
        lines, body = [*lines, b"transfer-encoding: chunked"], b"".join((*parts, b"0\r\n\r\n"))
    elif body or start.startswith((b"POST", b"PUT", b"PATCH")):
        lines = [*lines, b"content-length: %d" % len(body)]
    return b"".join((start, b"\r\n", *(line + b"\r\n" for line in lines), b"\r\n", body))


def proper(rng: Random, body: bytes | None = None, kind: str = "proper") -> Case:
    """Return a request that is right as HTTP goes, to one of the methods."""
    path = rng.choice(tuple(FIELDS))
    lines, seconds = headers(rng)
    body = message(rng, path) if body is None else body
    start = b"POST /v1/%s HTTP/1.1" % path.encode()
    return Case(kind, whole(start, lines, body, rng if rng.random() < 0.2 else None), seconds=seconds)


# What is sent: requests.


def mutated_json(rng: Random) -> Case:
    return proper(rng, mutated(rng, message(rng, rng.choice(tuple(FIELDS)))), "mutated JSON")


def no_json(rng: Random) -> Case:
    return proper(rng, rng.randbytes(rng.choice((0, 1, 10, 300, 5000))), "no JSON")


PLAIN_PLACES = rb"""
/ /docs /openapi.json /live /livez /metrics /page/ /page/page.js /swagger/ /v1 /v1/ /v1/sum /v1/sum/Add /v1/sum/Add/
* /;/ /v1/sum/add /v1/greeter/BidiStream /v1/sum/sum.v1.SumService.Add /page/..%2f..%2fapp.py /page/../app.py
/swagger/%00 /\..\ /v1/%00/%ff //v1//sum /v1/sum/Add?a=b&c /v1/sum/Add%3F /v1/%e6%9d%8e/%F0%9F%98%80
/v1/sum/%zz /v1/sum/% /%2e%2e/%2e%2e /v1/sum/Add#f http://elsewhere.example/v1/sum/Add /v1/sum/Add%0d%0ax:y
"""
PLACES = [*PLAIN_PLACES.split(), b"/page/" + b"a" * 300]
VERBS = b"GET HEAD OPTIONS PUT DELETE PATCH TRACE PROPFIND POST SEARCH".split()


def other_verb(rng: Random) -> Case:
    verb, place = rng.choice(VERBS), rng.choice(PLACES)
    lines, seconds = headers(rng)
    body = b"{}" if verb in (b"PUT", b"PATCH", b"POST") else b""
    # What the parser takes for no path is the end of the connection.
    return Case("other verb", whole(verb + b" " + place + b" HTTP/1.1", lines, body), 1, "drop", verb, seconds)


def other_path(rng: Random) -> Case:
    letters = string.ascii_letters + string.digits + "/.%;=&?-_~:@!$'()*+,"
    path = b"/v1/" + "".join(rng.choices(letters, k=rng.choice((3, 20, 200, 3000)))).encode()
    if rng.random() < 0.3:
        path = mutated(rng, rng.choice(PLACES))
    return Case("other path", whole(b"GET " + path + b" HTTP/1.1", [b"host: localhost"]), 1, "drop", b"GET")


STARTS = (
    b"GET /livez HTTP/1.0|POST /v1/sum/Add HTTP/1.0|GET / HTTP/2.0|GET / HTTP/0.9|GET /|GET||PRI * HTTP/2.0|"
    b"get / HTTP/1.1|CONNECT a.example:443 HTTP/1.1|FETCH / HTTP/1.1|GET / HTTP/1.1 x|GET  / HTTP/1.1|"
    b"GET\t/ HTTP/1.1| GET / HTTP/1.1|\r\n\r\nGET /livez HTTP/1.1|GET http:// HTTP/1.1|OPTIONS * HTTP/1.1|"
    b"GET / ICE/1.0|GET / HTTP/1.1\n|"
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
).split(b"|")


def other_protocol(rng: Random) -> Case:
    start = rng.choice(STARTS)
    hosts: tuple[list[bytes], ...] = (
        [b"host: localhost"],
        [b"host: elsewhere.example"],
        [],
        [b"host: a", b"host: b"],
        [b"host: \xff"],
        [b"host:"],
        [b"connection: close"],
    )
    verb = b"CONNECT" if start.startswith(b"CONNECT") else b"GET"
    data = whole(start, rng.choice(hosts), b"{}" if b"POST" in start else b"")
    return Case("other protocol", data, 1, "drop", verb)


PLAIN_ODD = b"\xff\xfe: x|a b: c|: empty|nothing|x : y|x: a\0b|x: a\rb| folded|x:y\r\n folded: z|(x): y"
ODD: list[list[bytes]] = [
    *([line] for line in PLAIN_ODD.split(b"|")),
    *([[b"x: " + b"y" * 70_000], [b"y" * 9000 + b": z"], [b"a: b"] * 3000, [b"x-request-id: a"] * 50, [TRACE]]),
    *([b"idempotency-key: " + b"k" * 1000] * times for times in (2, 9, 20, 40)),
    *([[b"tracestate: " + b"t" * 1000] * 30, [b"grpc-timeout: 1S"] * 20, [b"content-type: text/x"] * 2]),
]


def odd_headers(rng: Random) -> Case:
    """Return a request with headers that HTTP does not allow, or not so many or so large ones."""
    lines, _ = headers(rng)
    for line in rng.choice(ODD):
        lines.insert(rng.randrange(len(lines) + 1), line)
    path = rng.choice((b"sum/Add", b"greeter/Call", b"student/AddFunc"))
    return Case("odd headers", whole(b"POST /v1/" + path + b" HTTP/1.1", lines, b"{}"), 1, "drop", seconds=0)


PLAIN_CHUNKS = (
    b"0\r\n\r\n|-1\r\n|zz\r\n{}\r\n|5\r\n{}\r\n0\r\n\r\n|2\r\n{}0\r\n\r\n|1\r\n{}\r\n0\r\n\r\n|2\n{}\n0\n\n|2\r\n{}\r\n0|"
    b"2\r\n{}\r\n0\r\nx: y\r\n\r\n|ffffffffffffffffffff\r\n"
)
LARGE_CHUNKS = [b"2;" + b"x" * 5000 + b"\r\n{}\r\n0\r\n\r\n", b"2\r\n{}\r\n0\r\n" + b"t: x\r\n" * 3000 + b"\r\n"]
CHUNKS = [*PLAIN_CHUNKS.split(b"|"), *LARGE_CHUNKS]
ENCODINGS = b"chunked|chunked, chunked|gzip|gzip, chunked|Chunked|identity|\x0bchunked||chunked;q=1".split(b"|")
LENGTHS = b"-1|+2|0x2|2,2||two|2 2|1e1|\xb2".split(b"|")


def odd_framing(rng: Random) -> Case:
    """Return a request that lies about its body's length."""
    body = message(rng, "sum/Add")
    size = len(body)
    lies = rng.choice(
        (
            [b"content-length: %d" % (size + rng.choice((1, 5, 10**6, 10**18, 10**30)))],
            [b"content-length: %d" % rng.randrange(max(1, size))],
            [b"content-length: " + rng.choice(LENGTHS)],
            [b"content-length: %d" % size, b"content-length: %d" % (size + rng.randrange(2))],
            [b"content-length: %d" % size, b"transfer-encoding: chunked"],
            [b"transfer-encoding: " + rng.choice(ENCODINGS)],
            [b"transfer-encoding: chunked", b"transfer-encoding: chunked"],
            [b"transfer-encoding : chunked"],
        )
    )
    if any(b"chunked" in line for line in lies) and rng.random() < 0.8:
        body = rng.choice([*CHUNKS, b"%x\r\n%s\r\n0\r\n\r\n" % (size, body)])
    lines = [b"POST /v1/sum/Add HTTP/1.1", b"host: localhost", b"content-type: application/json", *lies, b"", body]
    return Case("odd framing", b"\r\n".join(lines), 1, rng.choice(("drop", "shut", "shut", "reset")))


def mutated_request(rng: Random) -> Case:
    case = proper(rng)
    data = mutated(rng, case.data[: case.data.find(b"\r\n\r\n")]) + case.data[case.data.find(b"\r\n\r\n") :]
    seconds = 0 if b"timeout" in data else DEADLINE
    return Case("mutated request", data, 1, rng.choice(("drop", "shut", "shut")), seconds=seconds)


def half(rng: Random) -> Case:
    case = proper(rng)
    data = case.data[: rng.randrange(len(case.data))]
    end = rng.choice(("shut", "shut", "shut", "reset", "reset", "drop"))
    return Case("half", data, 1, end, seconds=case.seconds)


def pipelined(rng: Random) -> Case:
    cases = [proper(rng) for _ in range(rng.randrange(2, 6))]
    seconds = min(case.seconds for case in cases)
    data = b"".join(case.data for case in cases)
    # One that has been refused before its body was read may be the last that the gateway answers.
    return Case("pipelined", data, len(cases), rng.choice(("drop", "drop", "shut", "reset")), seconds=seconds)


def large(rng: Random) -> Case:
    body = b'"' + b"x" * rng.choice((100_000, 1_048_574, 1_048_575, 1_300_000)) + b'"'
    if rng.random() < 0.3:
        path = b"/" + rng.choice((b"a", b"%41", b"/")) * rng.choice((8000, 40_000, 70_000))
        return Case("large", whole(b"GET " + path + b" HTTP/1.1", [b"host: localhost"]), 1, "drop", b"GET")
    case = proper(rng, body, "large")
    case.end = "drop"
    return case


def stream(rng: Random) -> Case:
    """Return a request for a stream that is left after the first bytes of it."""
    if rng.random() < 0.3:
        return Case("stream", whole(b"GET /live HTTP/1.1", [b"host: localhost"]), 1, "reset", b"GET")
    body = b'{"count": %d}' % rng.choice((1, 100, 10_000_000))
    lines = [b"host: localhost", b"content-type: application/json"]
    data = whole(b"POST /v1/greeter/ServerStream HTTP/1.1", lines, body)
    return Case("stream", data, 1, rng.choice(("drop", "reset")))


HANDSHAKE = [b"host: localhost", b"connection: Upgrade", b"upgrade: websocket", b"sec-websocket-version: 13"]
KEY = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="


def handshake(rng: Random) -> Case:
    """Return an attempt at a WebSocket that is none."""
    lines = [*HANDSHAKE, KEY]
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(lines))
        lines[at : at + 1] = rng.choice(([], [lines[at]] * 2, [mutated(rng, lines[at]).replace(b"\n", b"")]))
    lines += rng.choices((b"origin: http://evil.example", b"sec-websocket-extensions: permessage-deflate", *LINES), k=2)
    path = rng.choice((b"greeter/BidiStream", b"greeter/ClientStream", b"sum/Add", b"sum/Nothing", b"%00/x"))
    data = whole(b"GET /v1/" + path + b" HTTP/1.1", lines)
    return Case(
        "handshake", data + rng.choice((b"", b"\x81\x80abcd", rng.randbytes(20))), 1, "shut", b"GET", frames=True
    )


def frame(rng: Random, payload: bytes, first: int = 0x81) -> bytes:
    mask = rng.randbytes(4)
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else struct.pack("!BH", 0xFE, size) if size < 65_536 else b""
    length = length or struct.pack("!BQ", 0xFF, size)
    masked = bytes(each ^ mask[at % 4] for at, each in enumerate(payload))
    return bytes((first,)) + length + mask + masked


def frames(rng: Random) -> Case:
    """Return a WebSocket with messages of all kinds, and broken ones."""
    sent = []
    for _ in range(rng.randrange(8)):
        good = b'{"stroke": %d}' % rng.randrange(1000)
        match rng.randrange(6):
            case 0 | 1 | 2:
                sent.append(frame(rng, good))
            case 3:
                sent.append(frame(rng, rng.choice((wild(rng).encode(), rng.randbytes(30), mutated(rng, good)))))
            case 4:
                sent.append(frame(rng, rng.randbytes(rng.choice((0, 1, 2, 125, 126, 300))), rng.randrange(256)))
            case 5:
                sent.append(mutated(rng, frame(rng, good)))
    sent.append(rng.choice((frame(rng, b""), frame(rng, b"\x03\xe8bye", 0x88), b"")))
    path = rng.choice((b"greeter/BidiStream", b"greeter/ClientStream"))
    data = whole(b"GET /v1/" + path + b" HTTP/1.1", [*HANDSHAKE, KEY])
    return Case("frames", data, 1, rng.choice(("shut", "shut", "drop")), b"GET", frames=True, then=b"".join(sent))


def conversation(rng: Random) -> Case:
    """Return a WebSocket that the gateway ends, having been told that there are no more messages, or of a bad one."""
    good = (frame(rng, b'{"stroke": %d}' % rng.randrange(1000)) for _ in range(rng.randrange(10)))
    last = rng.choice((b"", b"", b"{", b'{"stroke": []}', wild(rng).encode()))
    path = rng.choice((b"greeter/BidiStream", b"greeter/ClientStream"))
    data = whole(b"GET /v1/" + path + b" HTTP/1.1", [*HANDSHAKE, KEY])
    then = b"".join(good) + frame(rng, last) + frame(rng, b"")
    return Case("conversation", data, 1, "drop", b"GET", frames=True, then=then)


KINDS: dict[Callable[[Random], Case], int] = {
    proper: 400,
    mutated_json: 170,
    no_json: 40,
    other_verb: 60,
    other_path: 50,
    other_protocol: 30,
    odd_headers: 40,
    odd_framing: 40,
    mutated_request: 60,
    half: 40,
    pipelined: 30,
    large: 3,
    stream: 20,
    handshake: 15,
    frames: 20,
    conversation: 15,
}


def made(number: int) -> Case:
    rng = Random(f"rollcall {number}")  # noqa: S311 (it is to be the same each time)
    case = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0](rng)
    if not case.data.strip():  # after an answer there may be any number of blank lines, for as long as one likes
        case.end = "shut"
    return case


# How it is sent, and what comes back.


class Answer:
    """What comes back, as far as it has come."""

    def __init__(self, verb: bytes) -> None:
        self.status, self.headers, self.body = 0, dict[bytes, bytes](), b""
        self.whole = False
        self.rest = b""
        """What has come after it."""
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        may_be = [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]  # or else it would take 101 for wrong
        verb = verb if verb in (b"HEAD", b"CONNECT") else b"GET"
        self._parser.send(h11.Request(method=verb, target=b"/", headers=[(b"host", b"localhost"), *may_be]))
        self._parser.send(h11.EndOfMessage())

    @property
    def media_type(self) -> bytes:
        return self.headers.get(b"content-type", b"")

    @property
    def kept(self) -> bool:
        """Whether another request may be sent on the connection."""
        return self.whole and b"close" not in self.headers.get(b"connection", b"").lower()

    def take(self, data: bytes) -> bool:
        """Take what has come, empty for the end; say whether it is whole now. Raises `h11.RemoteProtocolError`."""
        self._parser.receive_data(data)
        while not self.whole and (event := self._parser.next_event()) is not h11.NEED_DATA:
            match event:
                case h11.Response() | h11.InformationalResponse(status_code=101):
                    self.status, self.headers = event.status_code, dict(event.headers)
                    self.whole = self.status == 101
                case h11.Data():
                    self.body += event.data
                case h11.EndOfMessage():
                    self.whole = True
        self.rest = self._parser.trailing_data[0] if self.whole else b""
        return self.whole


class Client:
    """One connection after the other."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._address = host, int(port)
        self._socket: socket.socket | None = None
        self._begun = 0.0

    def send(self, case: Case) -> list[Answer]:
        """Send a case and return what came back. Raises `WrongError` when something came that must not, or nothing."""
        self._begun = time.monotonic()
        connection = self._socket or socket.create_connection(self._address, LONGEST)
        self._socket = None
        connection.settimeout(LONGEST)
        try:
            answers = list(self._exchange(connection, case))
        except TimeoutError:
            raise WrongError(f"neither an answer nor the end within {LONGEST:g} s") from None
        finally:
            if self._socket is None:
                if case.end == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
        return answers

    def close(self) -> None:
        if self._socket:
            self._socket.close()

    def _exchange(self, connection: socket.socket, case: Case) -> Iterator[Answer]:
        with suppress(ConnectionError):  # it may have been answered, and closed, before all was sent
            connection.sendall(case.data)
            if case.end == "shut" and not case.then:
                connection.shutdown(socket.SHUT_WR)
        if case.end == "reset" and case.kind != "stream":
            return
        rest, left = b"", case.answers
        while answer := self._answer(connection, case, rest):
            check(answer, case, time.monotonic() - self._begun)
            yield answer
            rest, left = answer.rest, left - 1
            if answer.status == 101:
                self._converse(connection, case, rest)
                return
            if not answer.kept or (left <= 0 and case.end != "shut"):
                if answer.kept and case.end == "keep":
                    if rest:
                        raise WrongError(f"more than was asked for: {rest!r}")
                    self._socket = connection
                return
        if case.end == "keep":
            raise WrongError("closed without an answer")

    def _receive(self, connection: socket.socket) -> bytes:
        """Return what comes next, empty at the end. The whole exchange has `LONGEST` seconds."""
        connection.settimeout(max(0.001, self._begun + LONGEST - time.monotonic()))
        try:
            return connection.recv(65_536)
        except ConnectionError:  # it was closed without having read all that was sent
            return b""

    def _answer(self, connection: socket.socket, case: Case, rest: bytes) -> Answer | None:
        """Return the next answer, None if the connection is closed instead."""
        data = rest or self._receive(connection)
        if not data:
            return None
        answer = Answer(case.verb)
        try:
            while not answer.take(data):
                enough = 0 if case.kind == "stream" or case.verb == b"GET" else ENOUGH
                if answer.media_type.startswith(b"text/event-stream") and len(answer.body) > enough:
                    break
                data = self._receive(connection)
        except h11.RemoteProtocolError as error:
            if case.end == "shut" and not data:
                return None  # the client has gone before it was whole, as far as the gateway knows
            raise WrongError(f"{error}: {answer.status} {answer.headers} {answer.body[:200]!r}") from None
        return answer

    def _converse(self, connection: socket.socket, case: Case, data: bytes) -> None:
        """Go on by WebSocket. What comes must be a server's frames, and then the end."""
        with suppress(ConnectionError):
            connection.sendall(case.then)
            if case.end == "shut":
                connection.shutdown(socket.SHUT_WR)
        if case.kind == "frames" and case.end == "drop":
            return
        opcodes: list[int] = []
        ended = False
        while True:
            while found := one_frame(data):
                opcode, payload, data = found
                opcodes.append(opcode)
                if opcode == 1 and not json.loads(payload).keys() <= {"result", "end", "error"}:
                    raise WrongError(f"expected a result, the end or an error, found {payload!r}")
            if 8 in opcodes and not ended:
                ended = True
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            more = self._receive(connection)
            if not more:
                break
            data += more
        if case.kind == "conversation" and 8 not in opcodes:
            raise WrongError("the WebSocket has ended without being closed")


def one_frame(data: bytes) -> tuple[int, bytes, bytes] | None:
    """Return the opcode and payload of the first frame, and what is after it; None while it is not whole."""
    if len(data) < 2:
        return None
    opcode, size, at = data[0] & 15, data[1], 2
    if data[0] & 0x70 or opcode not in (0, 1, 2, 8, 9, 10) or size > 127:
        raise WrongError(f"expected a server's frame, found {data[:40]!r}")
    if size > 125:
        at = 4 if size == 126 else 10
        size = int.from_bytes(data[2:at])
    return (opcode, data[at : at + size], data[at + size :]) if len(data) >= at + size else None


def check(answer: Answer, case: Case, seconds: float) -> None:
    """See that an answer is one that may be given."""
    status, media_type = answer.status, answer.media_type
    if status == 504 and seconds < case.seconds:
        raise WrongError(f"504 after {seconds:.3f} s, with a deadline of {case.seconds:g} s")
    if status >= 500 and status != 504:
        raise WrongError(f"{status} {answer.body[:500]!r}")
    if status >= 400 and case.verb != b"HEAD":
        if case.frames and status in (400, 426) and media_type.startswith(b"text/plain"):
            return  # it is the WebSocket's protocol that refuses a handshake out of form
        if media_type != b"application/problem+json":
            raise WrongError(f"expected a problem, found {status} {answer.headers} {answer.body[:200]!r}")
        found = json.loads(answer.body)
        if not (found["status"] == status and found["title"] and found["detail"] and found["type"] == "about:blank"):
            raise WrongError(f"expected a problem of status {status}, found {found}")
        for each in found.get("violations", ()):
            if not isinstance(each["field"], str) or not each["description"]:
                raise WrongError(f"expected what is violated and how, found {each}")
    if status == 200 and answer.whole and media_type == b"application/json" and case.verb != b"HEAD":
        json.loads(answer.body)


class Fuzz:
    """Sends cases from several threads."""

    def __init__(self, address: str) -> None:
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0
        self._address = address
        self._lock = threading.Lock()

    def run(self, numbers: range) -> None:
        left = iter(numbers)
        threads = [threading.Thread(target=self._work, args=(left,)) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, left: Iterator[int]) -> None:
        client = Client(self._address)
        while len(self.wrong) < 10:
            with self._lock:
                number = next(left, None)
            if number is None:
                break
            case = made(number)
            begun = time.monotonic()
            try:
                answers = client.send(case)
            except Exception as error:  # noqa: BLE001 (whatever it is, it is told with what was sent)
                text = f"made({number}), {case.kind}, {case.end}: {type(error).__name__}: {error}"
                text += f"\n    {case.data[:1500]!r} {case.then[:200]!r}"
                self.wrong.append(text)
                continue
            took = time.monotonic() - begun
            with self._lock:
                self.slowest = max(self.slowest, took)
                self.statuses.update((case.kind, answer.status) for answer in answers or ())
                if not answers:
                    self.statuses[case.kind, 0] += 1
        client.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, module_cluster: Cluster, guard: Guard) -> Iterator[Gateway]:
    fleet = Fleet(tmp_path_factory.mktemp("fuzz"), module_cluster, guard)
    try:
        for instance in ("sum-1", "greeter-1", "hello-1", "person-1"):
            fleet.start(instance, *PUBLIC)
        fleet.start("student-1", *PUBLIC, "--database", f"sqlite:///{fleet.run}/student.db")
        fleet.start("gateway-1", "--slow", str(SLOW))
        gateway = Gateway(fleet, "gateway-1")
        gateway.knows("sum/Add", "greeter/Call", "hello/HelloWorld", "person/Do", "student/Get")
        yield gateway
    finally:
        fleet.close()


def in_flight(gateway: Gateway) -> float:
    """Return how many requests the gateway has in flight, as it tells Prometheus."""
    (instance,) = gateway.fleet.registry.instances("gateway")
    told = httpx.get(f"http://{instance.address}:{instance.meta['http_port']}/metrics").text
    lines = [line for line in told.splitlines() if line.startswith("http_server_in_flight{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def rests(gateway: Gateway) -> int:
    """Wait until nothing is in flight; return the bytes of memory that the gateway has then."""
    eventually("nothing is in flight", lambda: in_flight(gateway) == 0, LONGEST)
    memory: int = psutil.Process(gateway.fleet.process(gateway.instance).pid).memory_info().rss
    return memory


@pytest.mark.timeout(400)
def test_whatever_comes_it_stays_well(gateway: Gateway, report: list[str]) -> None:
    fuzz = Fuzz(gateway.address)
    begun, memory = time.monotonic(), list[int]()
    for numbers in (range(REQUESTS // 2), range(REQUESTS // 2, REQUESTS)):
        fuzz.run(numbers)
        assert not fuzz.wrong, "\n".join(fuzz.wrong)
        memory.append(rests(gateway))
    took = time.monotonic() - begun
    statuses: Counter[int] = Counter()  # 0 where there was no answer
    for (_, status), count in fuzz.statuses.items():
        statuses[status] += count
    print({f"{kind} {status}": count for (kind, status), count in sorted(fuzz.statuses.items())})
    report += [
        f"{REQUESTS:,} requests in {took:.0f} s, the slowest {fuzz.slowest:.1f} s",
        f"statuses {dict(sorted(statuses.items()))}",
        f"{memory[0] >> 20} MB after the first half, {memory[1] >> 20} MB after the second",
    ]
    again = time.monotonic()
    assert gateway.post("sum/Add", {"num1": 333, "num2": 666}).json() == {"res": "999"}
    assert time.monotonic() - again < 2
    log = gateway.fleet.log(gateway.instance)
    assert "Traceback" not in log
    assert " ERROR " not in log
    assert gateway.instance in gateway.fleet.passing("gateway")
    assert memory[1] <= memory[0] * GROWTH + SLACK
    # It was no walk-over: each kind was sent, and most of what can be answered was.
    assert len({kind for kind, _ in fuzz.statuses}) == len(KINDS)
    assert statuses.keys() >= {101, 200, 307, 400, 404, 405, 408, 413, 415, 421, 426, 431, 504}

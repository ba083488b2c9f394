"""The stream of objects without framing: taken apart rightly, within the limits, in linear time."""

import json
import random
import time
from typing import Any

import pytest

from rollcall.jsonrpc.wire import Limits, MalformedError, Splitter, parse, too_much

LIMITS = Limits(message=1000, nesting=4)


def split(stream: bytes, cut: int, limits: Limits = LIMITS) -> list[bytes]:
    """Feed a stream in chunks of this many bytes; return the objects found."""
    splitter, found = Splitter(limits), []
    for at in range(0, len(stream), cut):
        splitter.feed(stream[at : at + cut])
        while (message := splitter.next()) is not None:
            found.append(message)
    assert not splitter.amid or not stream.endswith(b"}")
    return found


OBJECTS: list[dict[str, Any]] = [
    {},
    {"method": "hello.HelloWorld", "params": ["李白"], "id": 0},
    {"a": '"', "b": "\\", "c": '\\"', "d": "}{][", "": "\\\\"},
    {"a": [{"b": [1, 2]}, []], "c": {}},
    {"long": "x" * 900},
]


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("between", ["", "\n", " \r\n\t "])
def test_a_stream_is_taken_apart(cut: int, between: str) -> None:
    texts = [json.dumps(each) for each in OBJECTS] + [json.dumps(OBJECTS[1], ensure_ascii=False)]
    stream = (between + between.join(texts) + between).encode()
    assert [message.decode() for message in split(stream, cut)] == texts


def test_cut_anywhere_it_is_the_same() -> None:
    stream = "".join(json.dumps(each) for each in OBJECTS * 3).encode()
    whole = split(stream, len(stream))
    chance = random.Random(4)  # noqa: S311
    for _ in range(200):
        splitter, found, at = Splitter(LIMITS), [], 0
        while at < len(stream):
            step = chance.choice((1, 2, 5, 50, 500))
            splitter.feed(stream[at : at + step])
            at += step
            if chance.random() < 0.5:  # what has been fed may also be taken later
                while (message := splitter.next()) is not None:
                    found.append(message)
        while (message := splitter.next()) is not None:
            found.append(message)
        assert found == whole


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"x", "expected a JSON object"),
        (b"[1]", "expected a JSON object"),
        (b'{} "a"', "expected a JSON object"),
        (b"}", "expected a JSON object"),
        (b'{"a":[[[[1]]]]}', "expected at most 4 levels of nesting"),
        (b"{" * 1_000_000, "expected at most 4 levels of nesting"),
        (b'{"a":"' + b"x" * 1000 + b'"}', "expected at most 1000 bytes"),
        (b'{"a":"' + b"x" * 5000, "expected at most 1000 bytes"),
        (b'{"a":' + b"1" * 5000, "expected at most 1000 bytes"),
    ],
)
@pytest.mark.parametrize("cut", [1, 100, 10_000_000])
def test_what_is_beyond_the_limits_is_refused(stream: bytes, says: str, cut: int) -> None:
    with pytest.raises(MalformedError) as caught:
        split(stream, cut)
    assert says in str(caught.value)


def test_at_the_limits_it_is_not() -> None:
    stream = b'{"a":"' + b"x" * 992 + b'"}'
    assert split(stream, 10) == [stream]
    assert split(b'{"a":[[[1]]]}', 1) == [b'{"a":[[[1]]]}']


@pytest.mark.parametrize(
    "stream",
    [
        b"{}" * 100_000,
        b'{"a":"' + b"\\n" * 100_000 + b'"}',
        b'{"a":' + b"1" * 200_000 + b"}",
        b'{"a":[' + b'"",' * 65_000 + b'""]}',
        b" " * 200_000,
    ],
    ids=["objects", "escapes", "digits", "strings", "spaces"],
)
@pytest.mark.parametrize("cut", [1, 10_000, 1_000_000])
def test_the_time_it_takes_is_linear(stream: bytes, cut: int) -> None:
    """200 kB; a second look at all that came before would take minutes, byte by byte."""
    begun = time.process_time()
    split(stream, cut, Limits())
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "message",
    [
        b"{]",
        b"{1:2}",
        b'{"a":01}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\n"}',
        b'{"a":' + b"1" * 5000 + b"}",
        b"{,}",
        b'{"a":1,}',
        b"{}{}",
    ],
)
def test_what_is_not_json_is_refused(message: bytes) -> None:
    with pytest.raises(MalformedError, match=r"^expected JSON, found none: "):
        parse(message)


def test_what_is_too_much_for_the_other_side() -> None:
    assert not too_much(b'{"a":"[[[[[[[["}', LIMITS)
    assert not too_much(b"{[[[]]][[[]]]}", LIMITS)
    assert too_much(b"{[[[[]]]]}", LIMITS) == "more than 4 levels of nesting"
    assert too_much(b" " * 1001, LIMITS) == "1001 bytes, of which 1000 are allowed"

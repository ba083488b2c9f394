"""The trace as https://www.w3.org/TR/trace-context/ has it, and the time that is left."""

import re
import time

import pytest

from rollcall import context

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"
NEW = re.compile(r"[0-9a-f]{32}")


def test_a_trace_that_comes_in_goes_on() -> None:
    for flags in ("00", "01"):
        call = context.incoming(f"00-{TRACE}-{SPAN}-{flags}", None)
        assert (call.trace_id, call.flags) == (TRACE, flags)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "",
        "nonsense",
        GOOD.upper(),
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-0g",
        f"{GOOD}-more",  # version 00 has nothing after the flags
        f" {GOOD}",
        f"{GOOD}\n",
        GOOD.encode(),
    ],
)
def test_one_out_of_form_is_as_none_and_begins_a_new_trace(bad: str | bytes | None) -> None:
    one, other = context.incoming(bad, None), context.incoming(bad, None)
    assert NEW.fullmatch(one.trace_id)
    assert TRACE not in (one.trace_id, other.trace_id)
    assert one.trace_id != other.trace_id


def test_what_goes_out_is_of_the_call_being_handled_with_a_span_of_its_own() -> None:
    call = context.incoming(f"00-{TRACE}-{SPAN}-00", None)
    one, other = context.outgoing(call), context.outgoing(call)
    assert one != other
    for each in (one, other):
        version, trace, span, flags = each.split("-")
        assert (version, trace, flags) == ("00", TRACE, "00")
        assert span != SPAN


def test_the_time_that_is_left() -> None:
    assert context.incoming(GOOD, None).remaining() is None
    left = context.incoming(GOOD, time.monotonic() + 10).remaining()
    assert left is not None
    assert 9 < left <= 10
    assert context.incoming(GOOD, time.monotonic() - 1).remaining() == 0.0

"""A caller connects to a bounded, stable share of the instances; all callers together to all of them evenly."""

from collections import Counter

import pytest

from rollcall.discovery.subset import subset
from rollcall.registry import Instance

INSTANCES = [Instance(id=f"sum-{n:03}", name="sum", address="127.0.0.1", port=n + 1) for n in range(100)]


def test_all_of_them_where_there_are_no_more() -> None:
    assert subset(INSTANCES[:5], "me", 5) == tuple(INSTANCES[:5])
    assert subset([], "me", 5) == ()


def test_bounded_ordered_and_the_same_each_time() -> None:
    chosen = subset(INSTANCES, "me", 10)
    assert len(set(chosen)) == 10
    assert list(chosen) == sorted(chosen, key=lambda instance: instance.id)
    assert subset(INSTANCES[::-1], "me", 10) == chosen


@pytest.mark.parametrize("caller", ["me", "you", "點"])
def test_one_that_comes_or_goes_changes_at_most_one_choice(caller: str) -> None:
    before = set(subset(INSTANCES, caller, 10))
    for gone in INSTANCES:
        after = set(subset([each for each in INSTANCES if each is not gone], caller, 10))
        assert len(after) == 10
        assert len(before - after) == (1 if gone in before else 0)


def test_callers_spread_over_the_instances() -> None:
    callers, size = 500, 10
    chosen = Counter(each.id for caller in range(callers) for each in subset(INSTANCES, f"caller-{caller}", size))
    mean = callers * size / len(INSTANCES)
    assert len(chosen) == len(INSTANCES)
    assert 0.5 * mean < min(chosen.values())
    assert max(chosen.values()) < 1.6 * mean

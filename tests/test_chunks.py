"""Splitting lengths into buckets, against trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from staticvl.runtime.engine.chunks import ChunkPlanner

LONGEST = 24
# Whole and half milliseconds: sums are exact, so that costs compare with ==.
HALVES = st.integers(1, 40).map(lambda n: n / 2)
COSTS = st.dictionaries(st.integers(1, 12), HALVES, min_size=1, max_size=4)
FEW = st.dictionaries(st.integers(3, 12), HALVES, min_size=1, max_size=3)  # so few that all covers can be tried
# Larger buckets cost more: what machines measure, up to noise.
RISING = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=4).map(
    lambda pairs: {bucket: cost / 2 + bucket for bucket, cost in pairs}
)


def covers(costs: dict[int, float], length: int) -> Iterator[tuple[int, ...]]:
    """Every multiset of buckets that covers the length and of which no bucket could be left out."""
    for count in range(1, length // min(costs) + 2):
        for buckets in itertools.combinations_with_replacement(sorted(costs), count):
            if sum(buckets) >= length > sum(buckets) - buckets[0]:
                yield buckets


def cost_of(costs: dict[int, float], buckets: list[int] | tuple[int, ...]) -> float:
    return sum(costs[bucket] for bucket in buckets)


def prefill(planner: ChunkPlanner, length: int, rows: int) -> list[int]:
    """The buckets that a prompt runs through, planned anew before each of them as the scheduler does."""
    taken: list[int] = []
    done = 0
    while done < length:
        bucket = planner.next_bucket(length - done, rows - done)
        assert done + bucket <= rows
        taken.append(bucket)
        done += bucket
    return taken


@given(costs=FEW, length=st.integers(1, LONGEST))
def test_split_costs_the_least(costs: dict[int, float], length: int) -> None:
    split = ChunkPlanner(costs).split(length)
    assert sum(split) >= length
    assert split == sorted(split, reverse=True)
    assert cost_of(costs, split) == min(cost_of(costs, buckets) for buckets in covers(costs, length))


@given(costs=FEW, length=st.integers(1, LONGEST))
def test_tight_split_costs_the_least_of_those_that_pad_little(costs: dict[int, float], length: int) -> None:
    split = ChunkPlanner(costs).split(length, tight=True)
    little = [b for b in covers(costs, length) if sum(b) - length < min(costs)]
    assert 0 <= sum(split) - length < min(costs)
    assert cost_of(costs, split) == min(cost_of(costs, buckets) for buckets in little)


@given(costs=COSTS, lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_earlier_questions_do_not_matter(costs: dict[int, float], lengths: list[int]) -> None:
    """Plans are grown on demand; growing them in another order gives the same."""
    planner = ChunkPlanner(costs)
    for length in lengths:
        assert planner.split(length) == ChunkPlanner(costs).split(length)
        assert planner.split(length, tight=True) == ChunkPlanner(costs).split(length, tight=True)


@given(costs=COSTS, context=st.integers(1, 60), data=st.data())
def test_every_prompt_up_to_the_context_fits(costs: dict[int, float], context: int, data: st.DataObject) -> None:
    """Rows are context plus the smallest bucket: no prompt, whole or after earlier tokens, writes past them."""
    planner, rows = ChunkPlanner(costs), context + min(costs)
    past = data.draw(st.integers(0, context - 1))
    length = data.draw(st.integers(1, context - past))
    taken = prefill(planner, length, rows - past)
    assert sum(taken) >= length > sum(taken[:-1])


@given(costs=RISING, length=st.integers(1, 60))
def test_planning_anew_costs_the_same(costs: dict[int, float], length: int) -> None:
    planner = ChunkPlanner(costs)
    assert cost_of(costs, prefill(planner, length, 1000)) == cost_of(costs, planner.split(length))


def test_by_hand() -> None:
    planner = ChunkPlanner({16: 1.0, 64: 2.0, 256: 5.0})
    assert planner.split(1) == [16]
    assert planner.split(33) == [64]  # as three of 16 would cost 3
    assert planner.split(80) == [64, 16]
    assert planner.split(120) == [64, 64]
    assert planner.split(200) == [256]  # 5, against 64 * 3 + 16 for 7
    assert planner.split(300) == [256, 64]
    assert planner.split(33, tight=True) == [16, 16, 16]


def test_cheapest_plan_when_its_padding_fits() -> None:
    planner = ChunkPlanner({4: 1.0, 32: 2.0})
    assert planner.next_bucket(20, room=32) == 32
    assert planner.next_bucket(20, room=31) == 4
    assert planner.next_bucket(35, room=100) == 32  # the largest first, so that only the last is padded


def test_sizes_without_a_common_divisor() -> None:
    planner = ChunkPlanner({5: 1.0, 7: 1.0})
    assert planner.split(12) == [7, 5]
    assert planner.split(10, tight=True) == [5, 5]


def test_nothing_fits() -> None:
    with pytest.raises(ValueError, match=r"9 tokens do not fit 11 cache rows in buckets \[4, 8\]"):
        ChunkPlanner({8: 1.0, 4: 1.0}).next_bucket(9, room=11)


def test_no_buckets() -> None:
    with pytest.raises(ValueError, match="no buckets were given"):
        ChunkPlanner({})

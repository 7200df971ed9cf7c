"""Bucket sets against trying every set, with the runtime's own planner as the cost of a length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from staticvl.runtime.engine.chunks import ChunkPlanner
from staticvl.tools.tuning import search
from staticvl.tools.tuning.batches import batch_frontier, step_cost
from staticvl.tools.tuning.frontiers import knee, worthwhile
from staticvl.tools.tuning.search import BestSet, frontier, make_problem, set_cost

# Whole and half milliseconds, whole counts: sums are exact, so that costs compare with ==.
HALVES = st.integers(1, 60).map(lambda n: n / 2)
TABLES = st.dictionaries(st.integers(1, 14), HALVES, min_size=1, max_size=6)
LENGTHS = st.dictionaries(st.integers(1, 30), st.integers(1, 5), min_size=1, max_size=6)


def planned(costs: Sequence[Mapping[int, float]], lengths: Sequence[Mapping[int, int]], buckets: Sequence[int]) -> float:
    """What the runtime's planner makes of all lengths."""
    total = 0.0
    for table, counted in zip(costs, lengths, strict=True):
        planner = ChunkPlanner({bucket: table[bucket] for bucket in buckets})
        total += sum(count * sum(table[bucket] for bucket in planner.split(n)) for n, count in counted.items())
    return total


def sets(candidates: Sequence[int], most: int) -> list[tuple[int, ...]]:
    return [each for count in range(1, most + 1) for each in itertools.combinations(sorted(candidates), count)]


@given(costs=TABLES, lengths=LENGTHS, data=st.data())
def test_the_cost_of_a_set_is_the_planners(costs: dict[int, float], lengths: dict[int, int], data: st.DataObject) -> None:
    buckets = data.draw(st.sets(st.sampled_from(sorted(costs)), min_size=1))
    problem = make_problem(list(costs), [costs], [lengths])
    assert set_cost(problem, sorted(buckets)) == planned([costs], [lengths], sorted(buckets))


@settings(max_examples=40)
@given(costs=TABLES, lengths=LENGTHS, most=st.integers(1, 5))
def test_no_set_is_better(costs: dict[int, float], lengths: dict[int, int], most: int) -> None:
    found = frontier(make_problem(list(costs), [costs], [lengths]), most)
    assert len(found) == min(most, len(costs))
    for count, best in enumerate(found, start=1):
        assert best.cost == min(planned([costs], [lengths], buckets) for buckets in sets(list(costs), count))
        assert best.cost == planned([costs], [lengths], best.buckets)
        assert len(best.buckets) <= count


@settings(max_examples=60)
@given(
    costs=TABLES,
    lengths=LENGTHS,
    loads=st.lists(st.integers(1, 9), min_size=14, max_size=14),
    count=st.integers(2, 5),
    limit=st.sampled_from((12.0, 20.0, math.inf)),
    together=st.sampled_from((1, 3, 512)),
)
def test_branch_and_bound_needs_no_good_start(
    costs: dict[int, float], lengths: dict, loads: list[int], count: int, limit: float, together: int
) -> None:
    """Without a set to begin with, which would hide what the search overlooks; however many are completed together."""
    assume(count <= len(costs))
    load = {b: float(loads[b - 1]) for b in costs}
    kept = [each for each in itertools.combinations(sorted(costs), count) if sum(load[b] for b in each) <= limit]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_BATCH", together)
        tried = search._Search(make_problem(list(costs), [costs], [lengths], load), count, limit)
        if not kept:
            with pytest.raises(ValueError, match="keeps the limit"):
                tried.run(None)
            return
        best = tried.run(None)
    assert best.cost == min(planned([costs], [lengths], each) for each in kept)
    assert best.buckets in kept and best.cost == planned([costs], [lengths], best.buckets)


@settings(max_examples=30)
@given(first=TABLES, second=LENGTHS, lengths=st.tuples(LENGTHS, LENGTHS))
def test_streams_share_a_set(first: dict[int, float], second: dict[int, int], lengths: tuple[dict, dict]) -> None:
    """Variants of a graph have costs of their own; their costs are added."""
    costs = [first, {b: cost + second.get(b, 7) for b, cost in first.items()}]
    best = frontier(make_problem(list(first), costs, lengths), 3)[-1]
    assert best.cost == min(planned(costs, lengths, buckets) for buckets in sets(list(first), 3))
    assert best.cost == planned(costs, lengths, best.buckets)


@settings(max_examples=40)
@given(costs=TABLES, lengths=LENGTHS, loads=st.lists(st.integers(1, 9), min_size=14, max_size=14), limit=st.integers(9, 20))
def test_the_best_of_those_that_keep_a_limit(costs: dict[int, float], lengths: dict, loads: list[int], limit: int) -> None:
    load = {b: float(loads[b - 1]) for b in costs}
    best = frontier(make_problem(list(costs), [costs], [lengths], load), 4, limit)[-1]
    kept = [each for each in sets(list(costs), 4) if sum(load[b] for b in each) <= limit]
    assert sum(load[b] for b in best.buckets) <= limit
    assert best.cost == min(planned([costs], [lengths], buckets) for buckets in kept)


def test_a_larger_case_of_the_usual_kind() -> None:
    """Twelve multiples of 16 and costs with a fixed part, as machines have them: all 2509 sets of up to five are tried."""
    candidates = [16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512]
    costs = {b: 12.0 + b / 4 + b * b / 1024 for b in candidates}
    lengths = {37 * i % 1400 + 1: 1 + i % 7 for i in range(60)}
    found = frontier(make_problem(candidates, [costs], [lengths]), 5)
    for count, best in enumerate(found, start=1):
        expected = min(planned([costs], [lengths], each) for each in itertools.combinations(candidates, count))
        assert math.isclose(best.cost, expected, rel_tol=1e-12)
        again = search._Search(make_problem(candidates, [costs], [lengths]), count, math.inf).run(None)
        assert math.isclose(again.cost, expected, rel_tol=1e-12)
    assert found == frontier(make_problem(candidates, [costs], [lengths]), 5)  # the same every time
    assert 0 < found[-1].explored < len(list(itertools.combinations(candidates, 5)))  # not by trying everything


def test_lengths_are_rounded_to_what_candidates_can_tell_apart() -> None:
    problem = make_problem([32, 48], [{32: 2.0, 48: 2.5}], [{33: 1, 48: 1, 1: 1}])
    assert problem.unit == 16
    assert set_cost(problem, [32]) == 4.0 + 4.0 + 2.0
    assert set_cost(problem, [32, 48]) == 2.5 + 2.5 + 2.0


@pytest.mark.parametrize(
    ("candidates", "cost", "message"),
    [([], 1.0, "at least one"), ([0, 4], 1.0, "positive"), ([4], 0.0, "not a positive number")],
)
def test_what_cannot_be_searched(candidates: list[int], cost: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_problem(candidates, [dict.fromkeys(candidates, cost)], [{5: 1}])


def test_a_limit_that_nothing_keeps() -> None:
    problem = make_problem([4, 8], [{4: 1.0, 8: 1.0}], [{5: 1}], {4: 3.0, 8: 3.0})
    with pytest.raises(ValueError, match="no single candidate keeps the limit of 2"):
        frontier(problem, 2, 2.0)


# --- Decode batches ------------------------------------------------------------------------------------------------------


@given(
    costs=st.tuples(*(st.lists(HALVES, min_size=9, max_size=9) for _ in range(2))),
    steps=st.tuples(*(st.dictionaries(st.integers(1, 9), st.integers(1, 9)) for _ in range(2))),
    slots=st.integers(1, 9),
)
def test_no_batches_are_better(costs: tuple[list, list], steps: tuple[dict, dict], slots: int) -> None:
    tables = [{b: table[b - 1] for b in range(1, slots + 1)} for table in costs]
    counted = [{rows: count for rows, count in each.items() if rows <= slots} for each in steps]
    for count, best in enumerate(batch_frontier(tables, counted, slots, 4), start=1):
        every = [(*each, slots) for n in range(count) for each in itertools.combinations(range(1, slots), n)]
        assert best.cost == min(step_cost(each, tables, counted) for each in every)
        assert best.cost == step_cost(best.buckets, tables, counted)
        assert max(best.buckets) == slots and len(best.buckets) <= count


def test_a_step_that_no_batch_holds() -> None:
    assert step_cost([2], [{2: 1.0}], [{3: 1}]) == math.inf


# --- How far to go -------------------------------------------------------------------------------------------------------


def test_knee() -> None:
    assert knee([100, 40, 30, 25, 22, 20]) == 1
    assert knee([100, 90, 80, 20, 19, 18]) == 3
    assert knee([100, 40]) == 1
    assert knee([5.0, 5.0, 5.0]) == 0


def test_graphs_that_save_too_little_are_left_out() -> None:
    found = [BestSet((i,), cost) for i, cost in enumerate([100.0, 90.0, 89.95, 89.9, 80.0, 79.99])]
    assert worthwhile(found, 0.001) == found[:5]  # the fifth makes up for the two before it, the last saves one in 8000
    assert worthwhile(found, 0.0) == found
    assert worthwhile(found, 0.5) == found[:1]

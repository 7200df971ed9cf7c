"""Replays against a loop that runs one step at a time, and against a clock by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from staticvl.runtime.artifact import GraphKey, Kind
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.request import SamplingParams
from staticvl.runtime.engine.scheduler import Step
from staticvl.tools.tuning.arrivals import rate_of, with_times
from staticvl.tools.tuning.replay import ReplayStats, Setup, _Replay, replay
from staticvl.tools.tuning.trace_error import TraceError
from staticvl.tools.tuning.workload import Arrival

from .fakes import fake_engine, text_prompt

# Quarters of a second: sums of times are exact.
TIMES: dict[Kind, dict[int, float]] = {
    "prefill": {4: 1000.0, 16: 2000.0},
    "decode": {1: 250.0, 2: 500.0, 4: 500.0},
    "vision": {1: 500.0, 2: 1000.0},
}
COSTS = {GraphKey(kind, bucket): ms for kind, times in TIMES.items() for bucket, ms in times.items()}
SETUP = Setup(COSTS, context=64, slots=4)
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 64).map(lambda n: n / 4), st.integers(1, 40), st.integers(1, 12), st.integers(0, 3)),
    min_size=1,
    max_size=9,
).map(lambda rows: [Arrival(time, prompt, generated, tiles, 0) for time, prompt, generated, tiles in sorted(rows)])


class OneStepAtATime(_Replay):
    def _repeats(self, step: Step, first: float, more: float) -> int:
        return 1


def figures(result: ReplayStats) -> tuple:
    lists = (sorted(each) for each in (result.first_token_s, result.per_token_s, result.total_s, result.queue_s))
    return (*lists, result.busy_s, result.real, result.padded, result.rows, result.span_s)


@given(arrivals=ARRIVALS, slots=st.sampled_from((1, 2, 4)))
def test_repeated_steps_are_counted_as_if_each_had_run(arrivals: list[Arrival], slots: int) -> None:
    setup = Setup(COSTS, context=64, slots=slots)
    assert figures(replay(arrivals, setup)) == figures(OneStepAtATime(arrivals, setup).run())


@settings(max_examples=40)
@given(arrivals=ARRIVALS)
@example([Arrival(0.0, 24, 6, 0, 0), Arrival(6.0, 1, 2, 0, 0)])
@example([Arrival(0.0, 4, 9, 0, 0), Arrival(1.0 + 3 * (0.25 + 5 / 256) + 3 / 256, 1, 2, 0, 0)])  # at the end of a step
def test_also_where_steps_grow_longer(arrivals: list[Arrival]) -> None:
    setup = Setup(COSTS, context=64, slots=4, past_ms=1000 / 256)  # sums are exact with it too
    whole, single = replay(arrivals, setup), OneStepAtATime(arrivals, setup).run()
    assert whole.rows == single.rows and whole.padded == single.padded
    assert whole.span_s == pytest.approx(single.span_s, rel=1e-9)
    assert sorted(whole.total_s) == pytest.approx(sorted(single.total_s), rel=1e-9)


@settings(max_examples=25)
@given(sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=7))
def test_steps_are_those_of_the_engine(sizes: list[tuple[int, int]]) -> None:
    """All requests at once: the same graphs run, and as much of them is padding."""
    engine = fake_engine(slots=4, **TIMES)
    run_engine(engine, sizes)
    result = replay([Arrival(0.0, prompt, generated, 0, 0) for prompt, generated in sizes], SETUP)
    assert {**result.padded, "verify": 0} == engine.metrics.padded
    assert {**result.real, "verify": 0} == engine.metrics.real


BLOCKED = Setup(COSTS, context=512, slots=4, blocks=6)
LONG_SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200)), min_size=1, max_size=7)


@settings(max_examples=25, deadline=None)
@given(sizes=LONG_SIZES, start=st.integers(0, 3))
@example([(120, 20), (120, 150), (128, 200), (100, 200)], 0)  # preempted more than once
def test_repeated_steps_in_few_blocks(sizes: list[tuple[int, int]], start: int) -> None:
    arrivals = [Arrival(float(place * start), prompt, answer, 0, 0) for place, (prompt, answer) in enumerate(sizes)]
    whole, single = replay(arrivals, BLOCKED), OneStepAtATime(arrivals, BLOCKED).run()
    assert figures(whole) == figures(single)
    assert (whole.preemptions, whole.most_running) == (single.preemptions, single.most_running)
    assert whole.running_s == pytest.approx(single.running_s)


@settings(max_examples=15, deadline=None)
@given(sizes=LONG_SIZES)
@example([(120, 20), (120, 150), (128, 200), (100, 200)])
def test_steps_in_few_blocks_are_those_of_the_engine(sizes: list[tuple[int, int]]) -> None:
    engine = fake_engine(slots=4, blocks=6, context=512, **TIMES)
    run_engine(engine, sizes)
    result = replay([Arrival(0.0, prompt, generated, 0, 0) for prompt, generated in sizes], BLOCKED)
    assert {**result.padded, "verify": 0} == engine.metrics.padded
    assert result.preemptions == engine.metrics.preemptions


def run_engine(engine: Engine, sizes: Sequence[tuple[int, int]]) -> None:
    for prompt, generated in sizes:
        engine.add_request(text_prompt(*range(10, 10 + prompt)), SamplingParams(max_new_tokens=generated, ignore_eos=True))
    while not engine.scheduler.idle:
        engine.step()


def test_a_clock_by_hand() -> None:
    """A prompt of 20 with one tile: vision 0.5 s, chunks of 16 and 4 in 3 s, then two steps of 0.25 s. The second comes
    while the first decodes, so it is prefilled before the first goes on, in a batch of two."""
    first, second = Arrival(0.0, 20, 3, 1, 0), Arrival(3.7, 4, 2, 0, 0)
    result = replay([first, second], SETUP)
    prefilled = 0.5 + 2.0 + 1.0
    arrived = prefilled + 0.25  # the end of the step during which the second came
    last = arrived + 1.0 + 0.5
    assert result.first_token_s == pytest.approx([prefilled, arrived + 1.0 - 3.7])
    assert sorted(result.total_s) == pytest.approx(sorted([last, last - 3.7]))
    assert result.per_token_s == pytest.approx([(last - prefilled) / 2, 0.5])
    assert result.queue_s == pytest.approx([0.0, arrived - 3.7])
    assert result.rows == {0: {1: 1, 2: 1}}
    assert result.padding("prefill") == pytest.approx(0.0) and result.padding("decode") == pytest.approx(0.0)
    assert result.load == pytest.approx(1.0) and result.span_s == pytest.approx(last)


def test_who_waits_for_a_slot() -> None:
    setup = Setup(COSTS, context=64, slots=1)
    result = replay([Arrival(0.0, 4, 2, 0, 0)] * 3, setup)
    assert result.queue_s == pytest.approx([0.0, 1.25, 2.5])
    idle = replay([Arrival(0.0, 4, 1, 0, 0), Arrival(100.0, 4, 1, 0, 0)], setup)
    assert idle.queue_s == [0.0, 0.0] and idle.load == pytest.approx(2 * 1.0 / 101.0)


def test_earlier_tokens_cost_what_they_cost() -> None:
    """Chunks of 16 and 4, the second after 16 tokens; one decode step after 21."""
    setup = Setup(COSTS, context=64, slots=1, past_ms=1.0)
    result = replay([Arrival(0.0, 20, 2, 0, 0)], setup)
    assert result.busy_s["prefill"] == pytest.approx(3.0 + 4 * 16e-3)
    assert result.busy_s["decode"] == pytest.approx(0.25 + 21e-3)


def test_one_run_for_each_prompt() -> None:
    setup = Setup(COSTS, context=64, slots=1, chunks=False)
    result = replay([Arrival(0.0, 5, 1, 0, 0)], setup)
    assert result.padded["prefill"] == 16 and result.real["prefill"] == 5


def test_images_are_seen_by_a_variant_of_the_graphs() -> None:
    costs = {**COSTS, GraphKey("prefill", 16, 2): 4000.0, GraphKey("decode", 4, 2): 1000.0}
    result = replay([Arrival(0.0, 5, 2, 2, 2), Arrival(0.0, 5, 2, 0, 0)], Setup(costs, context=64, slots=4))
    assert result.busy_s == pytest.approx({"vision": 1.0, "prefill": 4.0 + 2.0, "decode": 1.0})
    assert result.rows == {2: {2: 1}}


# --- Times ---------------------------------------------------------------------------------------------------------------


def block(*times: float | None) -> list[Arrival]:
    return [Arrival(time, 1 + place, 1, 0, 0) for place, time in enumerate(times)]


def test_times_are_sorted_and_begin_at_zero() -> None:
    found = with_times(block(1007.0, 1001.0, 1005.0), None)
    assert [(each.time, each.prompt) for each in found] == [(0.0, 2), (4.0, 3), (6.0, 1)]


def test_a_rate_stretches_times() -> None:
    found = with_times(block(10.0, 11.0, 14.0), 0.5)
    assert [each.time for each in found] == [0.0, 1.0, 4.0]
    assert rate_of(found) == pytest.approx(0.5)


def test_without_times() -> None:
    with pytest.raises(TraceError, match="does not say when requests arrived; give --rate"):
        with_times(block(1.0, None), None)
    found = with_times(block(*[None] * 2000), 4.0)
    assert found == with_times(block(*[None] * 2000), 4.0)
    assert rate_of(found) == pytest.approx(4.0, rel=0.1)
    assert rate_of(with_times(block(*[5.0] * 2000), 4.0)) == pytest.approx(4.0, rel=0.1)  # all at once, and a rate is asked for

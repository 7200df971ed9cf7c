"""The engine over the fake backend: whatever runs together, every request gets the tokens that it would get alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from staticvl.runtime.artifact import CROSS_HIDDEN, RopeParameters
from staticvl.runtime.backends.base import Feed
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.fit import ContextError
from staticvl.runtime.engine.request import SamplingParams, Sequence
from staticvl.runtime.engine.scheduler import Step
from staticvl.runtime.processor.prompt import Prompt
from staticvl.runtime.rope import rope_tables

from .fake_backend import FakeBackend
from .fakes import (
    CROSS_FACTS,
    EOS,
    FACTS,
    GRIDS,
    HEAD_DIM,
    USED,
    VOCAB,
    check_slots,
    cross_prompt,
    fake_artifact,
    fake_engine,
    image,
    image_prompt,
    oracle,
    run_all,
    text_prompt,
)

LONG = text_prompt(*range(20, 30))
IMAGES = image_prompt(5, image(700), 6, image(44), 7)
LOOKING = cross_prompt(5, ((1, 2), 1), 6, 7, ((2, 2), 2), 8, seed=1)  # its last token looks
GREEDY = SamplingParams(max_new_tokens=6, ignore_eos=True)
QWEN = RopeParameters(theta=1e8, ntk_positions=8, logn_positions=8)


# --- Any requests, any buckets, any order ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """One request and what happens to it: when it arrives, and after how many steps it is dropped (None: never)."""

    prompt: Prompt
    params: SamplingParams
    arrives: int
    dropped: int | None


# Some requests begin alike, so that there is something to take over.
COMMON = [7, image(44), *range(60, 72), image(700), 8]
CROSS_COMMON = [7, ((1, 2), 3), *range(60, 70), ((2, 1), 4), 8]


@st.composite
def plans(draw: st.DrawFn, context: int, ntks: tuple[float, ...] = ()) -> Plan:
    """A request that fits the context, up to the last position."""
    own: list[int | np.ndarray] = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=context // 2))
    for number in draw(st.lists(st.integers(0, 3000), max_size=3)):
        own.insert(draw(st.integers(0, len(own))), image(number))
    parts = [*COMMON[: draw(st.sampled_from((0, len(COMMON))) | st.integers(0, len(COMMON)))], *own]
    prompt = image_prompt(*parts)
    while prompt.length >= context:
        parts.pop()
        prompt = image_prompt(*parts)
    ntk = draw(st.sampled_from((1.0, *ntks)))
    return draw(requests_for(dataclasses.replace(prompt, ntk=ntk, state=np.full_like(prompt.state, ntk)), context))


@st.composite
def cross_plans(draw: st.DrawFn, context: int, images: int) -> Plan:
    """As `plans`, where images take one position and are seen by cross-attention."""
    own: list = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=context // 2))
    common = CROSS_COMMON[: draw(st.sampled_from((0, 14)) | st.integers(0, 14))]
    room = images - sum(isinstance(part, tuple) for part in common)
    if room < 0:
        common, room = [], images
    for image_ in draw(st.lists(st.tuples(st.sampled_from(GRIDS), st.integers(0, 9)), max_size=room)):
        own.insert(draw(st.integers(0, len(own))), image_)
    parts = [*common, *own]
    return draw(requests_for(cross_prompt(*parts[: context - 1], seed=draw(st.integers(0, 99) | st.just(0))), context))


@st.composite
def requests_for(draw: st.DrawFn, prompt: Prompt, context: int) -> Plan:
    """One request with this prompt that fits the context."""
    sampled = draw(st.booleans())
    params = SamplingParams(
        max_new_tokens=draw(st.integers(1, context - prompt.length)),
        ignore_eos=draw(st.booleans()),
        temperature=0.2 if sampled else 0.0,
        seed=draw(st.integers(0, 5)),
        top_k=draw(st.sampled_from([0, 3])),
    )
    return Plan(prompt, params, draw(st.integers(0, 12)), draw(st.none() | st.none() | st.integers(0, 20)))


COST = st.integers(1, 9).map(float)


@st.composite
def workloads(draw: st.DrawFn, way: str) -> tuple[Engine, list[Plan]]:
    """Requests to a small engine. `way`: fused (images stand in the text), qwen (so too, with long-text ropes), cross."""
    slots, context = draw(st.integers(1, 4)), draw(st.integers(12, 48))
    rows = set(draw(st.lists(st.integers(1, slots), max_size=2))) | {slots}
    images = tuple(sorted(draw(st.sets(st.integers(1, 4), min_size=1, max_size=2)))) if way == "cross" else ()
    engine = fake_engine(
        slots=slots,
        context=context,
        prefill=draw(st.dictionaries(st.integers(1, 12), COST, min_size=1, max_size=3)),
        decode=dict.fromkeys(rows, 1.0),
        vision=draw(st.dictionaries(st.integers(1, 3), COST, min_size=1, max_size=2)),
        images=images,
        rope=QWEN if way == "qwen" else FACTS.rope,
        prefill_budget=draw(st.none() | st.integers(1, 12)),
        reuse=draw(st.booleans()),
    )
    one = {"fused": plans(context), "qwen": plans(context, (3.0, 7.0)), "cross": cross_plans(context, max(images, default=0))}
    return engine, draw(st.lists(one[way], min_size=1, max_size=7))


def run_workload(engine: Engine, workload: list[Plan]) -> list[Sequence]:
    """Step until every request has come and gone, checking the slots after each step."""
    sequences: dict[int, Sequence] = {}
    for now in range(10_000):
        for i, plan in enumerate(workload):
            if plan.arrives <= now and i not in sequences:
                sequences[i] = engine.add_request(plan.prompt, plan.params, return_logits=True)
            if plan.dropped is not None and plan.arrives + plan.dropped <= now:
                engine.cancel(sequences[i])
        if not engine.scheduler.idle:
            step = engine.step()
            assert 1 <= step.count <= step.bucket
        check_slots(engine)
        if engine.scheduler.idle and len(sequences) == len(workload) and all(s.finish_reason for s in sequences.values()):
            return [sequences[i] for i in range(len(workload))]
    raise AssertionError("the engine does not end")


def check_workload(engine: Engine, requests: list[Plan]) -> None:
    for sequence, plan in zip(run_workload(engine, requests), requests, strict=True):
        wanted = oracle(plan.prompt, plan.params, engine.manifest.model)
        if sequence.finish_reason == "cancelled":
            assert plan.dropped is not None
            assert sequence.generated == wanted[: len(sequence.generated)]
            continue
        assert sequence.generated == wanted
        stopped = wanted[-1] == EOS and not plan.params.ignore_eos
        assert sequence.finish_reason == ("stop" if stopped else "length")
        if plan.params.temperature:
            assert max(wanted) < USED
        else:
            assert np.stack(sequence.logits).argmax(axis=1).tolist() == wanted
    assert engine.cache.free == engine.cache.spec.slots


@hypothesis_settings(max_examples=150, deadline=None)
@given(workloads("fused"))
def test_every_request_gets_the_tokens_that_it_gets_alone(workload: tuple[Engine, list[Plan]]) -> None:
    check_workload(*workload)


@hypothesis_settings(max_examples=100, deadline=None)
@given(workloads("cross"))
def test_so_it_is_with_cross_attention(workload: tuple[Engine, list[Plan]]) -> None:
    check_workload(*workload)


@hypothesis_settings(max_examples=75, deadline=None)
@given(workloads("qwen"))
def test_so_it_is_with_a_rope_of_its_own_for_every_request(workload: tuple[Engine, list[Plan]]) -> None:
    check_workload(*workload)


# --- By hand -----------------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_the_fake() -> None:
    """Tokens 5, 7 leave 6 * 1 + 8 * 2 = 22; token 22 adds 23 * 3, token 91 adds 92 * 4."""
    engine = fake_engine()
    sequence = engine.add_request(text_prompt(5, 7), SamplingParams(max_new_tokens=3))
    run_all(engine)
    assert sequence.generated == [22, (22 + 69) % VOCAB, (22 + 69 + 368) % VOCAB]


def test_the_arithmetic_of_a_image() -> None:
    """A tile whose pixels sum to 700 stands for 700, 701, 702, whatever ids are at its positions."""
    engine = fake_engine()
    sequence = engine.add_request(image_prompt(5, image(700), 6), SamplingParams(max_new_tokens=1))
    run_all(engine)
    assert sequence.generated == [(6 * 1 + 701 * 2 + 702 * 3 + 703 * 4 + 7 * 5) % VOCAB]


def test_the_arithmetic_of_cross_attention() -> None:
    """An image of two tiles side by side (shape 2) that sum to 300 and 400, after token 5: 302, 404, then 6 and 8 unused."""
    pixels = np.stack([image(300), image(400), image(0), image(0)])
    prompt = dataclasses.replace(cross_prompt(5, ((1, 2), 0), 9), pixels=pixels)
    assert prompt.cross_attention is not None
    prompt.cross_attention.visible[...] = [[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1]]
    prompt.cross_attention.gates[...] = [[0, 0], [1, 1], [1, 0]]
    engine = fake_engine(images=(1,))
    sequence = engine.add_request(prompt, SamplingParams(max_new_tokens=2, ignore_eos=True))
    run_all(engine)
    total = 6 * 1 + (VOCAB - 1 + 302 + 404 + 1 + 1) * 2 + (9 + 302 + 6 + 8 + 1) * 3
    first = total % VOCAB
    assert sequence.generated == [first, (total + (first + 302 + 6 + 8 + 1) * 4) % VOCAB]
    assert engine.backend.read_cache("cross_v.1.0", 2)[:, 0, ::3, 3].tolist() == [[302, 404, 6, 8], [0, 0, 0, 0]]


def test_the_arithmetic_of_dynamic_ntk() -> None:
    """With the factor 3, positions count threefold."""
    engine = fake_engine(rope=QWEN)
    sequence = engine.add_request(text_prompt(5, 7, ntk=3.0), SamplingParams(max_new_tokens=2, ignore_eos=True))
    run_all(engine)
    first = 6 * 1 + 8 * (3 + 1)
    assert sequence.generated == [first, (first + (first + 1) * (6 + 1)) % VOCAB]


def test_end_of_sequence_stops_unless_ignored() -> None:
    """One token t leaves t + 1, so that the first answer to 1 is the end token."""
    engine = fake_engine()
    stopped = engine.add_request(text_prompt(EOS - 1), SamplingParams(max_new_tokens=5))
    ignored = engine.add_request(text_prompt(EOS - 1), SamplingParams(max_new_tokens=5, ignore_eos=True))
    run_all(engine)
    assert (stopped.generated, stopped.finish_reason) == ([EOS], "stop")
    assert (len(ignored.generated), ignored.generated[0], ignored.finish_reason) == (5, EOS, "length")


def test_logits_are_kept_only_where_asked_for() -> None:
    engine = fake_engine()
    kept = engine.add_request(LONG, GREEDY, return_logits=True)
    other = engine.add_request(LONG, GREEDY)
    run_all(engine)
    rows = np.stack(kept.logits)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.eye(VOCAB, dtype=np.float32)[kept.generated])
    assert other.logits == []


def test_metrics_count_real_and_padded_sizes() -> None:
    """Two tiles in a bucket of 3, 10 and 9 positions in buckets of 4; 2 and 4 later tokens in batches of 2, apart, because the
    first request goes on while the second is prefilled."""
    engine = fake_engine(slots=2, prefill={4: 1.0}, decode={2: 1.0}, vision={3: 1.0})
    engine.add_request(LONG, SamplingParams(max_new_tokens=3, ignore_eos=True))
    engine.add_request(IMAGES, SamplingParams(max_new_tokens=5, ignore_eos=True))
    run_all(engine)
    metrics = engine.metrics
    assert metrics.runs == {"vision": 1, "prefill": 3 + 3, "decode": 2 + 4, "verify": 0}
    assert metrics.real == {"vision": 2, "prefill": 10 + 9, "decode": 2 + 4, "verify": 0}
    assert metrics.padded == {"vision": 3, "prefill": 12 + 12, "decode": 4 + 8, "verify": 0}
    assert all((seconds > 0) == (metrics.runs[kind] > 0) for kind, seconds in metrics.seconds.items())


def test_timings_add_up() -> None:
    engine = fake_engine(slots=1)
    first, second = (engine.add_request(IMAGES, GREEDY) for _ in range(2))
    run_all(engine)
    for sequence in (first, second):
        times = sequence.timings()
        assert times.first_token_s == pytest.approx(times.queue_s + times.vision_s + times.prefill_s)
        assert times.total_s == pytest.approx(times.first_token_s + 5 * times.per_token_s)
        assert min(times.queue_s, times.vision_s, times.prefill_s, times.per_token_s) > 0
    assert second.times.started > first.times.finished


# --- What does not fit -------------------------------------------------------------------------------------------------


def test_a_request_that_fills_the_context() -> None:
    engine = fake_engine(slots=1, context=16)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    sequence = engine.add_request(LONG, params)
    run_all(engine)
    assert sequence.generated == oracle(LONG, params)


def test_a_request_one_token_too_long() -> None:
    engine = fake_engine(slots=1, context=14)
    with pytest.raises(ContextError) as error:
        engine.add_request(IMAGES, GREEDY)
    for part in (
        "3 text tokens",
        "6 image tokens",
        "max_new_tokens is 6",
        "15 in all",
        "holds 14",
        "staticvl compile",
        "--context 15",
    ):
        assert part in str(error.value)
    assert engine.scheduler.idle
    assert engine.cache.free == 1


def test_more_images_than_a_sequence_may_hold() -> None:
    engine = fake_engine(images=(1, 2))
    with pytest.raises(ContextError) as error:
        engine.add_request(cross_prompt(*(((1, 1), n) for n in range(3))), GREEDY)
    for part in ("has 3 images", "holds 2", "staticvl compile CHECKPOINT --out ARTIFACT --images 3"):
        assert part in str(error.value)
    assert engine.scheduler.idle
    fits = engine.add_request(cross_prompt(*(((1, 1), n) for n in range(2))), GREEDY)
    run_all(engine)
    assert len(fits.generated) == GREEDY.max_new_tokens


# --- Side by side ------------------------------------------------------------------------------------------------------


def test_rows_with_and_without_images_in_one_batch() -> None:
    """Each gets the tokens that it gets alone, whichever ends first, and slots that held images hold text afterwards."""
    engine = fake_engine(slots=3, images=(1, 3))
    prompts = [LONG, LOOKING, cross_prompt(1, ((2, 1), 5), 2), LONG, LOOKING]
    lengths = (9, 4, 5, 3, 7)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in lengths]
    sequences = [engine.add_request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    steps = run_all(engine)
    assert any(
        step.graph_key.images == 3 and {s.images for s in step.sequences} == {0, 1, 2}
        for step in steps
        if step.kind == "decode"
    )
    for sequence, prompt, each in zip(sequences, prompts, params, strict=True):
        assert sequence.generated == oracle(prompt, each, CROSS_FACTS)


def test_ropes_of_several_factors_in_one_batch() -> None:
    engine = fake_engine(slots=3, rope=QWEN)
    prompts = [text_prompt(*range(20, 20 + n), ntk=ntk) for n, ntk in ((4, 1.0), (10, 3.0), (20, 7.0))]
    sequences = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    steps = run_all(engine)
    assert any(step.kind == "decode" and len(step.sequences) == 3 for step in steps)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.generated == oracle(prompt, GREEDY)


# --- Cancelling --------------------------------------------------------------------------------------------------------


def is_waiting(sequence: Sequence) -> bool:
    return sequence.slot is None


def is_encoding(sequence: Sequence) -> bool:
    return sequence.tiles_done == 1


def is_prefilling(sequence: Sequence) -> bool:
    return sequence.computed == 4


def is_decoding(sequence: Sequence) -> bool:
    return len(sequence.generated) == 2


@pytest.mark.parametrize("phase", [is_waiting, is_encoding, is_prefilling, is_decoding])
def test_cancel_frees_the_slot_in_every_phase(phase: Callable[[Sequence], bool]) -> None:
    """The next request in the slot, and the one beside it, are not disturbed."""
    engine = fake_engine(slots=2, prefill={4: 1.0}, vision={1: 1.0})
    beside = engine.add_request(LONG, GREEDY)
    if phase is is_waiting:
        before = engine.add_request(LONG, GREEDY)
    dropped = engine.add_request(IMAGES, GREEDY)
    engine.step()
    while not phase(dropped):
        engine.step()
    engine.cancel(dropped)
    assert dropped.finish_reason == "cancelled"
    assert dropped.slot is None
    check_slots(engine)
    engine.cancel(dropped)
    after = engine.add_request(IMAGES, GREEDY)
    run_all(engine)
    assert beside.generated == oracle(LONG, GREEDY)
    assert after.generated == oracle(IMAGES, GREEDY)
    if phase is is_waiting:
        assert before.generated == oracle(LONG, GREEDY)
    assert engine.cache.free == 2


def test_cancelling_what_has_ended_changes_nothing() -> None:
    engine = fake_engine()
    sequence = engine.add_request(text_prompt(1), GREEDY)
    run_all(engine)
    engine.cancel(sequence)
    assert sequence.finish_reason == "length"
    check_slots(engine)


# --- The tests themselves ----------------------------------------------------------------------------------------------


class Garbled(Engine):
    """An engine that makes one mistake in its feeds."""

    def __init__(self, mistake: Callable[[Step, Feed], None], **sizes: Any) -> None:
        artifact = fake_artifact(prefill={4: 1.0, 8: 1.5}, **sizes)
        super().__init__(artifact.manifest, FakeBackend(artifact.manifest))
        self.mistake = mistake

    def run_graph(self, step: Step, feed: Feed) -> np.ndarray:
        self.mistake(step, feed)
        return super().run_graph(step, feed)


def shift(name: str, kind: str) -> Callable[[Step, Feed], None]:
    """One off in one input of one kind of graph."""

    def mistake(step: Step, feed: Feed) -> None:
        if step.kind == kind:
            feed[name][...] = feed[name] - 1 if name != "pixels" else 9

    return mistake


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("vision", "pixels"),
        *(("prefill", name) for name in ("token_ids", "row_index", "image_rows", "last_index", "rope_sin")),
        *(("decode", name) for name in ("token_ids", "lengths", "rope_sin")),
    ],
)
def test_the_fake_notices_every_wrong_input(kind: str, name: str) -> None:
    engine = Garbled(shift(name, kind))
    sequence = engine.add_request(IMAGES, GREEDY)
    run_all(engine)
    assert sequence.generated != oracle(IMAGES, GREEDY)


def flip(name: str, kind: str) -> Callable[[Step, Feed], None]:
    """What is seen is hidden, what is hidden is seen."""

    def mistake(step: Step, feed: Feed) -> None:
        if step.kind == kind and name in feed:
            feed[name][...] = np.where(feed[name] == 0, CROSS_HIDDEN, 0) if name == "cross_mask" else 1 - feed[name]

    return mistake


@pytest.mark.parametrize(
    "mistake",
    [
        *(shift(name, "vision") for name in ("tile_count", "aspect_id")),
        *(flip(name, kind) for name in ("cross_mask", "cross_gate") for kind in ("prefill", "decode")),
    ],
)
def test_the_fake_notices_every_wrong_look(mistake: Callable[[Step, Feed], None]) -> None:
    engine = Garbled(mistake, images=(2,))
    sequence = engine.add_request(LOOKING, GREEDY)
    run_all(engine)
    assert sequence.generated != oracle(LOOKING, GREEDY, CROSS_FACTS)


def test_the_fake_notices_a_rope_of_another_factor() -> None:
    prompt = text_prompt(*range(20, 32), ntk=3.0)

    def mistake(step: Step, feed: Feed) -> None:
        if step.kind == "decode":
            position = int(feed["lengths"][0])
            for name, table in zip(("rope_cos", "rope_sin"), rope_tables(QWEN, HEAD_DIM, position + 1), strict=True):
                feed[name][0, 0] = table[position]

    engine = Garbled(mistake, rope=QWEN)
    sequence = engine.add_request(prompt, GREEDY)
    run_all(engine)
    assert sequence.generated != oracle(prompt, GREEDY)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_the_fake_notices_a_wrong_query_scale(kind: str) -> None:
    def mistake(step: Step, feed: Feed) -> None:
        if step.kind == kind:
            feed["query_scale"][...] = 1

    engine = Garbled(mistake, rope=QWEN)
    engine.add_request(LONG, GREEDY)
    with pytest.raises(ValueError, match=r"query_scale is 1.000000 at position \d+; expected 1"):
        run_all(engine)


def test_the_fake_refuses_what_a_device_could_not_bind() -> None:
    engine = fake_engine()
    graph = engine.graphs["decode", 1, 0]
    feed = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.inputs if "_cache." not in spec.name}
    with pytest.raises(ValueError, match="lengths is int64"):
        engine.backend.run(graph, feed | {"lengths": np.zeros(1, np.int64)})
    with pytest.raises(ValueError, match="input lengths was not fed"):
        engine.backend.run(graph, {name: array for name, array in feed.items() if name != "lengths"})
    with pytest.raises(ValueError, match="rows 68 to 69 of slot 0"):
        engine.backend.run(graph, feed | {"lengths": np.full(1, 68, np.int32)})


def test_caches_can_be_read_and_written() -> None:
    engine = fake_engine(slots=2)
    engine.add_request(text_prompt(5, 7), SamplingParams(max_new_tokens=1))
    run_all(engine)
    value = engine.backend.read_cache("k_cache.0", 2)
    assert value.shape == (2, 1, engine.cache.spec.rows, 4)
    assert value[0, 0, :2, 0].tolist() == [6, 16]
    engine.backend.write_cache("v_cache.0", value[:1] * 2)
    assert engine.backend.read_cache("k_cache.0", 1)[0, 0, :2, 3].tolist() == [12, 32]

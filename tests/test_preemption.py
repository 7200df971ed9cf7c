"""Sequences that lose their slot for want of blocks, and answer as if they had not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from staticvl import runtime
from staticvl.runtime.artifact import RopeParameters
from staticvl.runtime.engine import blocks
from staticvl.runtime.engine.conversation import Conversation
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.fit import ContextError
from staticvl.runtime.engine.request import SamplingParams, Sequence

from .fakes import (
    FACTS,
    Guess,
    check_blocks,
    check_slots,
    cross_prompt,
    fake_engine,
    image,
    image_prompt,
    oracle,
    text_prompt,
)

TEN = text_prompt(*range(10, 20))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)


def params(tokens: int = 12, **settings: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, ignore_eos=True, **settings)


def run(engine: Engine, each: Callable[[int], object] = lambda step: None) -> None:
    """Step to the end, with all that must hold after each step; `each` is called before it."""
    count = 0
    while not engine.scheduler.idle:
        each(count)
        engine.step()
        check_slots(engine)
        check_blocks(engine)
        count += 1
        assert count < 500


def every(engine: Engine, steps: int) -> Callable[[int], None]:
    """Preempts the sequence that came first, and all others in turn, after so many steps each."""

    def preempt(step: int) -> None:
        running = engine.scheduler.running
        if running and step % steps == steps - 1:
            engine.scheduler.preempt(running[step // steps % len(running)])

    return preempt


# --- Who is preempted, and when it comes back --------------------------------------------------------------------------


def test_the_youngest_gives_up_its_blocks_and_comes_back_first() -> None:
    """Nine blocks of 4: three prompts of 10 take three each, and the first that grows takes one of the last's."""
    engine = fake_engine(slots=3, blocks=11, prefill={16: 1.0})
    old, middle, young, late = (engine.add_request(TEN, params()) for _ in range(4))
    while not engine.scheduler.preemptions:
        engine.step()
        check_blocks(engine)
    assert young.slot is None and young.preemptions == 1
    assert engine.scheduler.waiting == [young, late]
    assert old.slot is not None and middle.slot is not None
    run(engine)
    assert all(each.generated == oracle(TEN, params()) for each in (old, middle, young, late))
    assert old.preemptions == 0, "who came first goes on"
    assert old.times.finished < young.times.finished < late.times.finished


def test_a_higher_priority_is_kept_although_it_came_later() -> None:
    engine = fake_engine(slots=2, blocks=7, prefill={16: 1.0})
    low, high = engine.add_request(TEN, params()), engine.add_request(TEN, params(priority=1))
    run(engine)
    assert (low.preemptions > 0, high.preemptions) == (True, 0)
    assert low.generated == high.generated == oracle(TEN, params())


def test_prompts_wait_for_blocks_though_slots_are_free() -> None:
    """A prompt of 10 takes three blocks, and the one that answers may need another: five are too few for both."""
    engine = fake_engine(slots=4, blocks=6, prefill={16: 1.0})
    first, second = engine.add_request(TEN, params(6)), engine.add_request(TEN, params(6))
    engine.step()
    assert (first.slot, second.slot, engine.cache.free) == (0, None, 3)
    run(engine)
    assert engine.scheduler.preemptions == 0
    assert second.times.first_token > first.times.finished


def test_an_answer_that_has_all_its_blocks_needs_none_to_spare() -> None:
    engine = fake_engine(slots=4, blocks=6, prefill={16: 1.0})
    first, second = engine.add_request(TEN, params(2)), engine.add_request(TEN, params(2))
    engine.step()
    assert first.slot is not None and second.slot is not None


def test_what_can_never_fit_is_refused_with_the_figures() -> None:
    engine = fake_engine(slots=4, context=256, blocks=6)
    most = params(24 + 1 - 10)
    assert engine.new_sequence(TEN, most).most_rows == 24
    with pytest.raises(ContextError) as error:
        engine.add_request(TEN, params(16))
    assert str(error.value) == (
        "the prompt has 10 tokens and max_new_tokens is 16, which takes 7 blocks of 4 tokens (8.96e-07 GB), but cache_gb "
        "allows 6 (7.68e-07 GB); give at most 15 new tokens, or load with a larger cache_gb"
    )
    with pytest.raises(ContextError, match="give a shorter prompt, or load"):
        engine.add_request(text_prompt(*[7] * 40), params(1))
    sequence = engine.add_request(TEN, most)
    run(engine)
    assert sequence.generated == oracle(TEN, most)


def test_parked_rows_and_rows_of_the_prefix_cache_are_evicted_from_their_ends() -> None:
    """The slot used the longest ago first; what is left of it still serves."""
    engine = fake_engine(slots=3, blocks=8, reuse=True, prefill={4: 1.0, 16: 2.0})
    first, second, new = (text_prompt(*range(start, start + 12)) for start in (10, 30, 50))
    conversation = Conversation()
    turn = engine.new_sequence(first, params(1))
    engine.resume(turn, conversation)
    engine.add(turn)
    run(engine)
    engine.add_request(second, params(1))
    run(engine)
    assert (engine.cache.blocks.used, engine.cache.blocks.cached) == (0, 6)
    engine.add_request(new, params(1))
    run(engine)
    slot = engine.slot_of(conversation)
    assert slot is not None and engine.cache.lengths[slot] == 8
    assert engine.metrics.evicted_blocks == 1
    turn = engine.new_sequence(text_prompt(*range(10, 22), 5), params(2))
    engine.resume(turn, conversation)
    engine.add(turn)
    run(engine)
    assert turn.reused == 8 and turn.generated == oracle(turn.prompt, params(2))


def test_an_unrelated_prompt_does_not_take_rows_that_cannot_be_moved() -> None:
    """Both begin with the same token; there are no blocks for a copy, but a slot that is empty."""
    engine = fake_engine(slots=2, decode={2: 1.0}, blocks=7, reuse=True, prefill={4: 1.0, 16: 2.0})
    first, second = text_prompt(1, *range(10, 25)), text_prompt(1, 50, 51)
    for prompt in (first, second):
        engine.add_request(prompt, params(1))
        run(engine)
    again = engine.add_request(first, params(1))
    run(engine)
    assert again.reused == 15


def test_a_turn_waits_while_others_wait_for_blocks() -> None:
    """Else chats could keep a large request out for ever; its slot stays parked meanwhile."""
    engine = fake_engine(slots=4, blocks=8, reuse=True, prefill={16: 1.0})
    conversation = Conversation()
    turn = engine.new_sequence(TEN, params(1))
    engine.resume(turn, conversation)
    engine.add(turn)
    run(engine)
    running, large = engine.add_request(text_prompt(*[7] * 6), params(3)), engine.add_request(text_prompt(*[8] * 28), params(1))
    engine.step()
    again = engine.new_sequence(text_prompt(*range(10, 21)), params(1))
    engine.resume(again, conversation)
    engine.add(again)
    assert engine.scheduler.waiting == [large, again]
    run(engine)
    assert running.times.finished < large.times.finished < again.times.finished
    assert [each.generated for each in (running, large, again)] == [
        oracle(each.prompt, each.params) for each in (running, large, again)
    ]


# --- The same answer ---------------------------------------------------------------------------------------------------

PROMPTS = {
    "text": TEN,
    "images": image_prompt(5, image(31), 6, image(57), 7, 8),
    "ntk": replace(TEN, ntk=3.0, state=np.full(10, 3, np.int32)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "seed": 5, "top_p": 0.9},
    "penalties": {"temperature": 0.7, "seed": 2, "repetition_penalty": 1.5, "frequency_penalty": 0.8, "min_new_tokens": 6},
    "logprobs": {"temperature": 0.7, "seed": 2, "logprobs": 3},
}


def results(sequence: Sequence) -> tuple:
    return sequence.generated, sequence.finish_reason, sequence.logprobs, [row.tolist() for row in sequence.logits]


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", PROMPTS)
def test_preempted_every_few_steps(kind: str, settings: str, reuse: bool) -> None:
    rope = RopeParameters(theta=1e8, ntk_positions=8) if kind == "ntk" else FACTS.rope
    answers = []
    for steps in (0, 5, 8):
        engine = fake_engine(slots=3, prefill={4: 1.0, 64: 2.0}, rope=rope, reuse=reuse)
        sequences = [
            engine.add_request(PROMPTS[kind], params(20, **SETTINGS[settings]), return_logits=True),
            engine.add_request(text_prompt(*range(30, 37)), params(20, **SETTINGS[settings])),
        ]
        run(engine, every(engine, steps) if steps else lambda step: None)
        assert all((each.preemptions > 0) == (steps > 0) for each in sequences)
        answers.append(list(map(results, sequences)))
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0][0][0]) == 20


def test_preempted_with_images_of_cross_attention() -> None:
    """The images' keys are lost with the slot, and encoded again."""
    prompt = cross_prompt(5, ((1, 2), 3), 6, ((2, 2), 4), 7, 8, seed=3)
    engine = fake_engine(slots=2, images=(2,), prefill={64: 2.0}, context=60)
    sequence = engine.add_request(prompt, params(20))
    run(engine, every(engine, 7))
    assert sequence.preemptions > 2
    assert sequence.generated == oracle(prompt, params(20), engine.manifest.model)
    assert engine.metrics.runs["vision"] > 2


def test_preempted_while_drafts_are_verified() -> None:
    engine = fake_engine(slots=2, verify={2: 0.1, 5: 0.2}, speculate=4, prefill={64: 2.0})
    prompts = text_prompt(*[7, 8, 9] * 4), text_prompt(*[5, 6] * 5)
    answers = [oracle(prompt, params(40)) for prompt in prompts]
    sequences = [engine.add_request(prompt, params(40)) for prompt in prompts]
    for sequence, answer in zip(sequences, answers, strict=True):
        sequence.prompt_lookup = Guess(answer, np.random.default_rng(1))  # type: ignore[assignment]
    run(engine, every(engine, 6))
    assert all(each.preemptions for each in sequences) and engine.metrics.drafted
    assert [each.generated for each in sequences] == answers


def test_drafts_take_blocks_that_are_free_and_preempt_nobody() -> None:
    engine = fake_engine(slots=2, blocks=9, verify={5: 0.2}, speculate=4)
    prompt = text_prompt(*[7, 8] * 6)
    sequences = [engine.add_request(prompt, params(6, logit_bias={7: 100.0})) for _ in range(2)]
    run(engine)
    assert engine.metrics.drafted > 0
    assert sequences[0].generated == sequences[1].generated == [7] * 6
    assert engine.scheduler.preemptions == 0


def test_a_preempted_request_is_counted_once() -> None:
    engine = fake_engine(slots=2, prefill={64: 1.0})
    sequence = engine.add_request(TEN, params(8))
    run(engine, every(engine, 4))
    assert sequence.preemptions and engine.metrics.preemptions == sequence.preemptions
    assert engine.metrics.prompt_tokens == 10 and engine.metrics.reused_tokens == 0
    assert engine.metrics.finished == {"length": 1}
    assert sequence.times.first_token < sequence.times.finished


# --- Its end while it waits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_a_preempted_sequence_ends_with_the_tokens_that_it_has(how: str) -> None:
    now = [0.0]
    engine = fake_engine(slots=2)
    engine.clock = lambda: now[0]
    sequence = engine.new_sequence(TEN, params(deadline_s=5.0))
    engine.add(sequence)
    for _ in range(6):
        engine.step()
    engine.scheduler.preempt(sequence)
    if how == "cancelled":
        engine.cancel(sequence)
    else:
        now[0] = 6.0
        assert engine.expire() == [sequence]
    assert sequence.finish_reason == how and engine.scheduler.idle
    count = len(sequence.generated)
    assert 0 < count < 12 and sequence.generated == oracle(TEN, params())[:count]
    check_slots(engine)
    check_blocks(engine)


def test_a_turn_that_was_preempted_is_parked_where_it_ends() -> None:
    engine = fake_engine(slots=2, reuse=True)
    conversation = Conversation()
    turn = engine.new_sequence(TEN, params(8))
    engine.resume(turn, conversation)
    engine.add(turn)
    run(engine, every(engine, 3))
    slot = engine.slot_of(conversation)
    assert turn.preemptions and slot is not None and engine.cache.lengths[slot] == 17


# --- On onnxruntime ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(embedded_artifact: Path) -> Iterator[runtime.Model]:
    """Loaded here, with small blocks: one that other tests have used has counted its blocks."""
    with runtime.load(embedded_artifact, threads=1) as loaded:
        yield loaded


QUESTIONS = ["What is in the picture?", "Where is the circle? Tell me more about it.", "Hello!"]


@pytest.mark.parametrize("settings", ["greedy", "sampled", "penalties"])
def test_the_same_tokens_on_onnxruntime(model: runtime.Model, settings: str) -> None:
    chosen = params(40, **SETTINGS[settings])
    expected = model.generate(QUESTIONS, sampling=chosen)
    engine, preempt = model.engine, every(model.engine, 11)
    sequences = [model.new_sequence(model.processor.prompt(text), chosen) for text in QUESTIONS]
    for sequence in sequences:
        engine.add(sequence)
    run(engine, preempt)
    assert sum(sequence.preemptions for sequence in sequences) > 1
    assert [sequence.generated for sequence in sequences] == [out.token_ids for out in expected]


def test_streams_and_constraints_go_on(model: runtime.Model) -> None:
    """Pieces of text come once each, a form is kept, and a stop string that a preemption cuts in two ends the answer."""
    whole = model.generate(QUESTIONS[0], temperature=0.0, max_new_tokens=40, ignore_eos=True).text
    step, count = model.engine.step, [0]

    def stepped() -> Any:
        count[0] += 1
        if count[0] % 9 == 0 and model.engine.scheduler.running:
            model.engine.scheduler.preempt(model.engine.scheduler.running[-1])
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.engine, "step", stepped)
        pieces = list(model.stream(QUESTIONS[0], temperature=0.0, max_new_tokens=40, ignore_eos=True))
        stopped = model.generate(QUESTIONS[0], temperature=0.0, max_new_tokens=40, ignore_eos=True, stop=whole[10:14])
        formed = model.generate(QUESTIONS[0], temperature=0.0, regex="[a-c]{12}")
    assert "".join(pieces) == whole and len(pieces) > 3
    assert stopped.text == whole[: whole.index(whole[10:14])].rstrip()
    assert formed.text == model.generate(QUESTIONS[0], temperature=0.0, regex="[a-c]{12}").text
    assert len(formed.text) == 12
    assert model.engine.scheduler.preemptions > 1

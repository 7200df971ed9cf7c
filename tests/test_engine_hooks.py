"""What tools hand to an engine: tokens that are known beforehand, an observer of runs, the buckets that may run."""

from __future__ import annotations

import numpy as np
import pytest

from staticvl.runtime.engine.conversation import Conversation
from staticvl.runtime.engine.engine import Engine, GraphRun
from staticvl.runtime.engine.request import SamplingParams, Sequence

from .fakes import EOS, ROWS_PER_TILE, cross_prompt, fake_engine, image, image_prompt, oracle, run_all, text_prompt

PROMPT = text_prompt(3, 4, 5)
FORCED = [7, EOS, 9, 11]


def forced(sequence: Sequence) -> int:
    return FORCED[len(sequence.generated)]


def test_a_token_source_chooses_whatever_the_logits_say() -> None:
    """Logits and log-probabilities are the model's, bans do not apply, and the sequence beside it is sampled."""
    engine = fake_engine()
    params = SamplingParams(
        max_new_tokens=4, temperature=0.0, ignore_eos=True, logprobs=1, logit_bias={7: -100.0}, repetition_penalty=2.0
    )
    sequence = engine.new_sequence(PROMPT, params, return_logits=True, token_source=forced)
    engine.add(sequence)
    plain = SamplingParams(max_new_tokens=4, temperature=0.0)
    beside = engine.add_request(text_prompt(8, 9), plain)
    run_all(engine)
    assert (sequence.generated, sequence.finish_reason) == (FORCED, "length")
    assert beside.generated == oracle(text_prompt(8, 9), plain)
    assert [each.token_id for each in sequence.logprobs] == FORCED
    follow = [oracle(text_prompt(3, 4, 5, *FORCED[:n]), SamplingParams(max_new_tokens=1, temperature=0.0))[0] for n in range(4)]
    assert [int(row.argmax()) for row in sequence.logits] == follow


def test_what_ends_other_answers_ends_one_with_a_token_source() -> None:
    engine = fake_engine()
    sequence = engine.new_sequence(PROMPT, SamplingParams(max_new_tokens=4), token_source=forced)
    engine.add(sequence)
    run_all(engine)
    assert (sequence.generated, sequence.finish_reason) == (FORCED[:2], "stop")


def test_a_token_source_that_raises_ends_its_sequence_alone() -> None:
    engine = fake_engine()
    params = SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    bad = engine.new_sequence(PROMPT, params, token_source=forced)
    engine.add(bad)
    beside = engine.add_request(text_prompt(8, 9), params)
    while not engine.scheduler.idle:
        if len(bad.generated) == len(FORCED) and bad.finish_reason is None:
            with pytest.raises(IndexError):
                engine.step()
        else:
            engine.step()
    assert bad.finish_reason == "failed" and isinstance(bad.error, IndexError)
    assert beside.generated == oracle(text_prompt(8, 9), params)


def test_an_observer_sees_every_run_before_it_runs() -> None:
    engine = fake_engine(images=(1, 2), slots=2)
    runs: list[tuple[str, int, int, int]] = []

    def observe(run: GraphRun) -> None:
        runs.append((run.step.kind, run.slot, run.image, sum(engine.metrics.runs.values())))
        assert run.feed is engine.feeds.buffers[run.step.graph_key]

    engine.on_run = observe
    engine.add_request(text_prompt(3), SamplingParams(max_new_tokens=3, temperature=0.0, ignore_eos=True))
    engine.add_request(cross_prompt(((1, 1), 4), 5, ((1, 2), 6), 7), SamplingParams(max_new_tokens=1, temperature=0.0))
    steps = run_all(engine)
    assert [run[0] for run in runs] == [step.kind for step in steps]
    assert [run[3] for run in runs] == list(range(len(steps)))
    assert [run[1:3] for run in runs if run[0] == "vision"] == [(1, 0), (1, 1)]
    assert {run[1:3] for run in runs if run[0] == "decode"} == {(0, 0)}


def buckets_of(engine: Engine, *kinds: str) -> list[tuple[str, int]]:
    engine.add_request(image_prompt(*range(3, 9), *(image(n) for n in (1, 2, 3))), SamplingParams(max_new_tokens=1))
    return [(step.kind, step.bucket) for step in run_all(engine) if step.kind in kinds]


def test_only_some_buckets() -> None:
    engine = fake_engine(prefill={4: 1.0, 8: 1.5}, vision={1: 1.0, 3: 1.0}, prefill_budget=4)
    usual = buckets_of(engine, "vision", "prefill")
    with engine.scheduler.only({"vision": 1, "prefill": 4}):
        assert buckets_of(engine, "vision") == [("vision", 1)] * 3
        assert set(buckets_of(engine, "prefill")) == {("prefill", 4)}
    with engine.scheduler.only({"prefill": 8}):
        assert buckets_of(engine, "vision") == [("vision", 3)]
        assert set(buckets_of(engine, "prefill")) == {("prefill", 8)}
    with pytest.raises(KeyError), engine.scheduler.only({"prefill": 8}):
        raise KeyError
    assert buckets_of(engine, "vision", "prefill") == usual


def test_a_conversation_goes_on_in_its_slot() -> None:
    """With the features of its images, as far as they are the same; released, it leaves nothing behind."""
    engine = fake_engine(slots=3, reuse=True, prefill={4: 1.0})
    conversation, params = Conversation(), SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True)
    first = engine.new_sequence(image_prompt(5, image(1), 6), params)
    engine.resume(first, conversation)
    engine.add(first)
    assert first.tiles_done == 0 and engine.slot_of(conversation) is None
    run_all(engine)
    conversation.keep(first)
    slot = engine.slot_of(conversation)
    assert slot is not None and engine.cache.free == 2
    second = engine.new_sequence(image_prompt(5, image(1), 6, *first.generated, image(2), 8), params)
    engine.resume(second, conversation)
    assert second.tiles_done == 1
    np.testing.assert_array_equal(second.features[:ROWS_PER_TILE], first.features)
    engine.add(second)
    assert second.slot == slot and engine.slot_of(conversation) is None
    run_all(engine)
    assert second.generated == oracle(second.prompt, params)
    other = conversation.fork()
    assert engine.slot_of(other) is None and other.common_tiles(first.cache_keys.images) == 1
    assert other.common_tiles(image_prompt_keys(engine, image(2))) == 0
    engine.release(conversation)
    engine.release(other)
    assert engine.slot_of(conversation) is None and engine.cache.free == 3


def image_prompt_keys(engine: Engine, *images: np.ndarray) -> tuple[bytes, ...]:
    return engine.new_sequence(image_prompt(*images, 5), SamplingParams(max_new_tokens=1)).cache_keys.images

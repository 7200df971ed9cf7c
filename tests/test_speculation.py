"""Drafts that the model verifies: whatever is drafted, the answer is the one without drafts, and the cache holds what its
ledger says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from staticvl.runtime.artifact import RopeParameters
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.options import EngineOptions
from staticvl.runtime.engine.request import SamplingParams, Sequence
from staticvl.runtime.processor.prompt import Prompt
from staticvl.runtime.rope import ntk_factor
from staticvl.runtime.sampling.prompt_lookup import PromptLookup

from .fake_backend import FakeBackend
from .fakes import (
    FACTS,
    VOCAB,
    Guess,
    check_slots,
    cross_prompt,
    fake_engine,
    image,
    image_prompt,
    oracle,
    run_all,
    text_prompt,
)

VERIFY = {2: 1.0, 5: 1.2}
WIDE = {2: 1.0, 9: 1.2}  # tokens; the larger one does not fit after every token that the cache has room for


def lookup(*prompt: int, longest: int = 4, ngrams: tuple[int, int] = (2, 3)) -> PromptLookup:
    return PromptLookup(np.array(prompt), 50, longest, ngrams)


# --- What is drafted ---------------------------------------------------------------------------------------------------


def test_what_followed_the_last_tokens_before() -> None:
    assert lookup(1, 2, 3, 4, 5, 6, 7).draft([1, 2], 9) == (3, 4, 5, 6)
    assert lookup(1, 2, 3, 4, 5, 6, 7).draft([1, 2], 2) == (3, 4)
    assert lookup(1, 2, 3, 4).draft([9, 2], 9) == ()
    assert lookup(1, 2, 3, 4, ngrams=(1, 2)).draft([9, 2], 9) == (3, 4, 9, 2)
    assert lookup(1, 2, 3, 4).draft([1, 2], 0) == ()
    assert lookup().draft([1], 4) == lookup(1).draft([], 4) == ()


def test_the_longest_and_then_the_latest_n_gram_counts() -> None:
    assert lookup(8, 1, 2, 3, 9, 1, 2, 4).draft([8, 1, 2], 1) == (3,)
    assert lookup(8, 1, 2, 3, 9, 1, 2, 4).draft([1, 2], 1) == (4,)


def test_answers_are_looked_up_as_prompts_are() -> None:
    """Token by token, as they come, and however many at once."""
    drafts = lookup(0, 1)
    answer = [5, 6, 7, 5, 6, 7, 8, 5, 6]
    assert [drafts.draft(answer[:end], 1) for end in (2, 4, 5, 6, 9)] == [(), (), (7,), (5,), (7,)]


def test_a_repetition_goes_on() -> None:
    assert lookup(1, 2, 3).draft([1, 2, 3], 9) == (1, 2, 3, 1)
    assert lookup(4, 4).draft([4], 9) == (4, 4, 4, 4)


def test_images_and_marks_are_not_drafted() -> None:
    """They stand in prompts as -1, or as ids that have no logit."""
    assert lookup(1, 2, 3, -1, -1).draft([1, 2], 9) == (3,)
    assert lookup(1, 2, 50, 3).draft([1, 2], 9) == ()


def test_what_is_expected_of_a_draft() -> None:
    drafts = lookup()
    assert drafts.expected(1) == pytest.approx(2 / 3)
    assert drafts.expected(2) == pytest.approx(2 / 3 + 4 / 9)
    drafts.verified(right=4, count=4)
    better = drafts.expected(4)
    for _ in range(20):
        drafts.verified(right=0, count=4)
    worse = drafts.expected(4)
    assert better > 2.5 and worse < 0.4
    for _ in range(300):
        drafts.skipped()
    assert drafts.expected(1) == pytest.approx(2 / 3, abs=0.05)
    drafts.right = drafts.drafted
    assert drafts.expected(4) == 4


# --- What comes of it --------------------------------------------------------------------------------------------------


def check_ledger(engine: Engine) -> None:
    """Of prompts without images: what the backend keeps is what the ledger says."""
    backend = engine.backend
    assert isinstance(backend, FakeBackend)
    for slot, length in enumerate(engine.cache.lengths):
        values = engine.cache.keys[slot, :length, 0]
        if (values >= 0).all():
            assert np.array_equal(backend.kept[slot, :length], (values + 1) * (np.arange(length) + 1))


def answers(
    engine: Engine, requests: list[tuple[Prompt, SamplingParams]], truth: list[list[int]] | None, seed: int
) -> list[Sequence]:
    """Sequences that ran side by side; with `truth`, drafts come from it."""
    rng = np.random.default_rng(seed)
    sequences = [engine.new_sequence(prompt, params, return_logits=bool(i % 2)) for i, (prompt, params) in enumerate(requests)]
    for i, sequence in enumerate(sequences):
        if truth is not None and rng.random() < 0.8:
            sequence.prompt_lookup = Guess(truth[i], rng)  # type: ignore[assignment]
        engine.add(sequence)
    while not engine.scheduler.idle:
        engine.step()
        check_slots(engine)
        if not engine.manifest.cache.cross and not engine.manifest.model.rope.ntk_positions:
            check_ledger(engine)
    return sequences


def some_settings(rng: np.random.Generator, room: int) -> SamplingParams:
    chosen: dict[str, Any] = {
        "max_new_tokens": int(rng.integers(1, min(room, 25) + 1)) if rng.random() < 0.7 else room,
        "ignore_eos": bool(rng.random() < 0.5),
        "temperature": float(rng.choice([0.0, 0.0, 0.3])),
        "seed": int(rng.integers(99)),
    }
    if rng.random() < 0.3:
        chosen["stop_token_ids"] = tuple(map(int, rng.integers(3, VOCAB, 8)))
    if rng.random() < 0.3:
        chosen |= {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "min_new_tokens": 1, "logit_bias": {7: 0.6}}
    if rng.random() < 0.3:
        chosen["logprobs"] = 2
    return SamplingParams(**chosen)


@hypothesis_settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    slots=st.sampled_from([1, 2, 4]),
    cross=st.booleans(),
    reuse=st.booleans(),
    rope=st.sampled_from([FACTS.rope, RopeParameters(theta=1e8, ntk_positions=4, logn_positions=8)]),
)
def test_any_drafts_leave_answers_as_they_are(seed: int, slots: int, cross: bool, reuse: bool, rope: RopeParameters) -> None:
    """Up to the last row of the cache, in batches, with images of both ways, any rope, and whatever ends an answer."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, Any] = {"slots": slots, "context": 40, "prefill": {4: 1.0, 16: 2.5}, "images": (1, 2) if cross else ()}
    sizes["rope"] = rope
    requests = []
    for _ in range(6):
        ids = [int(i) for i in rng.integers(3, VOCAB, int(rng.integers(1, 9)))] * int(rng.integers(1, 3))
        shown = bool(rng.random() < 0.3)
        if cross:
            prompt = cross_prompt(*ids, *([((1, 2), 3)] if shown else []), 5, seed=seed % 100)
        else:
            prompt = image_prompt(*ids, *([image(int(rng.integers(99)))] if shown else []), 5)
        factor = ntk_factor(rope, prompt.length)
        prompt = replace(prompt, ntk=factor, state=np.full_like(prompt.state, int(factor)))
        requests.append((prompt, some_settings(rng, 40 - prompt.length)))
    plain = answers(fake_engine(**sizes), requests, None, seed)
    # What would have come after the end, so that drafts reach beyond it.
    endless = [SamplingParams(max_new_tokens=40 - prompt.length, temperature=0.0, ignore_eos=True) for prompt, _ in requests]
    truth = [
        done.generated + oracle(prompt, more)[len(done.generated) :] if not cross else done.generated
        for done, (prompt, _), more in zip(plain, requests, endless, strict=True)
    ]
    engine = fake_engine(**sizes, reuse=reuse, verify=WIDE, speculate=4)
    for wanted, got in zip(plain, answers(engine, requests, truth, seed), strict=True):
        assert (got.generated, got.finish_reason) == (wanted.generated, wanted.finish_reason)
        assert got.logprobs == wanted.logprobs
        assert np.array_equal(got.logits, wanted.logits)
    assert sum(engine.metrics.finished.values()) == 6


def test_right_drafts_save_runs() -> None:
    """Of 13 tokens the first comes from the prompt, the others from drafts of 4 and the token after each."""
    prompt, params = text_prompt(5, 7), SamplingParams(max_new_tokens=13, ignore_eos=True)
    truth = oracle(prompt, params)

    class Right(Guess):
        def draft(self, answer: list[int], most: int) -> tuple[int, ...]:
            return tuple(self.answer[len(answer) : len(answer) + most])

    engine = fake_engine(slots=1, verify=VERIFY, speculate=4)
    sequence = engine.add_request(prompt, params)
    sequence.prompt_lookup = Right(truth, np.random.default_rng(0))  # type: ignore[assignment]
    steps = [(step.kind, step.bucket, step.count) for step in run_all(engine)]
    assert sequence.generated == truth
    assert steps == [("prefill", 4, 2), ("verify", 5, 5), ("verify", 5, 5), ("verify", 2, 2)]
    assert engine.metrics.summary()["acceptance_rate"] == 1.0
    assert (engine.metrics.drafted, engine.metrics.accepted) == (9, 9)


def test_drafts_are_verified_where_that_is_worth_it() -> None:
    """By the times of the graphs, for one sequence, and for one of several while the others wait."""

    def kinds(verify_ms: float, rows: int) -> list[str]:
        engine = fake_engine(slots=4, verify={5: verify_ms}, decode={1: 1.0, 4: 1.5}, speculate=4)
        for _ in range(rows):
            # A prompt that repeats: there is a draft from the first token on, if it is not the first time that it is said.
            prompt = text_prompt(*range(10, 16), *range(10, 16))
            sequence = engine.add_request(prompt, SamplingParams(max_new_tokens=9, ignore_eos=True))
            assert sequence.prompt_lookup is not None
            sequence.prompt_lookup.draft = lambda answer, most: (7, 7, 7, 7)[:most]  # type: ignore[method-assign]
        return [step.kind for step in run_all(engine) if step.kind != "prefill"]

    assert kinds(1.5, 1)[0] == "verify"  # 1 + 2/3 + 4/9 tokens for one
    assert set(kinds(5.0, 1)) == {"decode"}
    assert "verify" not in kinds(1.5, 4)
    between = [len(list(drafts)) for kind, drafts in itertools.groupby(kinds(0.1, 4)) if kind == "verify"]
    assert max(between) == 4, between  # all together, and in between one after another
    assert "decode" in kinds(0.1, 4)


def test_without_drafts_nothing_changes() -> None:
    engine = fake_engine(slots=2, verify=VERIFY, speculate=4)
    engine.add_request(text_prompt(1, 2, 3), SamplingParams(max_new_tokens=2))
    assert {step.kind for step in run_all(engine)} == {"prefill", "decode"}
    assert engine.metrics.summary()["acceptance_rate"] == 0.0


def test_what_a_request_asks_for() -> None:
    engine = fake_engine(context=200, verify=VERIFY, speculate=3)
    made = [engine.new_sequence(text_prompt(1), SamplingParams(speculate=k)).prompt_lookup for k in (None, 0, 1, 4)]
    assert [each and each.longest for each in made] == [3, None, 1, 4]
    with pytest.raises(ValueError, match=r"speculate is 5, but the artifact verifies at most 4 drafted tokens.*--speculate 5"):
        engine.new_sequence(text_prompt(1), SamplingParams(speculate=5))
    with pytest.raises(ValueError, match=r"speculate is 1, but the artifact verifies at most 0 .*--speculate 1"):
        fake_engine(speculate=1)
    with pytest.raises(ValueError, match="speculate is -1; expected at least 0"):
        SamplingParams(speculate=-1)
    for ngrams in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match=r"ngrams is .*; expected the fewest and the most tokens"):
            EngineOptions(ngrams=ngrams)

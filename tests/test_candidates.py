"""Tokens chosen among a graph's candidates: the very ones that whole rows give, and no row is looked at where they decide."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from staticvl.runtime.artifact import GraphSpec
from staticvl.runtime.backends.base import Result
from staticvl.runtime.engine.request import SamplingParams, Sequence
from staticvl.runtime.sampling import candidates, sampler
from staticvl.runtime.sampling.candidates import Candidates
from staticvl.runtime.sampling.params import ResolvedSampling
from staticvl.runtime.sampling.sampler import sample

from .fakes import Guess, fake_artifact, fake_engine, oracle, run_all, text_prompt
from .rank_threads import MeetingBackend, ranks_as_threads


def settings(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, min_p: float = 0.0
) -> ResolvedSampling:
    return ResolvedSampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, min_p=min_p)


def found(row: np.ndarray, count: int, chosen: ResolvedSampling, seed: int = 0, off: float = 0.0) -> Candidates:
    """What a device may say of one row: equals in any order, and a sum that is off by a share of itself."""
    order = np.lexsort((np.random.default_rng(seed).random(len(row)), -row))[:count].astype(np.int32)
    with np.errstate(over="ignore", invalid="ignore"):
        denominator = np.exp((row.astype(np.float64) - row.max()) / (chosen.temperature or 1.0)).sum() * (1 + off)
    return Candidates(row[order][None], order[None], np.array([denominator], np.float32))


def choose(row: np.ndarray, count: int, chosen: ResolvedSampling, used: int, **device: Any) -> int | None:
    return found(row, count, chosen, **device).choose(0, chosen, 0, used=used, vocab=len(row))


@hypothesis_settings(max_examples=400)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 400),
    levels=st.sampled_from([1, 3, 50, 10_000]),
    spread=st.sampled_from([0.1, 3.0, 20.0]),
    count=st.integers(1, 40),
    unused=st.integers(0, 5),
    hidden=st.sampled_from([0.0, 0.9, 1.0]),
    off=st.sampled_from([-9e-4, 0.0, 9e-4]),
    chosen=st.builds(
        settings,
        st.sampled_from([0.0, 0.3, 1.0, 4.0]),
        top_k=st.sampled_from([0, 0, 1, 7, 60]),
        top_p=st.sampled_from([1.0, 0.95, 0.5]),
        min_p=st.sampled_from([0.0, 0.05, 0.9]),
        seed=st.integers(0, 1000),
    ),
)
@example(  # two equal tokens share the row but for 1e-10, which a sum in float32 loses: the first is all of top_p
    seed=8700,
    size=91,
    levels=3,
    spread=20.0,
    count=5,
    unused=0,
    hidden=0.9,
    off=-9e-4,
    chosen=settings(0.3, top_p=0.5, seed=246),
)
def test_candidates_never_decide_otherwise(
    seed: int, size: int, levels: int, spread: float, count: int, unused: int, hidden: float, off: float, chosen: Any
) -> None:
    rng = np.random.default_rng(seed)
    row = (rng.integers(0, levels, size) / levels * spread).astype(np.float32)
    row[rng.random(size) < (hidden if seed % 4 == 0 else 0)] = -np.inf
    used = max(1, size - unused)
    token = choose(row, min(count, size), chosen, used, seed=seed, off=off)
    assert token in (None, sample(row, chosen, 0, used))


def rows(number: int, vocab: int = 5000) -> np.ndarray:
    """As a model's: noise, and a few likely tokens."""
    rng = np.random.default_rng(3)
    found = rng.standard_normal((number, vocab)).astype(np.float32) * 2
    for row in found:
        row[rng.choice(vocab - 50, 40, replace=False)] += np.linspace(18, 6, 40, dtype=np.float32)
    return found


@pytest.mark.parametrize(
    ("chosen", "least"),
    [
        (settings(0.0), 1.0),
        (settings(0.7, top_k=50), 1.0),
        (settings(1.0, top_k=20, top_p=0.8), 1.0),
        (settings(0.6, top_p=0.9), 0.95),
        (settings(1.0), 0.95),
        (settings(1.0, min_p=0.05), 0.95),
    ],
)
def test_candidates_nearly_always_decide(chosen: ResolvedSampling, least: float) -> None:
    made = rows(200)
    decided = [choose(row, 64, chosen, 4990) for row in made]
    assert np.mean([token is not None for token in decided]) >= least
    for token, row in zip(decided, made, strict=True):
        assert token in (None, sample(row, chosen, 0, 4990))


def test_what_candidates_cannot_tell() -> None:
    row = np.array([3, 2, 2, 1, 1, 0, -1, -2], np.float32)
    assert choose(row, 2, settings(0.0), 8) == 0
    assert choose(row[1:], 1, settings(0.0), 7) is None  # another may be as large
    assert choose(row[1:], 2, settings(0.0), 7) is None
    assert choose(row[1:], 3, settings(0.0), 7) == 0  # the lower id of two
    assert choose(row, 4, settings(top_k=3), 8) in (0, 1, 2)
    assert choose(row, 4, settings(top_k=4), 8) is None  # one of the two that equal the smallest
    assert choose(row[::-1].copy(), 5, settings(top_k=1), 7) is None  # the likeliest is not to be drawn
    assert choose(row[::-1].copy(), 5, settings(0.0), 7) == 7  # but greedy takes it
    for denominator in (np.nan, np.inf, 0.0):
        given = found(row, 6, settings())
        assert (
            Candidates(given.logits, given.ids, np.array([denominator], np.float32)).choose(0, settings(), 0, used=8, vocab=8)
            is None
        )


@pytest.mark.parametrize("chosen", [settings(), settings(top_p=0.5)])
def test_a_draw_that_the_error_of_the_sum_could_turn_is_left_to_the_row(chosen: ResolvedSampling) -> None:
    """Just below and just above the border between two tokens, the sum being off either way, and far from every border."""
    row = np.linspace(3, 0, 50, dtype=np.float32)
    shares = np.exp(row.astype(np.float64) - 3)
    shares /= shares.sum()
    kept = 50 if chosen.top_p == 1 else int(np.searchsorted(np.cumsum(shares), 0.5)) + 1
    border = shares[:2].sum() / shares[:kept].sum()
    for off in (-9e-4, 9e-4):
        for number in (border * 0.99999, border * 1.00001, border * 0.9):
            with (
                mock.patch.object(candidates, "uniform", return_value=number),
                mock.patch.object(sampler, "uniform", return_value=number),
            ):
                token = choose(row, 40, chosen, 50, off=off)
                assert token in (None, sample(row, chosen, 0, 50))
                assert number < border * 0.95 or chosen.top_p < 1 or token is None
    # What top-p keeps depends on the sum, and the draw on what it keeps.
    with mock.patch.object(candidates, "uniform", return_value=0.999999):
        edge = settings(top_p=float(np.cumsum(shares)[9]) * 1.0001)
        assert choose(row, 40, edge, 50) is None


def test_the_share_of_ids_that_are_never_drawn_is_taken_off() -> None:
    """Half of the row's mass is theirs, of which the candidates show but a part."""
    row = np.concatenate([np.linspace(3, 0, 40), np.linspace(2.9, 0, 40)]).astype(np.float32)
    decided = 0
    for seed in range(60):
        chosen = settings(top_p=0.6, seed=seed)
        token = choose(row, 60, chosen, 40)
        assert token in (None, sample(row, chosen, 0, 40))
        decided += token is not None
    assert decided > 10


# --- The engine ---------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"candidates": 8, "prefill": {4: 1.0, 16: 2.5}, "context": 96, "slots": 3}


def ask(engine: Any, *requests: SamplingParams, **settings: Any) -> list[Sequence]:
    sequences = [engine.add_request(text_prompt(5, 7 + i), each, **settings) for i, each in enumerate(requests)]
    run_all(engine)
    return sequences


def test_greedy_answers_need_no_row() -> None:
    engine = fake_engine(**SIZES)
    greedy = SamplingParams(max_new_tokens=9, temperature=0.0, ignore_eos=True)
    for i, sequence in enumerate(ask(engine, greedy, greedy)):
        assert sequence.generated == oracle(text_prompt(5, 7 + i), greedy)
    assert engine.backend.fetched == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wanted", "keep", "rows"),
    [
        ({"temperature": 0.0, "logit_bias": {3: 5.0}}, False, 6),
        ({"temperature": 0.0, "repetition_penalty": 1.5}, False, 6),
        ({"temperature": 0.0, "logprobs": 2}, False, 6),
        ({"temperature": 0.0}, True, 6),
        ({"temperature": 1.0, "top_k": 30, "seed": 4}, False, 6),  # more than there are candidates
        ({"temperature": 1.0, "seed": 4}, False, 5),  # one draw is decided by the one token that is likelier than all others
    ],
)
def test_whoever_wants_more_gets_his_own_row_alone(wanted: dict[str, Any], keep: bool, rows: int) -> None:
    """The same tokens as without candidates; the row of the greedy request beside it is not looked at."""
    greedy = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=0.0)
    params = replace(greedy, **wanted)
    answers = []
    for count in (8, 0):
        engine = fake_engine(**{**SIZES, "candidates": count})
        sequences = [
            engine.add_request(text_prompt(5, 7), greedy),
            engine.add_request(text_prompt(5, 8), params, return_logits=keep),
        ]
        run_all(engine)
        answers.append([(each.generated, each.logprobs, len(each.logits)) for each in sequences])
        if count:
            assert engine.backend.fetched == rows  # type: ignore[attr-defined]
    assert answers[0] == answers[1]


def test_a_draw_at_a_temperature_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one batch are fed what they are to be weighed with, greedy ones 1."""
    engine, fed = fake_engine(**SIZES), []
    run = engine.backend.run
    monkeypatch.setattr(
        engine.backend,
        "run",
        lambda graph, feed, *at: (fed.append((graph.kind, feed["inverse_temperature"].tolist())), run(graph, feed, *at))[1],
    )
    ask(engine, *(SamplingParams(max_new_tokens=2, temperature=t, ignore_eos=True, seed=0) for t in (0.5, 0.0, 4.0)))
    assert [factor for kind, factor in fed if kind == "prefill"] == [[2.0], [1.0], [0.25]]
    assert [2.0, 1.0, 0.25] in [factor for kind, factor in fed if kind == "decode"]


def test_drafts_are_verified_without_a_row() -> None:
    engine = fake_engine(**SIZES, verify={5: 1.2}, speculate=4)
    params = SamplingParams(max_new_tokens=30, temperature=0.0, ignore_eos=True)
    sequence = engine.new_sequence(text_prompt(5, 7), params)
    answer = oracle(text_prompt(5, 7), params)
    sequence.prompt_lookup = Guess(answer, np.random.default_rng(0))  # type: ignore[assignment]
    engine.add(sequence)
    run_all(engine)
    assert sequence.generated == answer
    assert engine.metrics.accepted > 5
    assert engine.backend.fetched == 0  # type: ignore[attr-defined]


def test_a_rank_fetches_rows_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on a device is brought by the thread that has opened it; the other ranks bring nothing."""
    threads: list[str] = []
    backends: list[MeetingBackend] = []

    class Device(MeetingBackend):
        def run(self, graph: GraphSpec, feed: Any, slot: int = 0, image: int = 0) -> Result:
            result = super().run(graph, feed, slot, image)

            def fetch(rows: slice) -> np.ndarray:
                threads.append(threading.current_thread().name)
                return result.fetch(rows)

            return replace(result, fetch=fetch, on_host=False)

    def make(rank: int, artifact: Any, group: Any) -> MeetingBackend:
        backends.append(Device(artifact, group))
        return backends[-1]

    with ranks_as_threads(monkeypatch, fake_artifact(**SIZES), 2, make=make) as (engine, _):
        greedy = SamplingParams(max_new_tokens=3, temperature=0.0, ignore_eos=True)
        (first,) = ask(engine, greedy)
        assert first.generated == oracle(text_prompt(5, 7), greedy) and not threads
        (second,) = ask(engine, SamplingParams(max_new_tokens=3, temperature=0.0, ignore_eos=True, logprobs=1))
        assert second.generated == first.generated
        assert threads == ["rank 0"] * 3
        assert sorted(each.fetched for each in backends) == [0, 3]

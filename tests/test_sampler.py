"""The next token, against distributions computed by enumeration."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from staticvl.runtime.artifact import SamplingDefaults
from staticvl.runtime.sampling import sampler
from staticvl.runtime.sampling.params import ResolvedSampling, SamplingParams
from staticvl.runtime.sampling.sampler import logprob_of, sample, uniform
from staticvl.runtime.sampling.top_logits import BLOCK, top_k_ids

GRID = 500


def settings(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, min_p: float = 0.0
) -> ResolvedSampling:
    return ResolvedSampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, min_p=min_p)


def expected(logits: list[float], temperature: float, top_k: int, top_p: float, used: int, min_p: float = 0.0) -> list[float]:
    """The distribution by its definition, one token at a time."""
    weights = [np.exp(value / temperature) for value in logits[:used]]
    ranked = sorted(range(used), key=lambda i: (-weights[i], i))[: top_k or used]
    total, before, kept = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if before < top_p and weights[i] >= min_p * weights[ranked[0]]:
            kept.append(i)
        before += weights[i] / total
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


def measured(logits: list[float], chosen: ResolvedSampling, used: int) -> np.ndarray:
    """How often each token is drawn when the random number walks evenly through [0, 1)."""
    row = np.array(logits, np.float32)
    with mock.patch.object(sampler, "uniform", side_effect=[(i + 0.5) / GRID for i in range(GRID)]):
        drawn = [sample(row, chosen, 0, used) for _ in range(GRID)]
    return np.bincount(drawn, minlength=len(logits)) / GRID


LOGITS = [0.3, 2.0, -1.0, 2.5, 0.9, 1.7, 8.0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """The grid gives every token its probability to within one step; the last id, the likeliest by far, is not used."""
    used = 6
    chosen = settings(temperature, top_k, top_p)
    wanted = expected(LOGITS, temperature, top_k, top_p, used)
    np.testing.assert_allclose(measured(LOGITS, chosen, used), wanted, atol=1.001 / GRID)


@pytest.mark.parametrize("min_p", [1e-3, 0.1, 0.4, 1.0])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.5, 0.9)])
def test_distribution_with_min_p(min_p: float, temperature: float, top_p: float) -> None:
    chosen = settings(temperature, top_p=top_p, min_p=min_p)
    wanted = expected(LOGITS, temperature, 0, top_p, 6, min_p)
    np.testing.assert_allclose(measured(LOGITS, chosen, 6), wanted, atol=1.001 / GRID)


def test_what_is_forbidden_is_never_drawn() -> None:
    """Not even by the largest random number, with the smallest temperature or the flattest."""
    row = np.array([0.0, -np.inf, 1.0, -np.inf], np.float32)
    for temperature in (1e-3, 1.0, 1e6):
        for draw in (0.0, 0.5, 1 - 2**-53):
            with mock.patch.object(sampler, "uniform", return_value=draw):
                assert sample(row, settings(temperature, top_k=4), 0, 4) in (0, 2)


def test_equal_logits_keep_the_lower_ids() -> None:
    np.testing.assert_allclose(measured([1.0] * 100, settings(top_k=2), 100), [0.5, 0.5] + [0] * 98)


def test_a_draw_on_the_border_takes_the_next_token() -> None:
    """Random numbers are in [0, 1), so each token has the lower end of its share."""
    for draw, token in ((0.0, 0), (0.49, 0), (0.5, 1)):
        with mock.patch.object(sampler, "uniform", return_value=draw):
            assert sample(np.zeros(2, np.float32), settings(), 0, 2) == token


def test_top_p_stops_exactly_at_its_bound() -> None:
    """Four equal tokens: half the probability is two of them, a little more is three."""
    row = [0.0] * 4
    assert np.count_nonzero(measured(row, settings(top_p=0.5), 4)) == 2
    assert np.count_nonzero(measured(row, settings(top_p=0.51), 4)) == 3


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12),
    draw=st.floats(0, 1, exclude_max=True),
    chosen=st.builds(settings, st.sampled_from([1e-3, 0.7, 1.0, 100.0]), top_k=st.integers(0, 14), top_p=st.floats(1e-6, 1)),
    unused=st.integers(0, 5),
)
def test_a_drawn_token_is_one_that_may_be(logits: list[float], draw: float, chosen: ResolvedSampling, unused: int) -> None:
    row = np.array([*logits, *[1e4] * unused], np.float32)
    with mock.patch.object(sampler, "uniform", return_value=draw):
        token = sample(row, chosen, 0, len(logits))
    assert token < len(logits)
    larger = sum(value > row[token] for value in row[: len(logits)])
    assert not chosen.top_k or larger < chosen.top_k


def test_greedy_takes_the_first_of_the_largest_of_the_whole_row() -> None:
    """Also above the ids that are used, as the reference does."""
    assert sample(np.array([1, 5, 5, 2], np.float32), settings(0.0), 0, 4) == 1
    assert sample(np.array([1, 5, 5, 9], np.float32), settings(0.0, top_k=2, top_p=0.1), 0, 3) == 3


def whole(row: np.ndarray, chosen: ResolvedSampling, used: int) -> int:
    """As `sample`, every token looked at from the start."""
    with mock.patch.object(sampler, "FEW", len(row)):
        return sample(row, chosen, 0, used)


@pytest.mark.parametrize(
    ("chosen", "number", "token"),
    [
        (settings(), 0.03, 6),
        (settings(), 0.9, 180),
        (settings(top_p=0.5), 0.03, 3),
        (settings(top_p=0.5), 0.9, 90),
        (settings(min_p=0.5), 0.9, 180),
        (settings(top_k=100), 0.9, 90),
    ],
)
def test_a_draw_that_a_few_tokens_do_not_decide(chosen: ResolvedSampling, number: float, token: int) -> None:
    with mock.patch.object(sampler, "uniform", return_value=number + 1e-9), mock.patch.object(sampler, "FEW", 5):
        assert sample(np.zeros(200, np.float32), chosen, 0, 200) == token


@hypothesis_settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 700),
    levels=st.sampled_from([1, 3, 50, 10_000]),
    spread=st.sampled_from([0.1, 3.0, 20.0]),
    few=st.integers(1, 40),
    chosen=st.builds(
        settings,
        st.sampled_from([0.0, 0.3, 1.0, 4.0]),
        top_k=st.sampled_from([0, 0, 1, 7, 300, 1000]),
        top_p=st.sampled_from([1.0, 1.0, 0.5, 0.95, 0.999999]),
        min_p=st.sampled_from([0.0, 0.0, 0.2, 1e-4]),
    ),
    banned=st.sampled_from([0.0, 0.0, 0.5, 0.99]),
    number=st.sampled_from([0.0, 0.01, 0.03, 0.1, 0.5, 0.9, 1 - 2**-53]),
)
def test_a_few_tokens_decide_as_all_do(
    seed: int, size: int, levels: int, spread: float, few: int, chosen: ResolvedSampling, banned: float, number: float
) -> None:
    """With many equal logits and forbidden ones, however few are looked at first."""
    rng = np.random.default_rng(seed)
    row = (rng.integers(0, levels, size) / levels * spread).astype(np.float32)
    row[rng.random(size) < banned] = -np.inf
    row[rng.integers(size)] = spread / 2
    used = int(rng.integers(1, size + 1))
    with mock.patch.object(sampler, "uniform", return_value=number):
        with mock.patch.object(sampler, "FEW", few), mock.patch.object(sampler, "MANY", 3 * few):
            token = sample(row, chosen, 0, used)
        assert token == whole(row, chosen, used)
    if chosen.temperature and np.isfinite(row[:used]).any():
        assert token < used and np.isfinite(row[token])


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 2000),
    levels=st.sampled_from([1, 2, 20, 10_000]),
    count=st.integers(0, 300),
    banned=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
)
def test_the_likeliest(seed: int, size: int, levels: int, count: int, banned: float) -> None:
    """As sorting finds them, lower ids first among equals; what is forbidden only where everything is."""
    rng = np.random.default_rng(seed)
    row = (rng.integers(-levels, levels, size) / levels).astype(np.float32)
    row[rng.random(size) < banned] = -np.inf
    found = top_k_ids(row, count).tolist()
    wanted = sorted(range(size), key=lambda i: (-row[i], i))[:count]
    allowed = [i for i in wanted if row[i] > -np.inf]
    assert found == (allowed or wanted)


def test_the_likeliest_lie_in_blocks_of_their_own() -> None:
    """So that the threshold lets through exactly as many as are wanted."""
    row = np.zeros(30 * BLOCK, np.float32)
    places = np.random.default_rng(0).permutation(30) * BLOCK + 5
    row[places] = np.arange(30, 0, -1)
    for count in (1, 2, 15, 29):
        assert top_k_ids(row, count).tolist() == places[:count].tolist()


def test_log_probabilities_of_the_likeliest() -> None:
    row = np.array([1, 3, 3, -np.inf, 2], np.float32)
    found = logprob_of(row, 2, 3)
    total = np.log(np.exp(row.astype(np.float64)).sum())
    assert [i for i, _ in found.top] == [1, 2, 4]
    np.testing.assert_allclose([found.logprob, *(value for _, value in found.top)], np.array([3, 3, 3, 2]) - total)


def test_most_draws_look_at_few_tokens() -> None:
    """No row of a large vocabulary is sorted for an ordinary draw."""
    row = np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
    row[:30] += np.linspace(20, 10, 30, dtype=np.float32)
    looked: list[int] = []
    with mock.patch.object(sampler, "top_k_ids", side_effect=lambda row, count: looked.append(count) or top_k_ids(row, count)):
        for seed in range(20):
            sample(row, settings(0.7, top_p=0.95, seed=seed), 0, len(row))
            sample(row, settings(1.0, seed=seed), 0, len(row))
            sample(row, settings(2.0, top_k=50, seed=seed), 0, len(row))
    assert set(looked) == {sampler.FEW, 50}


def test_large_logits_stay_finite() -> None:
    row = np.array([3e38, -3e38, 0], np.float32)
    for temperature in (1e-3, 1e-300, 5.0):
        assert sample(row, settings(temperature), 0, 3) == sample(row, settings(temperature, top_p=0.5), 0, 3) == 0


def test_draws_are_uniform_and_independent() -> None:
    """Means and correlations of many draws, within five standard deviations; positions and seeds do not repeat each other."""
    draws = np.array([[uniform(seed, position) for position in range(100)] for seed in range(100)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 100
    assert len(np.unique(draws)) == draws.size
    for one, next_one in ((draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])):
        assert abs(np.corrcoef(one.ravel(), next_one.ravel())[0, 1]) < 5 / 100


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    first = uniform(7, 3)
    uniform(8, 3)
    assert uniform(7, 3) == first
    assert uniform(7, 4) != first
    assert uniform(8, 3) != first
    assert uniform(7, 3, 1) not in (first, uniform(7, 4), uniform(8, 3), uniform(7, 1))
    assert uniform(7, 3, 0) == first


@pytest.mark.parametrize(
    ("unusable", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; expected an integer"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'; expected an integer"),
        ({"temperature": -0.1}, "temperature is -0.1; expected 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature is nan; expected 0 (greedy) or more"),
        ({"temperature": float("inf")}, "temperature is inf; expected 0 (greedy) or more"),
        ({"top_k": -1}, "top_k is -1; expected 0 (no limit) or more"),
        ({"top_k": 1.5}, "top_k is 1.5; expected an integer"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1; expected a number above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p is nan; expected a number above 0 and at most 1"),
        ({"seed": -1}, "seed is -1; expected 0 to 2**64 - 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected 0 to 2**64 - 1"),
        ({"seed": 0.5}, "seed is 0.5; expected an integer"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1; expected at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9; expected at most max_new_tokens, which is 8"),
        ({"n": 0}, "n is 0; expected at least 1"),
        ({"logprobs": -1}, "logprobs is -1; expected at least 0"),
        ({"min_p": 1.5}, "min_p is 1.5; expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number above 0; 1 changes nothing"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf; expected a finite number"),
        ({"frequency_penalty": "a"}, "frequency_penalty is a; expected a finite number"),
        ({"deadline_s": 0}, "deadline_s is 0; expected a number of seconds above 0"),
        ({"logit_bias": {5: float("nan")}}, "the logit_bias of token 5 is nan; expected a finite number"),
        ({"logit_bias": {-1: 1.0}}, "a token id of stop_token_ids or logit_bias is -1; expected at least 0"),
        ({"stop_token_ids": ("a",)}, "a token id of stop_token_ids or logit_bias is 'a'; expected an integer"),
        ({"bad_words": ("",)}, "bad_words holds an empty text; expected texts of at least one character"),
        ({"choice": ("a", "")}, "choice holds an empty text; expected texts of at least one character"),
        ({"regex": "a", "choice": ("a",)}, "regex and choice were given; expected one of them at most"),
        ({"regex": "a", "ignore_eos": True}, "regex was given with ignore_eos; a constrained answer ends by itself"),
        ({"stop": (3,)}, "stop is (3,); expected text or a sequence of texts"),
    ],
)
def test_unusable_settings(unusable: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**unusable)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_one_stop_string_is_not_taken_apart() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_what_is_left_open_comes_from_the_checkpoint() -> None:
    defaults = SamplingDefaults(do_sample=True, temperature=0.6, top_p=0.9, top_k=40)
    got = SamplingParams(top_k=3, seed=5).resolved(defaults)
    assert got == settings(0.6, 3, 0.9, 5)
    assert SamplingParams(temperature=0.0).resolved(defaults).temperature == 0


def test_greedy_unless_sampling_is_asked_for() -> None:
    defaults = SamplingDefaults()
    assert SamplingParams().resolved(defaults).temperature == 0
    for params in (SamplingParams(top_k=5), SamplingParams(top_p=0.5), SamplingParams(seed=1)):
        assert params.resolved(defaults).temperature == 1


def test_a_seed_of_its_own_for_each_request() -> None:
    assert len({SamplingParams(temperature=1.0).resolved(SamplingDefaults()).seed for _ in range(20)}) == 20

"""Logits -> the next token of each sequence.

Random numbers come from a counter (seed, answer, position in it), so a draw does not depend on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .params import ResolvedSampling
from .top_logits import softmax_denominator, top_k_ids

FEW, MANY = 64, 4096  # numbers of top tokens that a draw reads first


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities, before temperature, penalties and bans."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the top tokens with theirs, falling


def sample(logits: np.ndarray, sampling: ResolvedSampling, position: int, used: int) -> int:
    """Choose from logits [V] float32; `position` counts the tokens generated before; ids from `used` on are never drawn.

    Greedy takes the largest logit of the whole row, as the reference does. Otherwise: divide by the temperature, keep the
    top_k largest, keep the smallest set whose probability reaches top_p (Holtzman et al. 2020), of it the tokens with at least
    min_p times the largest probability (Nguyen et al. 2024), draw. A logit of -inf is never chosen if there is another.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    row, number = logits[:used], uniform(sampling.seed, position, sampling.index)
    # A few tokens have nearly all of the probability, nearly always; only a draw that is not decided among them needs more.
    for count in (sampling.top_k,) if sampling.top_k else (FEW, MANY, used):
        ids = top_k_ids(row, count)
        if row[ids[0]] == -np.inf:
            return int(ids[0])
        complete = len(ids) < count or count >= len(row) or bool(sampling.top_k)
        total = 0.0 if sampling.top_k else softmax_denominator(row, sampling.temperature)
        token = drawn(ids, row[ids], sampling, number, total, complete=complete)
        if token is not None:
            return token
    raise AssertionError("all tokens decide a draw")


def drawn(
    ids: np.ndarray, logits: np.ndarray, sampling: ResolvedSampling, number: float, total: float = 0.0, *, complete: bool
) -> int | None:
    """The token that `number` in [0, 1) draws, if the top tokens `ids` [n] decide it; None if more are needed.

    logits [n] are theirs, falling. `total`: the softmax denominator of all tokens that may be drawn; with top_k, whose tokens
    these then are, what they add up to. `complete`: no other token may be drawn.

    The same token whatever n is, to the bit: sums run over the top tokens in order, or over the whole row by id.
    """
    below = logits.astype(np.float64) - logits[0]
    with np.errstate(over="ignore"):
        probabilities = np.exp(below / sampling.temperature)
    cumulative = np.cumsum(probabilities)
    total = float(cumulative[-1]) if sampling.top_k else total
    count = len(ids)
    if sampling.top_p < 1:
        # A token stays while the probability before it is below top_p, so at least one stays.
        count = min(count, int(np.searchsorted(cumulative / total, sampling.top_p)) + 1)
    if sampling.min_p > 0:
        count = min(count, int(np.count_nonzero(probabilities >= sampling.min_p)))  # the largest is 1
    if count < len(ids):
        total, complete = float(cumulative[count - 1]), True
    place = int(np.searchsorted(cumulative[:count], number * total, side="right"))
    if place < count:
        # After the last of these tokens there may be others that stay, which make the sum larger.
        return int(ids[place]) if complete or _all_stay(sampling) else None
    return int(ids[count - 1]) if complete else None


def _all_stay(sampling: ResolvedSampling) -> bool:
    return not sampling.top_k and sampling.top_p == 1 and sampling.min_p == 0


def uniform(seed: int, position: int, index: int = 0) -> float:
    """A number in [0, 1) that depends on its arguments alone (Philox, Salmon et al. 2011)."""
    counter = [position, index, 0, 0]  # words of 64 bits
    return float(np.random.Generator(np.random.Philox(key=seed, counter=counter)).random())


def logprob_of(logits: np.ndarray, token_id: int, top: int) -> TokenLogprob:
    """The logarithm of a token's probability under logits [V], and the `top` largest; lower ids first among equals."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    return TokenLogprob(token_id, float(row[token_id]), tuple((int(i), float(row[i])) for i in top_k_ids(logits, top)))

"""Logits -> the next token of each sequence.

Random numbers come from a counter (seed, answer, position in it), so a draw does not depend on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .sampling import ResolvedSampling


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities, before temperature, penalties and bans."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens with theirs, falling


def sample(logits: np.ndarray, sampling: ResolvedSampling, position: int, used: int) -> int:
    """Choose from logits [V] float32; `position` counts the tokens generated before; ids from `used` on are never drawn.

    Greedy takes the largest logit of the whole row, as the reference does. Otherwise: divide by the temperature, keep the
    top_k largest, keep the smallest set whose probability reaches top_p (Holtzman et al. 2020), of it what is at least min_p
    times as likely as the likeliest (Nguyen et al. 2024), draw. A logit of -inf is never chosen if there is another.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    candidates = logits[:used].astype(np.float64) / sampling.temperature
    order = np.argsort(-candidates, kind="stable")[: sampling.top_k or None]
    probabilities = np.exp(candidates[order] - candidates[order[0]])
    kept = len(order)
    if sampling.top_p < 1:
        # A token stays while the probability before it is below top_p, so at least one stays.
        shares = np.cumsum(probabilities / probabilities.sum())
        kept = min(kept, int(np.searchsorted(shares, sampling.top_p)) + 1)
    if sampling.min_p > 0:
        kept = min(kept, int(np.count_nonzero(probabilities >= sampling.min_p)))  # the likeliest has 1
    cumulative = np.cumsum(probabilities[:kept])
    draw = uniform(sampling.seed, position, sampling.index) * cumulative[-1]
    return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), kept - 1)])


def uniform(seed: int, position: int, index: int = 0) -> float:
    """A number in [0, 1) that depends on its arguments alone (Philox, Salmon et al. 2011)."""
    counter = [position, index, 0, 0]  # words of 64 bits
    return float(np.random.Generator(np.random.Philox(key=seed, counter=counter)).random())


def logprob_of(logits: np.ndarray, token_id: int, top: int) -> TokenLogprob:
    """The logarithm of a token's probability under logits [V], and the `top` likeliest; lower ids first among equals."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    likeliest = np.argsort(-row, kind="stable")[:top]
    return TokenLogprob(token_id, float(row[token_id]), tuple((int(i), float(row[i])) for i in likeliest))

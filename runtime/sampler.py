"""Logits -> the next token of each sequence.

Random numbers come from a counter (seed, position in the answer), so a draw does not depend on what else is in the batch.
"""

from __future__ import annotations

import numpy as np

from .request import ResolvedSampling


def sample(logits: np.ndarray, sampling: ResolvedSampling, position: int, used: int) -> int:
    """Choose from logits [V] float32; `position` counts the tokens generated before; ids from `used` on are never drawn.

    Greedy takes the largest logit of the whole row, as the reference does. Otherwise: divide by the temperature, keep the
    top_k largest, keep the smallest set whose probability reaches top_p (Holtzman et al. 2020), draw.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    candidates = logits[:used].astype(np.float64) / sampling.temperature
    order = np.argsort(-candidates, kind="stable")[: sampling.top_k or None]
    probabilities = np.exp(candidates[order] - candidates[order[0]])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        # A token stays while the probability before it is below top_p, so at least one stays.
        kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:kept], probabilities[:kept]
    cumulative = np.cumsum(probabilities)
    draw = uniform(sampling.seed, position) * cumulative[-1]
    return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), len(order) - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone (Philox, Salmon et al. 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())

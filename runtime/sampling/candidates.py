"""The top-k tokens of rows of logits, as a graph computes them, and a choice among them.

R rows, K candidates each. A token that they decide is the one that the whole row decides (sampler.py); where they do not
decide, the caller reads the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..artifact import CANDIDATES
from .params import ResolvedSampling
from .sampler import drawn, uniform

# How far off a device's sum over a row may be, relative to the sum. It only has to be wide enough: a draw that
# so much could change is made from the whole row, and such draws are rare.
DENOMINATOR_ERROR = 1e-3
# How far the sum of the sampler may be below the exact one: it adds up float32 (top_logits.softmax_denominator).
SAMPLER_ERROR = 4e-6


@dataclass(frozen=True, slots=True)
class Candidates:
    """The top-k outputs of a run, next to its logits; see docs/artifact.md."""

    logits: np.ndarray  # float32 [R, K]
    ids: np.ndarray  # int32 [R, K]
    denominator: np.ndarray  # float32 [R], at the temperature that the graph was fed

    def choose(self, row: int, sampling: ResolvedSampling, position: int, *, used: int, vocab: int) -> int | None:
        """The token that `sample` chooses from the whole row, of `vocab` logits; None where the candidates do not tell."""
        logits, ids = self.logits[row], self.ids[row]
        largest, smallest = logits.max(), logits.min()
        if not largest > smallest:  # others may be as large
            return None
        if sampling.temperature == 0:
            return int(ids[logits == largest].min())
        # Of those that equal the smallest, some may be missing.
        places = np.flatnonzero(logits > smallest)
        order = places[np.lexsort((ids[places], -logits[places]))]
        own = order[ids[order] < used]
        if not len(own) or own[0] != order[0]:  # the denominator has no information on logits far below the largest
            return None
        number = uniform(sampling.seed, position, sampling.index)
        if top_k := sampling.top_k:
            few = own[:top_k]
            return drawn(ids[few], logits[few], sampling, number, complete=True) if len(few) == top_k else None
        least, most = self._bounds(row, sampling.temperature, used, vocab)
        if not least <= most:  # no numbers
            return None
        # The place of a token does not fall while the total grows, so what both bounds say, all between them say.
        tokens = {drawn(ids[own], logits[own], sampling, number, total, complete=False) for total in (least, most)}
        return tokens.pop() if len(tokens) == 1 else None

    def _bounds(self, row: int, temperature: float, used: int, vocab: int) -> tuple[float, float]:
        """The least and the most that exp((x - largest) / temperature) adds up to over the ids below `used`."""
        logits = self.logits[row].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            shares = np.exp((logits - logits.max()) / temperature)
        unused = self.ids[row] >= used
        seen, unseen = float(shares[unused].sum()), vocab - used - int(np.count_nonzero(unused))
        total = float(self.denominator[row])
        least = total * (1 - DENOMINATOR_ERROR) - seen - unseen * float(shares.min())
        known = float(shares[~unused].sum()) * (1 - SAMPLER_ERROR)
        return max(least, known), total * (1 + DENOMINATOR_ERROR) - seen


def candidates_of(outputs: Mapping[str, np.ndarray]) -> Candidates | None:
    """The candidates among a run's outputs, by name, if there are any."""
    return Candidates(*(outputs[name] for name in CANDIDATES)) if CANDIDATES[0] in outputs else None

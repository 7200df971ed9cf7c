"""The top-k tokens of a row of logits, without sorting the row.

Sorting 152,000 numbers takes a hundred times as long as reading them. A threshold that lets through these tokens, and few
others, comes from the largest number of each block: the k-th largest of these is at most the k-th largest of all.
"""

from __future__ import annotations

import numpy as np

BLOCK = 128
LARGEST = float(np.finfo(np.float32).max)
CHUNK = 1 << 14  # numbers that are worked on at once, so that they stay in a core's cache


def top_k_ids(row: np.ndarray, count: int) -> np.ndarray:
    """The ids of the `count` largest of row [V], the largest first, lower ids first among equals: int64 [at most count].

    What is -inf is left out, unless everything is.
    """
    if count <= 0:
        return np.empty(0, np.int64)
    least = _threshold(row, count)
    ids = np.flatnonzero(row >= least if least > -np.inf else row > -np.inf)
    if not len(ids):
        ids = np.arange(len(row))
    return ids[np.argsort(-row[ids], kind="stable")[:count]]


def _threshold(row: np.ndarray, count: int) -> float:
    """A number that at least `count` numbers of row reach, and not many more."""
    blocks = -(-len(row) // BLOCK)
    if count >= len(row):
        return -np.inf
    if count >= blocks:
        return float(np.partition(row, len(row) - count)[len(row) - count])
    largest = np.maximum.reduceat(row, np.arange(0, len(row), BLOCK))
    return float(np.partition(largest, blocks - count)[blocks - count])


def softmax_denominator(row: np.ndarray, temperature: float) -> float:
    """The sum of exp((x - largest) / temperature) over row [V]: the denominator of probabilities.

    Exponentials in float32, which are a third of the work; each is off by 1e-6 of itself at most. Sums of chunks are float64.
    """
    largest, factor, total = row.max(), np.float32(min(1 / temperature, LARGEST)), 0.0
    with np.errstate(over="ignore"):  # what is so far below the largest counts as nothing
        for start in range(0, len(row), CHUNK):
            part = row[start : start + CHUNK] - largest
            part *= factor
            total += float(np.exp(part, out=part).sum())
    return total

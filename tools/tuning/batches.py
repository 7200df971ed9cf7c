"""The decode batches that make the expected cost of a step least: exact, by dynamic programming.

A step of r rows runs in the smallest bucket that has them. With buckets b1 < b2 < ... < bK = slots, all steps with b(i-1) < r
<= bi cost what bi costs, so the best buckets up to b are the best up to some smaller a, and b for the steps between:

    F(k, b) = min over a < b of F(k - 1, a) + cost(b) * (number of steps with a < rows <= b),   F(0, 0) = 0.

Variants of the graphs (which see so many images) share the buckets; each has costs and steps of its own, and they are
added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .search import Best

Costs = Sequence[Mapping[int, float]]  # of each variant: bucket -> milliseconds
Steps = Sequence[Mapping[int, float]]  # of each variant: rows -> how many steps


def step_cost(buckets: Sequence[int], costs: Costs, steps: Steps) -> float:
    """What all steps cost in these buckets; infinite where a step has more rows than the largest."""
    total = 0.0
    for table, counted in zip(costs, steps, strict=True):
        for rows, count in counted.items():
            bucket = min((b for b in buckets if b >= rows), default=None)
            total += math.inf if bucket is None else table[bucket] * count
    return total


def batch_frontier(costs: Costs, steps: Steps, slots: int, most: int) -> list[Best]:
    """The best sets of at most 1, 2, ... `most` buckets, each with `slots` as its largest."""
    until = [[sum(count for rows, count in counted.items() if rows <= b) for b in range(slots + 1)] for counted in steps]

    def between(a: int, b: int) -> float:
        return sum(table[b] * (upto[b] - upto[a]) for table, upto in zip(costs, until, strict=True))

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # largest bucket -> cost, buckets
    found: list[Best] = []
    for _ in range(min(most, slots)):
        best = {
            b: min((cost + between(a, b), (*chosen, b)) for a, (cost, chosen) in best.items() if a < b)
            for b in range(1, slots + 1)
            if any(a < b for a in best)
        }
        cost, chosen = best[slots]
        if found and cost >= found[-1].cost * (1 - 1e-12):
            cost, chosen = found[-1].cost, found[-1].buckets
        found.append(Best(chosen, cost))
    return found

"""The decode batches of the least expected cost of a step: exact, by dynamic programming.

A step of r rows runs in the smallest bucket that has them. With buckets b1 < b2 < ... < bK = slots, all steps with b(i-1) < r
<= bi cost what bi costs, so the best buckets up to b are the best up to some smaller a, and b for the steps between:

    F(k, b) = min over a < b of F(k - 1, a) + cost(b) * (number of steps with a < rows <= b),   F(0, 0) = 0.

Variants of the graphs (which see so many images) share the buckets; each has costs and steps of its own, and they are
added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .search import BestSet

Costs = Sequence[Mapping[int, float]]  # of each variant: bucket -> milliseconds
Steps = Sequence[Mapping[int, float]]  # of each variant: rows -> how many steps


def step_cost(buckets: Sequence[int], costs: Costs, steps: Steps) -> float:
    """The cost of all steps in these buckets, in milliseconds; infinite where a step has more rows than the largest."""
    total = 0.0
    for table, step_counts in zip(costs, steps, strict=True):
        for rows, count in step_counts.items():
            bucket = min((b for b in buckets if b >= rows), default=None)
            total += math.inf if bucket is None else table[bucket] * count
    return total


def batch_frontier(costs: Costs, steps: Steps, slots: int, most: int) -> list[BestSet]:
    """The best sets of at most 1, 2, ... `most` buckets, each with `slots` as its largest."""
    until = [
        [sum(count for rows, count in step_counts.items() if rows <= b) for b in range(slots + 1)] for step_counts in steps
    ]

    def between(a: int, b: int) -> float:
        return sum(table[b] * (cumulative[b] - cumulative[a]) for table, cumulative in zip(costs, until, strict=True))

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # largest bucket -> cost, buckets
    frontier: list[BestSet] = []
    for _ in range(min(most, slots)):
        best = {
            b: min((cost + between(a, b), (*chosen, b)) for a, (cost, chosen) in best.items() if a < b)
            for b in range(1, slots + 1)
            if any(a < b for a in best)
        }
        cost, chosen = best[slots]
        if frontier and cost >= frontier[-1].cost * (1 - 1e-12):
            cost, chosen = frontier[-1].cost, frontier[-1].buckets
        frontier.append(BestSet(chosen, cost))
    return frontier

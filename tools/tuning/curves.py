"""Cost curves: costs of sizes that were not measured, from sizes that were.

The measured costs are first made to rise with the size, since a larger bucket does at least the work of a smaller one and
what falls is noise: neighbours that fall are replaced by their mean (pool adjacent violators, Ayer et al. 1955). Between
measured sizes the cost is the straight line between them. Below the smallest it goes on along the first line, which meets
size 0 at the fixed part of a run (at 0, should it come out below); above the largest it goes on along the last line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


class CostError(ValueError):
    """Costs that are missing or wrong; the message says what to give."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Costs in milliseconds at rising sizes, linear between them."""

    sizes: tuple[int, ...]
    costs: tuple[float, ...]

    def __call__(self, size: int) -> float:
        sizes, costs = self.sizes, self.costs
        if len(sizes) == 1:
            return costs[0] * size / sizes[0]
        i = min(max(int(np.searchsorted(sizes, size)), 1), len(sizes) - 1)
        slope = (costs[i] - costs[i - 1]) / (sizes[i] - sizes[i - 1])
        if size < sizes[0] and costs[0] < slope * sizes[0]:
            return costs[0] * size / sizes[0]
        return costs[i - 1] + slope * (size - sizes[i - 1])

    @property
    def fixed(self) -> float:
        """The cost at size 0, which every run has."""
        return max(0.0, self(0))


def fit(costs_by_size: Mapping[int, float]) -> Curve:
    """A curve through measured costs {size: milliseconds}; raises CostError for none or for one that is not positive."""
    if not costs_by_size:
        raise CostError("no costs were given; expected milliseconds for at least one size")
    for size, cost in costs_by_size.items():
        if not (size >= 1 and 0 < cost < float("inf")):
            raise CostError(f"size {size} costs {cost} ms; expected a positive size and a positive cost")
    pools: list[list[float]] = []  # [sum, count] of neighbours that share a cost
    for size in sorted(costs_by_size):
        pools.append([costs_by_size[size], 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    costs = [total / count for total, count in pools for _ in range(int(count))]
    return Curve(tuple(sorted(costs_by_size)), tuple(costs))

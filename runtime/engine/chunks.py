"""The buckets that cover a length at the least cost.

Chunked prefill runs a prompt as a sequence of buckets; vision encodes images likewise. The split is a shortest path:
cost(n) = min over buckets b of cost[b] + cost(max(0, n - b)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping


class ChunkPlanner:
    """Splits lengths into buckets by their measured costs; every length is in tokens (or tiles)."""

    def __init__(self, costs: Mapping[int, float]) -> None:
        if not costs:
            raise ValueError("no buckets were given; expected at least one")
        self.costs = dict(sorted(costs.items()))
        self.unit = math.gcd(*self.costs)
        self._first: dict[bool, list[int]] = {False: [0], True: [0]}
        self._total: dict[bool, list[float]] = {False: [0.0], True: [0.0]}

    @property
    def smallest(self) -> int:
        return next(iter(self.costs))

    def next_bucket(self, length: int, room: int) -> int:
        """The bucket to run first for `length` >= 1 more tokens when `room` rows may be written, padding included.

        The cheapest split is taken if its padding fits the room, else the cheapest whose padding stays below the smallest
        bucket. Raises ValueError when even that does not fit.
        """
        for tight in (False, True):
            split = self.split(length, tight=tight)
            if sum(split) <= room:
                return split[0]
        raise ValueError(f"{length} tokens do not fit {room} cache rows in buckets {list(self.costs)}")

    def split(self, length: int, *, tight: bool = False) -> list[int]:
        """The cheapest buckets that cover `length`, largest first."""
        self._extend(-(-length // self.unit), tight)
        units, buckets = -(-length // self.unit), []
        while units > 0:
            bucket = self._first[tight][units]
            buckets.append(bucket)
            units -= bucket // self.unit
        return sorted(buckets, reverse=True)

    def cost(self, length: int) -> float:
        """The cost of the cheapest buckets that cover `length`."""
        units = -(-length // self.unit)
        self._extend(units, False)
        return self._total[False][units]

    def _extend(self, units: int, tight: bool) -> None:
        first, total = self._first[tight], self._total[tight]
        for n in range(len(first), units + 1):
            best, bucket = min(
                (cost + total[max(0, n - b // self.unit)], b)
                for b, cost in self.costs.items()
                if not tight or b // self.unit < n + self.smallest // self.unit
            )
            first.append(bucket)
            total.append(best)

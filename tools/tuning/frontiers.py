"""The worthwhile part of a frontier of bucket sets, whose cost falls with every further graph, and ever less."""

from __future__ import annotations

import math

from .search import BestSet


def worthwhile(frontier: list[BestSet], least_saving: float) -> list[BestSet]:
    """A frontier up to its last set each of whose graphs beyond a smaller set saves at least this share."""
    last = 0
    for i, best in enumerate(frontier):
        if best.cost < frontier[last].cost * (1 - least_saving * (i - last)):
            last = i
    return frontier[: last + 1]


def knee(costs: list[float]) -> int:
    """The place on a falling frontier farthest below the line from its first to its last point (Satopaa et al. 2011)."""
    if len(costs) < 3 or math.isclose(costs[0], costs[-1]):
        return len(costs) - 1 if len(costs) < 3 else 0
    last = len(costs) - 1
    below = [(1 - i / last) - (cost - costs[-1]) / (costs[0] - costs[-1]) for i, cost in enumerate(costs)]
    return max(range(len(costs)), key=lambda i: (round(below[i], 12), -i))

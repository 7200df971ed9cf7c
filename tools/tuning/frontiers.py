"""How far along a frontier of sets it is worth to go: the cost falls with every further graph, and ever less."""

from __future__ import annotations

import math

from .search import Best


def worth(found: list[Best], least_saving: float) -> list[Best]:
    """A frontier up to its last set each of whose graphs beyond a smaller set saves at least this share."""
    last = 0
    for i, best in enumerate(found):
        if best.cost < found[last].cost * (1 - least_saving * (i - last)):
            last = i
    return found[: last + 1]


def knee(costs: list[float]) -> int:
    """The place on a falling frontier farthest below the line from its first to its last point (Satopaa et al. 2011)."""
    if len(costs) < 3 or math.isclose(costs[0], costs[-1]):
        return len(costs) - 1 if len(costs) < 3 else 0
    last = len(costs) - 1
    below = [(1 - i / last) - (cost - costs[-1]) / (costs[0] - costs[-1]) for i, cost in enumerate(costs)]
    return max(range(len(costs)), key=lambda i: (round(below[i], 12), -i))

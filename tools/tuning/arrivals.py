"""The requests of the replay, each with a time, in the order in which they arrive."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .columns import TraceError
from .workload import Arrival

_SEED = 20240


def timed(block: Sequence[Arrival], rate: float | None) -> list[Arrival]:
    """Arrivals from time 0 on. `rate`, in requests a second, stretches the times of the trace, or, where it has none, makes
    requests arrive at random (a Poisson process). Raises TraceError where there are neither times nor a rate.
    """
    times = [arrival.time for arrival in block]
    known = [time for time in times if time is not None]
    if rate is None and len(known) < len(times):
        raise TraceError("the trace does not say when requests arrived; give --rate, how many arrive in a second")
    if len(known) < len(times) or (rate is not None and max(known) == min(known)):
        assert rate is not None
        gaps = np.random.default_rng(_SEED).exponential(1 / rate, len(block)).cumsum().tolist()
        return [dataclasses.replace(arrival, time=time) for arrival, time in zip(block, gaps, strict=True)]
    first = min(known)
    stretch = 1.0 if rate is None else (len(known) - 1) / (max(known) - first) / rate
    ordered = sorted(zip(known, range(len(block)), strict=True))
    return [dataclasses.replace(block[place], time=(time - first) * stretch) for time, place in ordered]


def rate_of(arrivals: Sequence[Arrival]) -> float:
    """Requests a second between the first and the last."""
    span = (arrivals[-1].time or 0.0) - (arrivals[0].time or 0.0)
    return (len(arrivals) - 1) / span if span else float("inf")

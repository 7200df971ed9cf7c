"""Arrival times for the requests of the replay."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .replay import ReplayStats
from .trace_error import TraceError
from .workload import Arrival

_SEED = 20240


def with_times(block: Sequence[Arrival], rate: float | None) -> list[Arrival]:
    """Arrivals in order, from time 0 on. `rate`, in requests a second, stretches the times of the trace, or, where it has
    none, makes requests arrive at random (a Poisson process). Raises TraceError where there are neither times nor a rate.
    """
    times = [arrival.time for arrival in block]
    trace_times = [time for time in times if time is not None]
    if rate is None and len(trace_times) < len(times):
        raise TraceError("the trace does not say when requests arrived; give --rate, how many arrive in a second")
    if len(trace_times) < len(times) or (rate is not None and max(trace_times) == min(trace_times)):
        assert rate is not None
        gaps = np.random.default_rng(_SEED).exponential(1 / rate, len(block)).cumsum().tolist()
        return [dataclasses.replace(arrival, time=time) for arrival, time in zip(block, gaps, strict=True)]
    start = min(trace_times)
    stretch = 1.0 if rate is None else (len(trace_times) - 1) / (max(trace_times) - start) / rate
    by_time = sorted(zip(trace_times, range(len(block)), strict=True))
    return [dataclasses.replace(block[place], time=(time - start) * stretch) for time, place in by_time]


def rate_of(arrivals: Sequence[Arrival]) -> float:
    """The rate of arrivals, in requests a second between the first and the last."""
    span = (arrivals[-1].time or 0.0) - (arrivals[0].time or 0.0)
    return (len(arrivals) - 1) / span if span else float("inf")


def offered_load(arrivals: Sequence[Arrival], replayed: ReplayStats) -> float:
    """The rate of arrivals in shares of the rate that was served; below 1, the share of time in which something ran."""
    span = (arrivals[-1].time or 0.0) - (arrivals[0].time or 0.0)
    return replayed.load if span >= 0.5 * replayed.span_s else replayed.span_s / span if span else 1.0

"""The load of other processes on the cores that this one computes with."""

from __future__ import annotations

import time

import psutil

from ..runtime.backends.cores import core_numbers


class OtherWork:
    """A count of other processes' time since it was made. Time that the host of a virtual machine takes counts too."""

    def __init__(self) -> None:
        self.cores = core_numbers()
        self.busy, self.own, self.started = self._busy(), time.process_time(), time.perf_counter()

    def part(self) -> float:
        """The share of the time of all cores together, 0 to 1."""
        others = self._busy() - self.busy - (time.process_time() - self.own)
        whole = len(self.cores) * (time.perf_counter() - self.started)
        return min(max(others / whole, 0.0), 1.0)

    def _busy(self) -> float:
        """Seconds that the cores were busy, for all processes."""
        times = psutil.cpu_times(percpu=True)
        # Guests are counted among users.
        idle = ("idle", "iowait", "guest", "guest_nice")
        return sum(sum(times[core]) - sum(getattr(times[core], name, 0.0) for name in idle) for core in self.cores)

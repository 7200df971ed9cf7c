"""Who holds which row of the preallocated KV cache."""

from __future__ import annotations

import heapq

import numpy as np

from .artifact import CacheSpec


class SlotCache:
    """Slots are rows of the cache; a sequence holds one. `lengths[slot]` counts the tokens whose keys and values are valid."""

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.lengths = np.zeros(spec.slots, np.int32)
        self._free = list(range(spec.slots))

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        """The lowest free slot: low slots keep decode batches small."""
        return heapq.heappop(self._free)

    def release(self, slot: int) -> None:
        assert slot not in self._free, f"slot {slot} released twice"
        self.lengths[slot] = 0
        heapq.heappush(self._free, slot)

"""The slots of a cache: which of them are free, and how many valid tokens each holds."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from ..artifact import CacheSpec


class Slots:
    """Numbers of sequences that run at a time. `lengths[slot]` counts the tokens whose keys and values are valid."""

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.lengths = np.zeros(spec.slots, np.int32)
        self._free: list[int] = []

    def free_all(self) -> None:
        """Every slot is free and holds nothing."""
        self.lengths[:] = 0
        self._free = list(range(self.spec.slots))  # ascending

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def free_slots(self) -> Sequence[int]:
        """Ascending."""
        return self._free

    def acquire(self, slot: int | None = None) -> int:
        """A free slot, by default the lowest: low slots keep decode batches small."""
        if slot is None:
            slot = self._free[0]
        self._free.remove(slot)
        return slot

    def release(self, slot: int) -> None:
        assert slot not in self._free, f"slot {slot} released twice"
        bisect.insort(self._free, slot)

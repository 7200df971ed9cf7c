"""When memory of cache rows goes back to the system: after blocks were let go, between two steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from .blocks import BlockPool, tokens_in

# A MiB takes 50 us to give back, and 600 us to get again by page faults.
WORTH_BYTES = 1 << 20  # of one slot; less is left until more comes together
STEP_BYTES = 64 << 20  # between two steps while requests run: about 3 ms
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UnusedRows:
    """The rows of slots that no block holds any more."""

    pool: BlockPool
    block_bytes: int

    def release(self, give_back: Callable[[int, int], object], *, idle: bool) -> None:
        """Give back what is worth it, by Backend.give_back. `idle`: all of it, since no request waits for the next step."""
        left = self.pool.budget if idle else max(STEP_BYTES // self.block_bytes, 1)
        for slot in tuple(self.pool.shrunk):
            assert isinstance(slot, int), "slots are what holds blocks here"
            held, peak = self.pool.held(slot), self.pool.peaks[slot]
            if (peak - held) * self.block_bytes < WORTH_BYTES:
                self.pool.shrunk.discard(slot)  # until it shrinks again
                continue
            first = max(held, peak - left)
            try:
                give_back(slot, tokens_in(first))
            except Exception as error:  # of a rank: the next run meets it too, and ends requests with it
                log.warning("memory of the cache was not given back: %s", error)
            self.pool.settle(slot, first)
            left -= peak - first
            if left <= 0:
                return

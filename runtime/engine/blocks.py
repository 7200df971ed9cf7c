"""Blocks of the KV cache: how many each holder has, and which of them may be evicted.

On a CPU a block is a range of rows of a slot, whose memory can be given back (give_back.py). A holder is in use, or idle: what
an idle one holds is kept until others need its blocks. Blocks that are pages are counted one by one (pages.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from ..artifact import PAGE_TOKENS

BLOCK = PAGE_TOKENS  # tokens


def blocks_for(tokens: int) -> int:
    """The blocks that so many tokens take."""
    return -(-tokens // BLOCK)


def tokens_in(blocks: int) -> int:
    """The tokens that so many blocks hold."""
    return blocks * BLOCK


class BlockPool:
    """Counts of blocks by holder, within a budget.

    Holders that are in use keep what they have. Those that are idle lose blocks from their ends, the one used the longest ago
    first.
    """

    def __init__(self, budget: int, on_evict: Callable[[Hashable, int], object] = lambda holder, left: None) -> None:
        """`on_evict` is called with an idle holder that lost blocks, and the blocks that it has left."""
        self.budget, self.on_evict = budget, on_evict
        self.evicted = 0  # blocks, since the pool was made
        self.peaks: dict[Hashable, int] = {}  # the most blocks of each holder since `settle`
        self.reset()

    def reset(self) -> None:
        """No holder has anything."""
        self.counts: dict[Hashable, int] = {}
        self.idle: OrderedDict[Hashable, None] = OrderedDict()  # the holder used the longest ago first
        self.used = self.cached = 0  # blocks of holders in use, and of idle ones
        self.shrunk = set(self.peaks)  # holders that may have fewer blocks than their peaks

    @property
    def free(self) -> int:
        """Blocks that no holder has."""
        return self.budget - self.used - self.cached

    def held(self, holder: Hashable) -> int:
        return self.counts.get(holder, 0)

    def claim(self, holder: Hashable) -> None:
        """The holder is in use from now on; its blocks stay."""
        if holder in self.idle:
            del self.idle[holder]
            self._move(self.held(holder), used=True)

    def retire(self, holder: Hashable) -> None:
        """The holder is idle: its blocks are evicted when others need them."""
        if holder not in self.idle:
            self.idle[holder] = None
            self._move(self.held(holder), used=False)
        self.touch(holder)

    def touch(self, holder: Hashable) -> None:
        """An idle holder was just of use."""
        if holder in self.idle:
            self.idle.move_to_end(holder)

    def can_hold(self, holder: Hashable, blocks: int, spare: int = 0) -> bool:
        """Whether a holder in use can have so many blocks, and leave `spare`, at the cost of idle ones.

        Of an idle holder: whether it can once it is claimed.
        """
        own = 0 if holder in self.idle else self.held(holder)
        return self.used - own + blocks + spare <= self.budget

    def resize(self, holder: Hashable, blocks: int) -> None:
        """Let a holder have so many blocks. Check with `can_hold` first: blocks of holders in use are never evicted."""
        more = blocks - self.held(holder)
        if more > self.free:
            self._evict(more - self.free, holder)
        self._set(holder, blocks)

    def _evict(self, blocks: int, spared: Hashable) -> None:
        victims = [each for each in self.idle if each != spared and self.held(each)]
        if blocks > sum(map(self.held, victims)):
            raise RuntimeError(f"{blocks} blocks of {self.budget} in the cache are missing; load the artifact again")
        for holder in victims:
            if not blocks:
                return
            taken = min(blocks, self.held(holder))
            self._set(holder, self.held(holder) - taken)
            self.on_evict(holder, self.held(holder))
            self.evicted += taken
            blocks -= taken

    def settle(self, holder: Hashable, blocks: int) -> None:
        """The memory of a holder's blocks after the first `blocks` was given back."""
        self.peaks[holder] = blocks
        if blocks <= self.held(holder):
            self.shrunk.discard(holder)

    def _set(self, holder: Hashable, blocks: int) -> None:
        more = blocks - self.held(holder)
        self.counts[holder] = blocks
        if more < 0:
            self.shrunk.add(holder)
        elif blocks > self.peaks.get(holder, 0):
            self.peaks[holder] = blocks
        if holder in self.idle:
            self.cached += more
        else:
            self.used += more

    def _move(self, blocks: int, *, used: bool) -> None:
        sign = 1 if used else -1
        self.used += sign * blocks
        self.cached -= sign * blocks

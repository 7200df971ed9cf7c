"""The slots of the preallocated KV cache: the holder of each, its blocks, and the keys of its contents."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from ..artifact import CacheSpec
from .blocks import BlockPool, blocks_for, tokens_in
from .cache_keys import KEY
from .slots import Slots


class SlotCache(Slots):
    """Slots are rows of the cache; a sequence holds one. See text_cache.TextCache.

    `keys[slot, :length]` identify those tokens (cache_keys.py). With cross-attention, `images[slot]` are the digests of the
    images that the slot has keys and values of. With `keep`, a slot that is released stays valid until a sequence takes it.

    A slot can also be parked for a holder that takes it back later: it is not free, but `reclaim` frees the one parked longest
    ago.

    Tokens of a slot are in its blocks (blocks.py). A slot that is free or parked may lose blocks, and its tokens in them.
    """

    def __init__(self, spec: CacheSpec, *, keep: bool = False, budget: int | None = None) -> None:
        """`budget`: blocks of all slots together; None: as many as all slots can fill."""
        super().__init__(spec)
        self.keep = keep
        whole = spec.slots * blocks_for(spec.context)
        self.bounded = budget is not None and budget < whole  # else every slot may be full
        self.blocks = BlockPool(whole if budget is None else budget, self._evicted)
        self.keys = np.zeros((spec.slots, spec.rows, KEY), np.int64)
        self.reset()

    def reset(self) -> None:
        """Every slot is free and holds nothing."""
        slots = self.spec.slots
        self.free_all()
        self.images: list[tuple[bytes, ...]] = [()] * slots
        self.touched = [0] * slots  # when each slot was last used, as a count of events
        self.parked: dict[object, int] = {}  # slots by holder, the one parked longest ago first
        self._events = 0
        self.blocks.reset()
        for slot in range(slots):
            self.blocks.retire(slot)

    def acquire(self, slot: int | None = None) -> int:
        slot = super().acquire(slot)
        self.blocks.claim(slot)
        return slot

    def release(self, slot: int) -> None:
        super().release(slot)
        if not self.keep:
            self.clear(slot)
        self.touch(slot)
        self.blocks.retire(slot)

    def park(self, holder: object, slot: int) -> None:
        """Keep a slot and its rows for `holder`, until it is taken back or reclaimed."""
        assert holder not in self.parked, f"slots {self.parked[holder]} and {slot} were parked for one holder"
        self.touch(slot)
        self.blocks.retire(slot)
        self.parked[holder] = slot

    def take_back(self, holder: object) -> int | None:
        """The slot that was parked for `holder`; None where there is none, perhaps because it was reclaimed."""
        slot = self.parked.pop(holder, None)
        if slot is not None:
            self.blocks.claim(slot)
        return slot

    def reclaim(self) -> bool:
        """Release the slot that was parked the longest ago; whether there was one."""
        if not self.parked:
            return False
        self.release(self.parked.pop(next(iter(self.parked))))
        return True

    def clear(self, slot: int) -> None:
        """Forget the contents of a slot."""
        self.lengths[slot], self.images[slot] = 0, ()
        self.blocks.resize(slot, 0)

    def reserve(self, slot: int, tokens: int) -> int:
        """Let a slot have the blocks for so many tokens, no more and no less; the tokens that fit them."""
        count = blocks_for(tokens)
        self.blocks.resize(slot, count)
        return tokens_in(count)

    def can_reserve(self, slot: int | None, tokens: int, spare: int = 0) -> bool:
        """Whether a slot, or None for a free one, can have the blocks for so many tokens and leave `spare` blocks."""
        return self.blocks.can_hold(slot, blocks_for(tokens), spare)

    def can_enter(self, slot: int | None, keys: np.ndarray, tokens: int, spare: int) -> bool:
        """As `can_reserve`: no block has two holders, whatever the keys are."""
        return self.can_reserve(slot, tokens, spare)

    def rows_of(self, slots: Sequence[int]) -> Sequence[int]:
        """Row b of a decode graph is slot b."""
        return slots

    def _evicted(self, slot: Hashable, blocks: int) -> None:
        assert isinstance(slot, int), "slots are what holds blocks here"
        self.lengths[slot] = min(int(self.lengths[slot]), tokens_in(blocks))

    def touch(self, slot: int) -> None:
        self._events += 1
        self.touched[slot] = self._events
        self.blocks.touch(slot)

    # ---- contents of the slots

    def common(self, slot: int, keys: np.ndarray) -> int:
        """The number of leading positions of a prompt with keys [L, KEY] in the slot: at most L - 1, as the last one runs."""
        limit = min(int(self.lengths[slot]), len(keys) - 1)
        if limit <= 0 or self.keys[slot, 0, 0] != keys[0, 0]:
            return 0
        differ = (self.keys[slot, :limit] != keys[:limit]).any(axis=1)
        first = int(differ.argmax())
        return first if differ[first] else limit

    def common_images(self, slot: int, images: Sequence[bytes]) -> int:
        """The number of leading images whose keys the slot has."""
        count = 0
        for present, image in zip(self.images[slot], images, strict=False):
            if present != image:
                break
            count += 1
        return count

    def settle(self, slot: int, keys: np.ndarray, images: Sequence[bytes]) -> tuple[int, int]:
        """Give the slot to a prompt: the common prefix stays valid. Returns its positions and images."""
        length, count = self.common(slot, keys), self.common_images(slot, images)
        self.lengths[slot], self.images[slot] = length, tuple(images[:count])
        self.touch(slot)
        return length, count

    def extend(self, slot: int, keys: np.ndarray) -> None:
        """Positions with these keys [n, KEY] were written after those that the slot contains."""
        start = int(self.lengths[slot])
        self.keys[slot, start : start + len(keys)] = keys
        self.lengths[slot] = start + len(keys)

    def append(self, slot: int, token: int, answer: np.ndarray) -> None:
        """A token of an answer was written after those that the slot contains; `answer`: see CacheKeys."""
        row = self.keys[slot, self.lengths[slot]]
        row[:] = answer
        row[0] = token
        self.lengths[slot] += 1

    def copied(self, source: int, target: int, length: int, images: int) -> None:
        """The first `length` positions (0: none) and `images` of a slot were copied to another."""
        if length:
            self.keys[target, :length] = self.keys[source, :length]
            self.lengths[target] = length
        if images > len(self.images[target]):
            self.images[target] = self.images[source][:images]
        self.touch(source)
        self.touch(target)

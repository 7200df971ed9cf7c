"""The interface of the cache of the text: what the scheduler, the engine and the feeds use of it.

Two classes have it: SlotCache (cache.py), where every sequence has rows of its own, and PagedCache (paged_cache.py), where a
sequence has a table of pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from ..artifact import CacheSpec


class BlockCounts(Protocol):
    """Blocks of tokens_in(1) tokens (blocks.py): the budget, and what has them."""

    evicted: int  # since the cache was made

    @property
    def budget(self) -> int:
        """Blocks in all."""
        ...

    @property
    def used(self) -> int:
        """Blocks of sequences that run."""
        ...

    @property
    def cached(self) -> int:
        """Blocks that are kept for later prompts, and evicted when others need them."""
        ...

    @property
    def free(self) -> int:
        """Blocks that nothing has."""
        ...


class TextCache(Protocol):
    """Keys and values of the text, as the host counts them. A sequence that runs has a slot: its number among them."""

    spec: CacheSpec
    bounded: bool  # there are fewer blocks than all slots could fill
    lengths: np.ndarray  # int32 [slots]: valid tokens
    images: list[tuple[bytes, ...]]  # digests of the images whose keys a slot has, with cross-attention

    @property
    def blocks(self) -> BlockCounts: ...

    @property
    def parked(self) -> Mapping[object, int]:
        """Slots that wait for their holders, by holder; the one parked longest ago first."""
        ...

    @property
    def free(self) -> int:
        """The number of free slots."""
        ...

    @property
    def free_slots(self) -> Sequence[int]:
        """Ascending."""
        ...

    def reset(self) -> None:
        """Every slot is free, and nothing is in the cache."""
        ...

    def acquire(self, slot: int | None = None) -> int:
        """A free slot, by default the lowest."""
        ...

    def release(self, slot: int) -> None:
        """The slot is free; later prompts may share what it contains."""
        ...

    def park(self, holder: object, slot: int) -> None:
        """A turn of `holder` has ended in a slot; what it contains is to be there for the next turn, if that can be."""
        ...

    def take_back(self, holder: object) -> int | None:
        """The slot that waits for `holder`; None where there is none."""
        ...

    def reclaim(self) -> bool:
        """Release the slot that was parked the longest ago; whether there was one."""
        ...

    def clear(self, slot: int) -> None:
        """Forget the contents of a slot: they may be wrong."""
        ...

    def settle(self, slot: int, keys: np.ndarray, images: Sequence[bytes]) -> tuple[int, int]:
        """Give the slot to a prompt with keys [L, KEY]; the positions (at most L - 1) and images that are there already."""
        ...

    def can_enter(self, slot: int | None, keys: np.ndarray, tokens: int, spare: int) -> bool:
        """Whether a slot, or None for a free one, that is given to a prompt with such keys can have the blocks for so many
        tokens and leave `spare` blocks."""
        ...

    def can_reserve(self, slot: int | None, tokens: int, spare: int = 0) -> bool:
        """Whether a slot can have the blocks for so many tokens and leave `spare` blocks."""
        ...

    def reserve(self, slot: int, tokens: int) -> int:
        """Let a slot have the blocks for so many tokens; the tokens that fit them. Check with `can_reserve` first."""
        ...

    def extend(self, slot: int, keys: np.ndarray) -> None:
        """Positions with these keys [n, KEY] were written after those that the slot contains."""
        ...

    def append(self, slot: int, token: int, answer: np.ndarray) -> None:
        """A token of an answer was written after those that the slot contains; `answer`: see CacheKeys."""
        ...

    def rows_of(self, slots: Sequence[int]) -> Sequence[int]:
        """The rows of a decode graph that the sequences in these slots take."""
        ...

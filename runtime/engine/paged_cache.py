"""The cache of the text in pages: the table of each sequence, and the pages that later prompts share.

A slot is only a number among the sequences that run. What a sequence has computed stays in its pages after its end, for
whatever prompt begins with it: also for the next turn of a chat, for which nothing is reserved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..artifact import CacheSpec
from .blocks import blocks_for, tokens_in
from .pages import ROOT, PageAllocator
from .slots import Slots


class PagedCache(Slots):
    """See text_cache.TextCache. `tables[slot]` are the pages of a sequence in order, with 0 after them."""

    def __init__(self, spec: CacheSpec, *, keep: bool = False) -> None:
        """`keep`: prompts find the pages of earlier ones, and share those of others."""
        super().__init__(spec)
        assert spec.pages and spec.cross is None, "the keys of images are in slots"
        self.page_tokens = tokens_in(1)
        self.blocks = PageAllocator(spec.pages, self.page_tokens, keep=keep)
        self.bounded = self.blocks.budget < spec.slots * blocks_for(spec.context)
        self.tables = np.zeros((spec.slots, spec.table_width), np.int32)
        self.images: list[tuple[bytes, ...]] = [()] * spec.slots
        self.parked: Mapping[object, int] = {}  # nothing is reserved for a chat between its turns
        self.reset()

    def reset(self) -> None:
        self.free_all()
        self.tables[:] = 0
        self.counts = [0] * self.spec.slots  # pages of each slot
        self.blocks.reset()

    # ---- slots

    def release(self, slot: int) -> None:
        for page in reversed(self.pages_of(slot)):
            self.blocks.drop(page)
        self._empty(slot)
        super().release(slot)

    def park(self, holder: object, slot: int) -> None:
        """The next turn finds the pages, if they are still there."""
        self.release(slot)

    def take_back(self, holder: object) -> int | None:
        return None

    def reclaim(self) -> bool:
        return False

    def clear(self, slot: int) -> None:
        """Full pages that others hold or go on from stay: no run writes to them."""
        forgetting = True
        for page in reversed(self.pages_of(slot)):
            if forgetting:
                forgetting = self.blocks.forget(page)
            else:
                self.blocks.drop(page)
        self._empty(slot)

    def _empty(self, slot: int) -> None:
        self.tables[slot], self.counts[slot], self.lengths[slot] = 0, 0, 0

    def pages_of(self, slot: int) -> list[int]:
        return self.tables[slot, : self.counts[slot]].tolist()

    def rows_of(self, slots: Sequence[int]) -> Sequence[int]:
        """The i-th sequence of a step is row i."""
        return range(len(slots))

    # ---- blocks

    def can_enter(self, slot: int | None, keys: np.ndarray, tokens: int, spare: int) -> bool:
        """Pages that others hold are shared, and cost nothing."""
        missing = blocks_for(tokens) + spare - self.blocks.available
        return missing <= 0 or missing <= sum(page in self.blocks.holders for page in self._matches(keys))

    def can_reserve(self, slot: int | None, tokens: int, spare: int = 0) -> bool:
        held = 0 if slot is None else self.counts[slot]
        return blocks_for(tokens) - held + spare <= self.blocks.available

    def reserve(self, slot: int, tokens: int) -> int:
        for _ in range(blocks_for(tokens) - self.counts[slot]):
            self._add(slot, self.blocks.take())
        return tokens_in(self.counts[slot])

    def _add(self, slot: int, page: int) -> None:
        self.tables[slot, self.counts[slot]] = page
        self.counts[slot] += 1

    # ---- contents

    def settle(self, slot: int, keys: np.ndarray, images: Sequence[bytes]) -> tuple[int, int]:
        assert not self.counts[slot], f"slot {slot} was not released"
        for page in self._matches(keys):
            self.blocks.hold(page)
            self._add(slot, page)
        self.lengths[slot] = tokens_in(self.counts[slot])
        page, common = self.tail(slot, keys)
        if self.blocks.is_spare(page, common):
            self.blocks.hold(page)
            self._add(slot, page)
            self.lengths[slot] += common
        return int(self.lengths[slot]), 0

    def adopt(self, slot: int, keys: np.ndarray) -> None:
        """Take pages that were computed since `settle`, in place of those of the slot that are not written yet."""
        first = int(self.lengths[slot]) // self.page_tokens
        matches = list(self._matches(keys, first, self._before(slot, first)))
        for place, page in enumerate(matches, start=first):
            self._replace(slot, place, page)
        if matches:
            self.lengths[slot] = tokens_in(first + len(matches))
        page, common = self.tail(slot, keys)
        if self.blocks.is_spare(page, common):
            place, present = divmod(int(self.lengths[slot]), self.page_tokens)
            if common > present:
                self._replace(slot, place, page)
                self.lengths[slot] += common - present

    def tail(self, slot: int, keys: np.ndarray) -> tuple[int, int]:
        """The page with the most of what a prompt has after the full pages of its slot, and how many tokens that are; at
        most all but the prompt's last one, which runs."""
        place = int(self.lengths[slot]) // self.page_tokens
        start = place * self.page_tokens
        return self.blocks.nearest(self._before(slot, place), keys[start : min(start + self.page_tokens, len(keys) - 1)])

    def next_page(self, slot: int) -> int:
        """The page that is written next."""
        return int(self.tables[slot, int(self.lengths[slot]) // self.page_tokens])

    def copied(self, slot: int, source: int, keys: np.ndarray, common: int) -> None:
        """The page that is written next has the tokens of `source`, of which the first `common` are those of the prompt."""
        start = int(self.lengths[slot]) // self.page_tokens * self.page_tokens
        self.blocks.touch(source)
        self.blocks.blank(self.next_page(slot))
        self.lengths[slot] = start
        self.extend(slot, keys[start : start + common])

    def extend(self, slot: int, keys: np.ndarray) -> None:
        while len(keys):
            place, start = divmod(int(self.lengths[slot]), self.page_tokens)
            count = min(self.page_tokens - start, len(keys))
            page = self.blocks.write(int(self.tables[slot, place]), self._before(slot, place), keys[:count])
            self.tables[slot, place] = page
            self.lengths[slot] += count
            keys = keys[count:]

    def append(self, slot: int, token: int, answer: np.ndarray) -> None:
        key = answer.copy()
        key[0] = token
        page = self.next_page(slot)
        if self.blocks.goes_on(page):
            self.blocks.add(page, key)
            self.lengths[slot] += 1
        else:
            self.extend(slot, key[None])

    def places(self, slots: Sequence[int], count: int) -> np.ndarray:
        """Where the next tokens of slots are written: page * page_tokens + place in the page, int32 [slots, count]."""
        positions = self.lengths[slots][:, None] + np.arange(count, dtype=np.int32)
        return self.tables[np.array(slots)[:, None], positions // self.page_tokens] * self.page_tokens + (
            positions % self.page_tokens
        )

    def _matches(self, keys: np.ndarray, first: int = 0, parent: int = ROOT) -> Iterator[int]:
        """The pages that have the tokens of a prompt from page `first` on, which follows `parent`. The last token runs."""
        for start in range(tokens_in(first), len(keys) - self.page_tokens, self.page_tokens):
            page = self.blocks.find(parent, keys[start : start + self.page_tokens])
            if page is None:
                return
            yield page
            parent = page

    def _replace(self, slot: int, place: int, page: int) -> None:
        self.blocks.hold(page)
        self.blocks.drop(int(self.tables[slot, place]))
        self.tables[slot, place] = page

    def _before(self, slot: int, place: int) -> int:
        return int(self.tables[slot, place - 1]) if place else ROOT

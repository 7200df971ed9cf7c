"""The pages of sequences against a plain model: a list of tokens for each, and the memory that their tables name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from staticvl.runtime.artifact import CacheSpec
from staticvl.runtime.engine import blocks, pages
from staticvl.runtime.engine.cache_keys import KEY
from staticvl.runtime.engine.paged_cache import PagedCache
from staticvl.runtime.engine.pages import ROOT, PageAllocator
from staticvl.runtime.manifest import cache as cache_records

PAGE, SLOTS, CONTEXT = 4, 4, 24


@pytest.fixture(autouse=True, scope="module")
def small_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", PAGE)
        patch.setattr(cache_records, "PAGE_TOKENS", PAGE)
        yield


def new_cache(count: int, *, keep: bool = True) -> PagedCache:
    spec = CacheSpec(
        layers=1, kv_heads=1, head_dim=4, slots=SLOTS, context=CONTEXT, rows=CONTEXT, dtype="float32", pages=count or UNSET
    )
    return PagedCache(spec, keep=keep)


def keys_of(tokens: list[int]) -> np.ndarray:
    keys = np.zeros((len(tokens), KEY), np.int64)
    keys[:, 0] = tokens
    return keys


def common(first: list[int], second: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


class PlainModel:
    """The tokens of each sequence, and what every place of every page holds: the tokens up to it, as its values depend on
    them."""

    def __init__(self, cache: PagedCache, rng: np.random.Generator) -> None:
        self.cache, self.rng = cache, rng
        self.running: dict[int, list[int]] = {}  # slot -> its tokens, those to be written included
        self.memory: dict[int, list[tuple[int, ...] | None]] = {}
        self.ended: list[list[int]] = []  # contents that were computed by some sequence
        self.cleared = False
        self.waiting: set[int] = set()  # slots in which nothing was written yet

    def begin(self, tokens: list[int]) -> None:
        cache, keys = self.cache, keys_of(tokens)
        if not cache.free or not cache.can_enter(None, keys, len(tokens), 0):
            return
        slot = cache.acquire()
        length, _ = cache.settle(slot, keys, ())
        self.running[slot] = tokens
        assert cache.reserve(slot, len(tokens)) == PAGE * cache.counts[slot] >= len(tokens)
        self.check_found(tokens, length)
        self.waiting.add(slot)

    def prepare(self, slot: int) -> None:
        """Others may have run since the sequence has begun."""
        keys, length = keys_of(self.running[slot]), int(self.cache.lengths[slot])
        self.cache.adopt(slot, keys)
        self.check_found(self.running[slot], int(self.cache.lengths[slot]))
        self.copy_tail(slot, keys)
        assert length <= int(self.cache.lengths[slot]) < len(keys)

    def check_found(self, tokens: list[int], length: int) -> None:
        """Where nothing was evicted, all full pages of the longest common prefix are found."""
        if self.cache.blocks.keep and not self.cache.blocks.evicted and not self.cleared:
            known = [*self.ended, *map(self.written, self.running)]
            longest = max(min(common(each, tokens), len(tokens) - 1) for each in known)
            assert length // PAGE == longest // PAGE

    def copy_tail(self, slot: int, keys: np.ndarray) -> None:
        cache = self.cache
        source, count = cache.tail(slot, keys)
        if count > cache.lengths[slot] % PAGE:
            target = cache.next_page(slot)
            self.check_own(slot, target)
            self.memory[target] = list(self.memory[source])
            cache.copied(slot, source, keys, count)

    def written(self, slot: int) -> list[int]:
        return self.running[slot][: self.cache.lengths[slot]]

    def write(self, slot: int, count: int) -> None:
        """The next tokens of a sequence; new ones where all of its own are written."""
        if slot in self.waiting:
            self.waiting.discard(slot)
            self.prepare(slot)
        cache, length = self.cache, int(self.cache.lengths[slot])
        tokens = self.running[slot]
        if length == len(tokens):
            if length == CONTEXT or not cache.can_reserve(slot, length + 1):
                return
            cache.reserve(slot, length + 1)
            tokens.append(int(self.rng.integers(2)))
        count = min(count, len(tokens) - length)
        for place, position in zip(cache.places([slot], count)[0], range(length, length + count), strict=True):
            page, offset = divmod(int(place), PAGE)
            assert page == cache.tables[slot, position // PAGE] != ROOT and offset == position % PAGE
            self.check_own(slot, page)
            self.memory.setdefault(page, [None] * PAGE)[offset] = tuple(tokens[: position + 1])
        if count == 1:
            cache.append(slot, tokens[length], np.zeros(KEY, np.int64))
        else:
            cache.extend(slot, keys_of(tokens[length : length + count]))

    def check_own(self, slot: int, page: int) -> None:
        assert [other for other in self.running if page in self.cache.pages_of(other)] == [slot]

    def end(self, slot: int, *, failed: bool) -> None:
        if failed:
            self.cleared = True
            self.cache.clear(slot)
        else:
            self.ended.append(self.written(slot))
        del self.running[slot]
        self.waiting.discard(slot)
        self.cache.release(slot)

    def check(self) -> None:
        cache, allocator = self.cache, self.cache.blocks
        holders = Counter(page for slot in self.running for page in cache.pages_of(slot))
        assert allocator.holders == holders and ROOT not in holders
        assert allocator.used == len(holders) and allocator.used + allocator.cached + allocator.free == allocator.budget
        assert not holders.keys() & allocator.idle.keys()
        assert allocator.keep or not allocator.idle
        for slot, tokens in self.running.items():
            table = cache.pages_of(slot)
            assert len(set(table)) == len(table) >= blocks.blocks_for(int(cache.lengths[slot]))
            read = [value for page in table for value in self.memory.get(page, [None] * PAGE)]
            for position in range(cache.lengths[slot]):
                assert read[position] == tuple(tokens[: position + 1])


@pytest.mark.parametrize("collisions", [False, True])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(8, 26), keep=st.sampled_from((True, True, True, False)))
def test_random_sequences(collisions: bool, seed: int, count: int, keep: bool) -> None:
    """`collisions`: all keys have one hash, so that pages differ by their keys alone."""
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        if collisions:
            patch.setattr(pages, "hash_of", lambda keys: 0)
        plain = PlainModel(new_cache(count, keep=keep), rng)
        plain.cleared = collisions  # then less is found
        for _ in range(120):
            kind = rng.random()
            if kind < 0.25:
                known = [*plain.ended[-5:], *plain.running.values()]
                start = known[rng.integers(len(known))][: rng.integers(20)] if known and rng.random() < 0.8 else []
                plain.begin([*start, *map(int, rng.integers(0, 2, rng.integers(1, 5)))])
            elif plain.running:
                slot = list(plain.running)[rng.integers(len(plain.running))]
                if kind < 0.85:
                    plain.write(slot, int(rng.integers(1, 9)))
                else:
                    plain.end(slot, failed=kind > 0.97)
            plain.check()
        for slot in list(plain.running):
            plain.end(slot, failed=False)
        plain.check()
        assert not plain.cache.blocks.used and plain.cache.free == SLOTS
        assert set(plain.cache.blocks.filled) == set(plain.cache.blocks.idle)


def filled(allocator: PageAllocator, parent: int, *tokens: int) -> int:
    """A page with such tokens that one sequence holds."""
    return allocator.write(allocator.take(), parent, keys_of(list(tokens)))


def test_the_page_used_longest_ago_is_evicted_and_children_before_their_parents() -> None:
    allocator = PageAllocator(5, PAGE, keep=True)
    first = filled(allocator, ROOT, 1, 2, 3, 4)
    second, other = filled(allocator, first, 5, 6, 7, 8), filled(allocator, ROOT, 9)
    for page in (second, first, other):
        allocator.drop(page)
    assert list(allocator.idle) == [second, first, other]
    allocator.hold(first)
    allocator.drop(first)
    assert [allocator.take() for _ in range(4)] == [4, second, other, first]
    assert allocator.evicted == 3 and not allocator.children and not allocator.full
    with pytest.raises(RuntimeError, match="all 4 pages of the cache are in use"):
        allocator.take()


def test_a_page_with_equal_contents_takes_the_place_of_one_that_was_just_filled() -> None:
    allocator = PageAllocator(8, PAGE, keep=True)
    first, second = allocator.take(), allocator.take()
    for page in (first, second):
        assert allocator.write(page, ROOT, keys_of([1, 2, 3])) == page
    assert allocator.write(first, ROOT, keys_of([4])) == first
    assert allocator.write(second, ROOT, keys_of([4])) == first
    assert allocator.holders == {first: 2} and allocator.free == 6


def test_keys_differ_by_more_than_tokens() -> None:
    """By the image that stands there, or by the rotary state."""
    allocator = PageAllocator(8, PAGE, keep=True)
    keys = keys_of([-1, -2, -3, 7])
    keys[:3, 2:] = 5, 6
    page = allocator.write(allocator.take(), ROOT, keys)
    assert allocator.find(ROOT, keys) == page
    for place in ((0, 1), (1, 2), (2, 3)):
        other = keys.copy()
        other[place] += 1
        assert allocator.find(ROOT, other) is None
        assert allocator.nearest(ROOT, other) == ((page, place[0]) if place[0] else (ROOT, 0))


def test_a_shared_page_is_not_written() -> None:
    allocator = PageAllocator(4, PAGE, keep=True)
    page = filled(allocator, ROOT, 1, 2)
    allocator.hold(page)
    with pytest.raises(AssertionError, match="is shared and was written"):
        allocator.write(page, ROOT, keys_of([3]))


def test_pages_that_a_failed_sequence_shares_stay() -> None:
    cache = new_cache(12)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    slots = [cache.acquire(), cache.acquire()]
    for slot in slots:
        cache.settle(slot, keys_of(tokens), ())
        cache.reserve(slot, 10)
        cache.extend(slot, keys_of(tokens[cache.lengths[slot] :]))
    assert cache.blocks.used == 4 and cache.tables[0, 1] == cache.tables[1, 1]
    cache.clear(slots[0])
    assert cache.blocks.used == 3 and cache.blocks.cached == 0
    cache.clear(slots[1])
    assert (cache.blocks.used, cache.blocks.cached, cache.blocks.free) == (0, 0, 11)

"""Who holds which slot."""

from __future__ import annotations

import pytest

from staticvl.runtime.artifact import CacheSpec
from staticvl.runtime.engine.cache import SlotCache


def slot_cache(slots: int = 4) -> SlotCache:
    return SlotCache(CacheSpec(layers=2, kv_heads=3, head_dim=8, slots=slots, context=10, rows=14, dtype="float16"))


def test_lowest_free_slot_first() -> None:
    cache = slot_cache()
    assert [cache.acquire() for _ in range(4)] == [0, 1, 2, 3]
    for slot in (3, 1, 2):
        cache.release(slot)
    assert [cache.acquire() for _ in range(3)] == [1, 2, 3]


def test_free_counts_down_and_up() -> None:
    cache = slot_cache(2)
    assert cache.free == 2
    slot = cache.acquire()
    assert cache.free == 1
    cache.release(slot)
    assert cache.free == 2


def test_releasing_forgets_the_length() -> None:
    cache = slot_cache()
    slot = cache.acquire()
    cache.lengths[slot] = 7
    cache.release(slot)
    assert cache.lengths[slot] == 0


def test_releasing_twice_is_a_mistake() -> None:
    cache = slot_cache()
    slot = cache.acquire()
    cache.release(slot)
    with pytest.raises(AssertionError, match="slot 0 released twice"):
        cache.release(slot)


def test_size_in_bytes() -> None:
    """Keys and values, two layers, four slots, three heads, fourteen rows, eight numbers of two bytes."""
    assert slot_cache().spec.nbytes == 2 * 2 * 4 * 3 * 14 * 8 * 2

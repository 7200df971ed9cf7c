"""Pages that hold nothing any more, given back."""

from __future__ import annotations

import logging
import mmap
import sys

import numpy as np
import pytest

from staticvl.runtime.backends import unused_pages
from staticvl.runtime.backends.unused_pages import give_back
from staticvl.runtime.engine.blocks import BlockPool
from staticvl.runtime.engine.give_back import STEP_BYTES, WORTH_BYTES, UnusedRows

PAGE = mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's madvise")
@pytest.mark.parametrize("first", [0, 1, 37, 64])
def test_whole_pages_of_a_view_read_zero_and_nothing_else_changes(first: int) -> None:
    """Rows of a sixteenth of a page, of three heads: up to two partial pages of each head stay as they are."""
    cache = np.ones((2, 3, 128, PAGE // 16 // 4), np.float32)
    give_back(cache[1, :, first:])
    assert (cache[0] == 1).all() and (cache[1, :, :first] == 1).all()
    kept = [int((cache[1, head, first:, 0] == 1).sum()) for head in range(3)]
    assert max(kept) < 2 * 16 and ((cache == 0) | (cache == 1)).all()
    assert (cache[1, 1, first + 16 : 128 - 16] == 0).all()


def test_a_system_without_madvise_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "platform", "other")
    unused_pages._madvise.cache_clear()
    try:
        cache = np.ones((1, 1, 64, PAGE // 4), np.float32)
        with caplog.at_level(logging.WARNING):
            give_back(cache)
            give_back(cache)
        assert (cache == 1).all()
        assert [record.message for record in caplog.records] == [
            "memory of cache rows that are not used any more is kept, because this system has no madvise that frees it"
        ]
    finally:
        unused_pages._madvise.cache_clear()


def test_little_is_left_until_more_comes_together() -> None:
    given: list[tuple[int, int]] = []
    pool = BlockPool(100)
    rows = UnusedRows(pool, WORTH_BYTES // 3 + 1)
    pool.resize(0, 9)
    for held, expected in ((8, []), (7, []), (6, [(0, 6 * 128)]), (5, [(0, 6 * 128)])):
        pool.resize(0, held)
        rows.release(lambda slot, first: given.append((slot, first)), idle=False)
        assert given == expected


def test_a_step_gives_back_so_much_and_an_idle_engine_everything() -> None:
    given: list[tuple[int, int]] = []
    pool = BlockPool(100)
    rows = UnusedRows(pool, STEP_BYTES // 2)
    for slot in (0, 1):
        pool.resize(slot, 5)
        pool.resize(slot, 0)
    rows.release(lambda slot, first: given.append((slot, first)), idle=False)
    assert given == [(0, 3 * 128)]
    pool.resize(0, 2)
    rows.release(lambda slot, first: given.append((slot, first)), idle=False)
    assert given[1:] == [(0, 2 * 128), (1, 4 * 128)]
    rows.release(lambda slot, first: given.append((slot, first)), idle=True)
    assert given[3:] == [(1, 0)] and not pool.shrunk


def test_an_error_of_the_device_is_left_to_the_next_run(caplog: pytest.LogCaptureFixture) -> None:
    pool = BlockPool(4)
    pool.resize(0, 4)
    pool.resize(0, 0)

    def fails(slot: int, first: int) -> None:
        raise OSError("gone")

    UnusedRows(pool, WORTH_BYTES).release(fails, idle=True)
    assert "memory of the cache was not given back: gone" in caplog.text

"""Pages of an array that hold nothing any more go back to the system, and read as zeros when they are used again."""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import mmap
import sys
from collections.abc import Callable

import numpy as np

log = logging.getLogger(__name__)
# Linux's numbers; only there does MADV_DONTNEED free the pages at once.
_DONTNEED, _NOHUGEPAGE = 4, 15


def give_back(array: np.ndarray) -> None:
    """Give back the whole pages within an array, or a view of one along its axes; other pages keep what they hold."""
    _advise(array, _DONTNEED)


def use_small_pages(array: np.ndarray) -> None:
    """Let an array that nothing was written to get its memory page by page.

    numpy asks for pages of 2 MiB, the first row of which takes the memory of a thousand others.
    """
    _advise(array, _NOHUGEPAGE)


def _advise(array: np.ndarray, advice: int) -> None:
    madvise, page = _madvise(), mmap.PAGESIZE
    for address, nbytes in _runs(array):
        start, end = -(-address // page) * page, (address + nbytes) // page * page
        if start < end:
            madvise(start, end - start, advice)


def _runs(array: np.ndarray) -> list[tuple[int, int]]:
    """Address and bytes of each stretch of memory without gaps."""
    if array.flags.c_contiguous:
        return [(array.ctypes.data, array.nbytes)]
    return list(itertools.chain.from_iterable(map(_runs, array)))


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    """The system's madvise; where there is none that frees pages, a function without effect, which is logged once."""
    try:
        if sys.platform == "linux":
            madvise = ctypes.CDLL(None).madvise
            madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            return madvise
    except (AttributeError, OSError, TypeError):
        pass
    log.warning("memory of cache rows that are not used any more is kept, because this system has no madvise that frees it")
    return lambda address, nbytes, advice: 0

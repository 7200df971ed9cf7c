"""The memory of large images goes back to the system once it is free."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

LARGE = 4_000_000  # pixels; 16 MB in Pillow, of which decoding holds several copies


def release_memory(pixels: int) -> None:
    """Return free memory to the system after images of so many pixels; nothing for small ones, or without glibc.

    glibc keeps free memory for itself: a process would hold as much as its largest image needed, for good.
    """
    if pixels >= LARGE:
        _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    """glibc's malloc_trim, where there is one."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another libc; another system
        return lambda _: None

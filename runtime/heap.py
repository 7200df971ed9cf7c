"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release_freed() -> None:
    """Return free pages of the C heap to the system; without effect where the C library is not glibc.

    glibc keeps them for the process: it would hold the most that it ever needed, for images that were decoded, files that
    were parsed, weights that were packed.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another libc; another system
        return lambda _: None

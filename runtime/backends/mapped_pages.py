"""Pages of mapped weight files that a session has read to open and does not read when it runs.

Opening a session reads scales that are then in the packed weights (host_cache.py). The pages would count as the process's
memory for as long as the session lives: 33 MB of the 860 that a model of 1.1 billion weights in 4 bits takes with its cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

SMAPS = Path("/proc/self/smaps")


def release_pages(folder: Path) -> None:
    """Let the system take the pages of safetensors files below a folder that this process has mapped.

    A page that is read again comes back from the file. A mapping that was written to is left alone: its pages are nowhere else.
    Nothing happens on a system without Linux's list of mappings.
    """
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, size in _unwritten(SMAPS.read_text(encoding="utf-8", errors="surrogateescape"), f"{folder.resolve()}/"):
            madvise(start, size, mmap.MADV_DONTNEED)


def _unwritten(smaps: str, prefix: str) -> Iterator[tuple[int, int]]:
    """Address and size in bytes of each mapping of such a file, none of whose pages belongs to this process alone."""
    start = size = 0
    for line in smaps.splitlines():
        if not line[:1].isupper():  # addresses, flags and a file; its figures follow
            addresses, *_, file = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            size = end - start if file.startswith(prefix) and file.endswith(".safetensors") else 0
        elif size and line.startswith("Anonymous:") and line.split()[1] == "0":
            yield start, size

"""File locks between processes that share a folder. The kernel releases them when a process ends.

Readers of a folder take a shared lock on READERS; files that a reader may still open are removed under the exclusive lock.
Where the file system has no locks, or the folder is read-only and has no such file, nothing is locked and nothing fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

READERS = ".readers.lock"
TIMEOUT_S = 10.0  # of waiting for a process that removes files, which takes milliseconds
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


class Hold:
    """A lock until `close`, until the object is collected, or until the process ends."""

    def __init__(self, descriptor: int | None) -> None:
        self.held = descriptor is not None
        self._release = weakref.finalize(self, os.close, descriptor) if descriptor is not None else None

    def close(self) -> None:
        """Release the lock; may be called again."""
        self.held = False
        if self._release:
            self._release()


def hold(folder: Path) -> Hold:
    """Keep the files of `folder` from being removed by other processes of staticvl."""
    try:
        descriptor = _open_shared(folder / READERS)
    except OSError:
        return Hold(None)
    end = time.monotonic() + TIMEOUT_S
    while (free := _take(descriptor, exclusive=False)) is False and time.monotonic() < end:
        time.sleep(0.02)
    if free:
        return Hold(descriptor)
    os.close(descriptor)
    return Hold(None)


@contextlib.contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Take the exclusive lock on `path` for the block; False where another process has it. True where there are no locks.

    `wait` for the other process instead. Raises OSError where the file cannot be opened for writing.
    """
    descriptor = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield _take(descriptor, exclusive=True, wait=wait) is not False
    finally:
        os.close(descriptor)


def _open_shared(path: Path) -> int:
    """Open a lock file for reading alone where it is there: so a reader can lock a folder that it cannot write."""
    try:
        return _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return _open(path, os.O_RDONLY | os.O_CREAT)


def _open(path: Path, flags: int) -> int:
    # The flags keep it from waiting for the other end of a FIFO, and from following a link.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file; remove it")
    return descriptor


def _take(descriptor: int, *, exclusive: bool, wait: bool = False) -> bool | None:
    """Whether the lock was taken; None: there are no locks here."""
    try:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except ImportError:
        return None
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True

"""A kind whose cases end in all that no kind allows, so that it is known to be seen."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from .case import Attempt, Kind


def _raise() -> str:
    raise ValueError("no exception of the project")


def _complain() -> str:
    print("Traceback (most recent call last)", file=sys.stderr)
    return "well"


def _open_file() -> str:
    os.open(os.devnull, os.O_RDONLY)
    return "well"


def _start_thread() -> str:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return "well"


def _hang() -> str:
    threading.Event().wait()
    return "well"


def _fill_memory() -> str:
    return str(len(bytearray(600 << 20)))


# What a case does, and the ending that it must be given.
DEEDS: tuple[tuple[Callable[[], str], str], ...] = (
    (lambda: "well", "well"),
    (_raise, "ValueError at attack/mischief.py:17"),
    (lambda: "odd", "odd"),
    (os.abort, "the process died: SIGABRT"),
    (_hang, "no end in time"),
    (_complain, "traceback on stderr"),
    (_open_file, "leaves file descriptors"),
    (_start_thread, "leaves threads"),
    (_fill_memory, "takes too much memory"),
    (lambda: "well", "well"),
)


@contextlib.contextmanager
def _ground(folder: Path) -> Iterator[Path]:
    yield folder


def _make(_: Path, rng: random.Random, index: int) -> Attempt:
    return Attempt(f"{index}: {rng.random()}", DEEDS[index][0])


KIND = Kind(
    name="mischief",
    what="what no kind allows",
    endings=("well",),
    limit_s=5,
    count=len(DEEDS),
    ground=_ground,
    make=_make,
    memory_mb=500,
)

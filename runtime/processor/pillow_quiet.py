"""Pillow's warnings are ignored while an image is loaded: a file is either used or refused with an ImageError."""

from __future__ import annotations

import contextlib
import threading
import warnings
from typing import Any


class _Quiet(contextlib.AbstractContextManager):
    """Ignores warnings of Pillow's modules, and of no others, while any thread is inside.

    Not warnings.catch_warnings: it restores the filters of its start, and two threads that overlap would leave the filters of
    the process changed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._rule: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            warnings.filterwarnings("ignore", module=r"PIL\.")  # moved to the front where it is there already
            self._rule = warnings.filters[0]

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._rule in warnings.filters:
                warnings.filters.remove(self._rule)  # type: ignore[attr-defined]


quiet_pillow = _Quiet()

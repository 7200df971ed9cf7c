"""Progress of a build, reported to a front end; this default reports nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Progress:
    """Override in a front end."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """A piece of work of `total` units; yields a function to call with each amount done."""
        yield lambda amount: None

    def say(self, line: str) -> None:
        """One line about work that has just ended."""

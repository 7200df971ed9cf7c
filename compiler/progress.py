"""How a build tells what it is doing; this default says nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Progress:
    """Override in a front end."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """A piece of work of `total` units; the function given is called with each amount done."""
        yield lambda amount: None

    def say(self, line: str) -> None:
        """One line about what was just finished."""

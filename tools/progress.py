"""Progress of a build on the terminal: a bar for each stage, none where the output is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from ..compiler.progress import Progress


class TerminalProgress(Progress):
    """Bars on stderr; finished graphs as lines above them."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        if total == 0:
            yield lambda amount: None
            return
        scale = unit == "B"
        with tqdm(total=total, desc=name, unit=unit, unit_scale=scale, disable=None, file=sys.stderr) as bar:
            yield bar.update

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)

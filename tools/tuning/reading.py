"""Options for reading a trace, and counts of what was left out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ...runtime.shown import quoted
from .columns import NAMES, Request
from .time_units import TimeReader
from .trace_error import TraceError

T = TypeVar("T")
_MEANINGS = {"output": "generated", **{meaning: meaning for meaning in NAMES}}  # by word of --columns


@dataclass(slots=True)
class Reading:
    """Options of a reader, and what it counts. `columns`: names of columns by meaning, which precede the known names."""

    times: TimeReader = field(default_factory=TimeReader)
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad_rows: bool = False
    preamble: int = 0  # lines before the requests
    failed: int = 0  # requests without an answer
    skipped: int = 0  # rows that cannot be read
    first_skipped: str = ""  # the error of the first

    def request(self, read: Callable[[], Request]) -> Request | None:
        """What `read` returns, or None, counted, for a failed request, and for a bad row where those are skipped."""
        request = self.attempt(read)
        if request is not None and not request.generated:
            self.failed += 1
            return None
        return request

    def attempt(self, read: Callable[[], T]) -> T | None:
        """What `read` returns, or None, counted, for its TraceError, where bad rows are skipped."""
        try:
            return read()
        except TraceError as error:
            if not self.skip_bad_rows:
                raise
            self.skipped += 1
            self.first_skipped = self.first_skipped or str(error)
            return None

    def notes(self) -> list[str]:
        """A sentence for each kind of line that was left out."""
        return [
            f"{count} {text}"
            for count, text in (
                (self.preamble, "line(s) before the requests left out"),
                (self.failed, "failed request(s), with 0 answer tokens, left out"),
                (self.skipped, f"row(s) left out, as --skip-bad-rows says; the first: {self.first_skipped}"),
            )
            if count
        ]


def parse_columns(text: str | None) -> dict[str, str]:
    """ "prompt=A,output=B,time=C": names of columns by meaning. Raises TraceError."""
    columns = {}
    for part in text.split(",") if text else ():
        word, _, name = (each.strip() for each in part.partition("="))
        if word not in _MEANINGS or not name:
            raise TraceError(
                f"--columns holds {quoted(part)}; expected MEANING=NAME, where MEANING is one of {', '.join(_MEANINGS)}"
            )
        columns[_MEANINGS[word]] = name
    return columns

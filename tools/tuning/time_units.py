"""Times of a trace in seconds, the unit that they are in, and a note on loads that a wrong unit would explain."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ...runtime.shown import quoted
from .trace_error import TraceError

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}  # by unit
LEAST_LOAD, MOST_LOAD = 0.01, 100.0  # of what can be served; other loads are hardly real
_LATEST = 1e11  # a number of this size is no time in seconds since 1970
_WORDS = {"ms": "ms", "us": "us", "ns": "ns", "millis": "ms", "micros": "us", "nanos": "ns", "nano": "ns"}
_IN_NAME = re.compile(rf"(?:[_ .-]|time|timestamp)({'|'.join(_WORDS)})$", re.IGNORECASE)
_IN_CAMEL = re.compile(rf"[a-z]({'|'.join(map(str.capitalize, _WORDS))})$")


@dataclass(slots=True)
class TimeReader:
    """A reader of times. `unit`: that of numbers; None: by the name of the column and the size of the number, else seconds."""

    unit: str | None = None
    taken: str = ""  # the unit of the last time, and where it is from

    def seconds(self, value: Any, column: str, where: str) -> float:
        """A time in seconds from any origin; raises TraceError."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.taken = "dates"
            return _moment(value, where)
        unit, self.taken = self._unit(number, column)
        seconds = number / PER_SECOND[unit]
        if not abs(seconds) < _LATEST:
            raise TraceError(f"{where}: the time is {quoted(value)}; expected seconds, milliseconds or a date with a time")
        return seconds

    def _unit(self, number: float, column: str) -> tuple[str, str]:
        if self.unit:
            return self.unit, f"{self.unit}, as --time-unit says"
        if match := _IN_NAME.search(column) or _IN_CAMEL.search(column):
            unit = _WORDS[match[1].lower()]
            return unit, f"{unit}, as the name {quoted(column)} says"
        for unit, least in (("ns", 1e6), ("us", 1e3), ("ms", 1.0)):
            if _LATEST * least <= abs(number) < math.inf:
                return unit, f"{unit}, as numbers of their size are since 1970"
        return "s", f"s, as the name {quoted(column)} says no unit"


def load_note(load: float, taken: str) -> str:
    """A note on a load far from all that is usual, in shares of what can be served; empty for others.

    `taken`: the unit of the times and where it is from, or "dates". A unit with which the load would be usual is named.
    """
    if LEAST_LOAD <= load <= MOST_LOAD or not taken:
        return ""
    start = (
        f"check the times: requests arrive at {100 * load:.3g} % of the rate that can be served; times were taken as {taken}"
    )
    unit = _likelier_unit(load, taken.split(",", maxsplit=1)[0])
    return start + (f"; --time-unit {unit} if they are in {unit}" if unit else "; --rate gives another rate")


def _likelier_unit(load: float, taken: str) -> str | None:
    """The unit with which a load would be nearest to what can be served; None where none gives a usual one."""
    if taken not in PER_SECOND:
        return None
    loads = {unit: load * count / PER_SECOND[taken] for unit, count in PER_SECOND.items()}
    unit = min(loads, key=lambda each: abs(math.log(loads[each])))
    return unit if LEAST_LOAD <= loads[unit] <= MOST_LOAD else None


def _moment(value: Any, where: str) -> float:
    try:
        moment = datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise TraceError(
            f"{where}: the time is {quoted(value)}; expected seconds or a date with a time such as 2023-11-16 18:15:46.68"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

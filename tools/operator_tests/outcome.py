"""What became of a case on a device, and lowered cases; none of this needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .forms import Form

CASES = "cases.json"  # the file of a folder of lowered cases that lists them
PASSED, DIFFERS, REFUSED = "passed", "differs", "refused"
_SHOWN = 200  # characters of an error


@dataclass(frozen=True, slots=True)
class CaseInfo:
    """A case without its numbers. `graphs`: kinds of the artifact's graphs that make such calls."""

    name: str
    sizes: dict[str, int]
    operators: tuple[str, ...]
    watches: tuple[str, ...]
    graphs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lowered:
    """A lowered case, the one at `place` among those of its form. `weights`: their names in the kernel's order. `error`: it
    could not be lowered, and has no kernel."""

    case: CaseInfo
    form: Form
    place: int
    weights: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class LoweredCases:
    """All cases of an artifact, whose graphs compute in `dtype`, and whose quantisation is `quant`."""

    dtype: str
    quant: str
    cases: tuple[Lowered, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`distance` is None where the device refused the case, with `error`; inf: an output that is not finite."""

    case: CaseInfo
    status: str
    tolerance: float
    distance: float | None = None
    output: str = ""  # the one that is furthest away
    error: str = ""


def failed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.status != PASSED]


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."

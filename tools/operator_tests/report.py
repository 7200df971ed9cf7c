"""Outcomes of operator tests for readers, and what to do about those that failed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from ...runtime.backends.ge_simulator.card_rules import RULES
from .outcome import DIFFERS, PASSED, Outcome, failed

WIDTH = 100
PAGE = "docs/ascend.md#operator-tests"


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For JSON: each case with its outcome; `remedy` is empty where it passed."""
    return [
        {
            "case": outcome.case.name,
            "sizes": outcome.case.sizes,
            "operators": list(outcome.case.operators),
            "graphs": list(outcome.case.graphs),
            "watches": list(outcome.case.watches),
            "status": outcome.status,
            "distance": outcome.distance,
            "tolerance": outcome.tolerance,
            "output": outcome.output,
            "error": outcome.error,
            "remedy": "" if outcome.status == PASSED else remedy(outcome),
        }
        for outcome in outcomes
    ]


def remedy(outcome: Outcome) -> str:
    """What to do about a case that failed."""
    eager = ",".join(outcome.case.graphs)
    known = "".join(f"; known fault {name}: {RULES[name].remedy} ({RULES[name].source})" for name in outcome.case.watches)
    what = "compute with them" if outcome.status == DIFFERS else "expect them to run"
    return f"do not {what} on this card: compile again with --eager {eager}, and report it{known}; see {PAGE}"


def print_outcomes(outcomes: Sequence[Outcome], device: str, console: Console) -> None:
    if not outcomes:
        console.print("no operator tests: the artifact has no compiled graphs")
        return
    console.print(f"operators on {device} against formulas: result, distance, test")
    for outcome in outcomes:
        for line in _lines(outcome):
            console.print(line, markup=False, soft_wrap=True)
    for line in _failures(outcomes):
        console.print(line, markup=False, soft_wrap=True)


def _lines(outcome: Outcome) -> list[str]:
    figure = "" if outcome.distance is None else f"{outcome.distance:.1e}"
    names = [name.removeprefix("fault.") for name in outcome.case.watches]
    watches = f"; watches {', '.join(names)}" if names else ""
    text = f"{outcome.case.name}: {', '.join(outcome.case.operators)}{watches}"
    return textwrap.wrap(text, WIDTH, initial_indent=f"{outcome.status:8}{figure:8}  ", subsequent_indent=" " * 18)


def _failures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    broken = failed(outcomes)
    yield f"{len(outcomes) - len(broken)} of {len(outcomes)} operator tests passed"
    for outcome in broken:
        if outcome.error:
            text = outcome.error
        else:
            limit = f"at most {outcome.tolerance:g}, or 0 where numbers are only moved"
            text = f"the output {outcome.output} is {outcome.distance:.1e} away; expected {limit}"
        yield f"{outcome.case.name}: {outcome.status}: {text}\n  {remedy(outcome)}"

"""Runs cases of several kinds within a count and a time, and says how they ended."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .case import Case, Kind, Outcome
from .lanes import lane_of

EVERY_S = 5.0  # between two lines of progress


@dataclass
class Tally:
    """How the cases of one kind ended."""

    kind: Kind
    planned: int
    endings: Counter[str] = field(default_factory=Counter)
    failures: list[Outcome] = field(default_factory=list)
    worst_s: float = 0.0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return self.endings.total()

    def add(self, outcome: Outcome) -> None:
        self.endings[outcome.ending] += 1
        self.worst_s = max(self.worst_s, outcome.seconds)
        if not outcome.allowed:
            self.failures.append(outcome)


def counts_of(kinds: Sequence[Kind], total: int | None) -> list[int]:
    """Inputs of each kind; `total` scales those of a full run."""
    whole = sum(kind.count for kind in kinds)
    return [kind.count if total is None else max(1, -(-kind.count * total // whole)) for kind in kinds]


def run_kind(
    kind: Kind,
    cases: Sequence[Case],
    folder: Path,
    seconds: float,
    seen: Callable[[Tally, Outcome], object] = lambda *_: None,
    most: float = float("inf"),
) -> Tally:
    """The cases of one kind, as many as begin within so many seconds, until `most` of them have failed."""
    tally = Tally(kind, len(cases))
    with lane_of(kind, folder) as lane:
        started = time.monotonic()
        for case in cases:
            if time.monotonic() - started > seconds or len(tally.failures) >= most:
                break
            outcome = lane.attack(case)
            tally.add(outcome)
            seen(tally, outcome)
        tally.seconds = time.monotonic() - started
    return tally


def cases_of(kind: Kind, count: int, seed: int) -> list[Case]:
    return [Case(kind.name, index, seed) for index in range(count)]


class Watch:
    """Writes failures to a file as they come, and a line of progress now and then."""

    def __init__(self, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self.file = out.open("w", encoding="utf-8")
        self._last = 0.0

    def __call__(self, tally: Tally, outcome: Outcome) -> None:
        if not outcome.allowed:
            print(json.dumps(outcome.as_data()), file=self.file, flush=True)
        now = time.monotonic()
        if now - self._last > EVERY_S or tally.done == tally.planned:
            self._last = now
            line = f"{tally.kind.name:<12} {tally.done:>5} of {tally.planned}, {len(tally.failures)} not allowed"
            print(line, file=sys.stderr, flush=True)


def run(kinds: Sequence[Kind], *, count: int | None, seconds: float, seed: int, folder: Path, watch: Watch) -> list[Tally]:
    """Kinds one after another; time that one leaves goes to those after it."""
    deadline = time.monotonic() + seconds
    tallies = []
    for kind, planned in zip(kinds, counts_of(kinds, count), strict=True):
        share = max(deadline - time.monotonic(), 0) * _weight(kind, kinds[len(tallies) :])
        tallies.append(run_kind(kind, cases_of(kind, planned, seed), folder, share, watch))
    return tallies


def _weight(kind: Kind, rest: Sequence[Kind]) -> float:
    """The part of the time left that a kind may take: twice its share by the times that its inputs may take at most, or all."""
    return min(1.0, 2 * kind.count * kind.limit_s / sum(each.count * each.limit_s for each in rest))


def table(tallies: Sequence[Tally]) -> str:
    """For people: a line for each kind, then each ending that is not allowed with one case."""
    rows = [("kind", "inputs", "not allowed", "longest", "endings that are allowed")]
    for each in tallies:
        allowed = {name: n for name, n in each.endings.most_common() if name in each.kind.endings}
        inputs = f"{each.done}" + (f" of {each.planned}" if each.done < each.planned else "")
        text = ", ".join(f"{n} {name}" for name, n in allowed.items())
        rows.append((each.kind.name, inputs, str(len(each.failures)), f"{each.worst_s:.1f} s", text))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)] + [row[4]]) for row in rows]
    total, failed = sum(each.done for each in tallies), sum(len(each.failures) for each in tallies)
    took = sum(each.seconds for each in tallies)
    return "\n".join([*lines, f"{total} inputs in {took:.0f} s, {failed} ended in something not allowed", *_groups(tallies)])


def _groups(tallies: Sequence[Tally]) -> list[str]:
    lines = []
    for tally in tallies:
        first: dict[str, Outcome] = {}
        for outcome in tally.failures:
            first.setdefault(outcome.ending, outcome)
        for ending, outcome in first.items():
            lines += [
                f"  {tally.endings[ending]:>4} x {tally.kind.name}: {ending}",
                f"         {outcome.case.name}: {outcome.what}",
            ]
            lines += [f"         {' '.join(outcome.detail.split())[:300]}"] * bool(outcome.detail)
    return lines

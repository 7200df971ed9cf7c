"""One match of contestants: side by side, one at a time, in turns.

Contestants sleep between their turns, so other work on the machine affects all alike, and ratios of medians say more than the
figures themselves. If not all fit into memory together, they run in heats with one contestant, the anchor, in each: figures of
different heats are compared through it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .answers import REFERENCE, Answer, compare
from .contestants import ANCHOR, Contestant
from .measures import Measure
from .process import ContestantError, Process

Start = Callable[[Contestant], Process]


@dataclass(slots=True)
class Entry:
    """All results of one contestant."""

    contestant: Contestant
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what it cannot do or failed at, and why
    answer: Answer | None = None
    load_s: float | None = None  # from the start of its process to a first token
    pss_mb: float | None = None  # after everything was measured
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by measure; turns in order
    beside: dict[str, list[float]] = field(default_factory=dict)  # the anchor's, of the same turns

    def median(self, measure: str) -> float | None:
        return statistics.median(self.seconds[measure]) if self.seconds.get(measure) else None


def relative(ours: Entry, theirs: Entry, measure: str) -> float | None:
    """How many times as long `theirs` takes, each taken against the anchor of its own heat; None where one has no figure."""
    shares = [
        statistics.median(entry.seconds[measure]) / statistics.median(entry.beside[measure])
        for entry in (ours, theirs)
        if entry.seconds.get(measure) and entry.beside.get(measure)
    ]
    return shares[1] / shares[0] if len(shares) == 2 else None


def heats(contestants: Sequence[Contestant], gigabytes: float) -> list[list[Contestant]]:
    """Groups of contestants that fit into the memory together, each with the anchor."""
    anchor = next((c for c in contestants if c.name == ANCHOR), contestants[0])
    result: list[list[Contestant]] = [[anchor]]
    for contestant in contestants:
        if contestant is anchor:
            continue
        if len(result[-1]) > 1 and sum(c.gigabytes for c in result[-1]) + contestant.gigabytes > gigabytes:
            result.append([anchor])
        result[-1].append(contestant)
    return result


def prepare(entries: Iterable[Entry], start: Start, tick: Callable[[str], object]) -> None:
    """Files that each library needs, one process after another; who cannot is noted and has no version afterwards."""
    for entry in entries:
        tick(f"preparing {entry.contestant.name}")
        try:
            process = start(entry.contestant)
            try:
                entry.versions = process.ask("prepare")["versions"]
            finally:
                process.end()
        except ContestantError as error:
            entry.notes.append(_note("prepare", error))


def write_reference(start: Start, tokens: list[int], file: Path) -> None:
    """The logits that all others are compared with, in a process that ends before anything is timed."""
    process = start(REFERENCE)
    try:
        process.ask("open", tokens=tokens[:4])
        process.ask("logits", tokens=tokens, file=str(file))
    finally:
        process.end()


@dataclass(frozen=True, slots=True)
class Match:
    """One heat's run; `check`: a prompt, and the file with the reference's logits, which the contestants' lie beside."""

    measures: Sequence[Measure]
    repeats: int
    start: Start
    check: tuple[list[int], Path]
    tick: Callable[[str], object]
    save: Callable[[], object]  # called after every measure, so that a run which is broken off has a report

    def play(self, entries: Sequence[Entry]) -> None:
        """Fill in what is measured; `entries[0]` is the anchor's."""
        alive: dict[str, Process] = {}
        try:
            for entry in entries:
                self._open(entry, alive)
            for measure in self.measures:
                self._measure(measure, [entry for entry in entries if entry.contestant.name in alive], alive)
                self.save()
            for entry in entries:
                if process := alive.get(entry.contestant.name):
                    entry.pss_mb = process.pss_mb()
            self.save()
        finally:
            for process in alive.values():
                process.end()

    def _open(self, entry: Entry, alive: dict[str, Process]) -> None:
        tokens, reference = self.check
        name = entry.contestant.name
        self.tick(f"opening {name}")
        try:
            alive[name] = process = self.start(entry.contestant)
            seconds = process.ask("open", tokens=tokens[:4])["seconds"]
            entry.load_s = seconds if entry.load_s is None else entry.load_s
            if entry.answer is None:
                file = reference.with_name(f"{name.replace(' ', '-')}.npy")
                process.ask("logits", tokens=tokens, file=str(file))
                entry.answer = compare(file, reference, entry.contestant.tolerance)
        except ContestantError as error:
            entry.notes.append(_note("open", error))
            if name in alive:
                alive.pop(name).end()

    def _measure(self, measure: Measure, entries: Sequence[Entry], alive: dict[str, Process]) -> None:
        able = list(entries)
        for turn in range(self.repeats + 1):  # the first opens graphs and compiles, and counts for nothing
            beside: float | None = None
            for entry in list(able):
                self.tick(f"{measure.name}: {entry.contestant.name}")
                try:
                    seconds = alive[entry.contestant.name].ask(**measure.command)["seconds"]
                except ContestantError as error:
                    entry.notes.append(_note(measure.name, error))
                    able.remove(entry)
                    continue
                if entry is entries[0]:
                    beside = seconds
                if turn:
                    entry.seconds.setdefault(measure.name, []).append(seconds)
                    if beside is not None:
                        entry.beside.setdefault(measure.name, []).append(beside)


def _note(what: str, error: ContestantError) -> str:
    return f"{what}: {'' if error.skipped else 'failed: '}{error}"

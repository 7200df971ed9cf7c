"""The record of a seeded fault, the artifacts that faults are seeded into, and a run of one."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from staticvl.tools.calibration_file import read_calibration
from staticvl.tools.comparing import taps
from staticvl.tools.comparing.findings import Finding
from staticvl.tools.comparing.open_side import open_side
from staticvl.tools.comparing.result import ComparisonResult
from staticvl.tools.comparing.sides import Side

from ..ascend import CHECKPOINTS
from ..comparisons import compared, compiled, reference_of, samples_of
from ..seeded import copied

TEXT = ("text 1", "text 2")
QUESTIONS = ("Name three colours.", "What is a circle?", "Say one word about each: a star, a square.", "Count to ten please.")


@dataclass(frozen=True, slots=True)
class Base:
    """A healthy artifact and the reference that it is compared with."""

    family: str
    by: str = "eager"
    quant: str = "none"
    tp: int = 1
    calibrated: bool = False

    @property
    def build(self) -> Base:
        """The same artifact, whatever runs its reference."""
        return Base(self.family, "eager", self.quant, self.tp, self.calibrated)


@dataclass(slots=True, eq=False)
class Seeding:
    """What a fault may change: a copy of the artifact, the reference's checkpoint, or code."""

    base: Base
    artifact: Path
    reference: Side
    folder: Path
    patch: pytest.MonkeyPatch
    stack: ExitStack
    candidate: Path | Side | None = None

    def copy(self) -> Path:
        self.candidate = copied(self.artifact, self.folder / "broken")
        return self.candidate

    def change_checkpoint(self, edit: Callable[[dict[str, Any]], object], file: str = "config.json") -> None:
        """Give the reference another config; the artifact stays what the right one made."""
        folder = self.folder / "checkpoint"
        source = CHECKPOINTS[self.base.family]
        shutil.copytree(source, folder, copy_function=os.symlink)
        (folder / file).unlink()
        data = json.loads((source / file).read_text())
        edit(data)
        (folder / file).write_text(json.dumps(data))
        self.reference = open_side(folder, by=self.base.by, like=self.artifact)
        self.stack.callback(self.reference.close)

    def open(self, folder: Path | None = None) -> Side:
        self.candidate = open_side(folder or self.artifact, threads=1)
        return self.candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. `where` and `says` are regular expressions for the place and the text of the first finding."""

    name: str
    base: Base
    seed: Callable[[Seeding], object]
    stage: str
    where: str
    says: str = ""
    scope: str = ""  # a sentence that is among those about the scope
    graph: str = ""
    side: str = "candidate"
    samples: tuple[str, ...] = ()  # () for those of the family; ("text",): the first text
    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def key(self) -> str:
        return re.sub(r"\W+", "_", self.name)


class Bases:
    """Artifacts and references, each made once."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.artifacts: dict[Base, Path] = {}
        self.references: dict[Base, Side] = {}

    def artifact(self, base: Base) -> Path:
        build = base.build
        if build not in self.artifacts:
            out = self.folder / f"{base.family}-{base.quant}-{base.tp}-{base.calibrated}"
            options: dict[str, Any] = {"quant": base.quant, "tp": base.tp} | ({"candidates": 6} if base.tp > 1 else {})
            if base.calibrated:
                questions = self.folder / "questions.jsonl"
                questions.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in QUESTIONS))
                options["calibration"] = read_calibration(questions)
            if not (out / "manifest.json").is_file():
                compiled(base.family, out, **options)
            self.artifacts[build] = out
        return self.artifacts[build]

    def reference(self, base: Base) -> Side:
        key = Base(base.family, base.by)
        if key not in self.references:
            self.references[key] = reference_of(base.family, self.artifact(base), by=base.by)
            self.stack.callback(self.references[key].close)
        return self.references[key]


def run(fault: Fault, bases: Bases, folder: Path) -> tuple[ComparisonResult, float]:
    """The result of comparing with the fault seeded, and the core-seconds of the comparison."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        place = Seeding(fault.base, bases.artifact(fault.base), bases.reference(fault.base), folder, patch, stack)
        taps.traced.cache_clear()
        fault.seed(place)
        samples = samples_of(fault.base.family)
        if fault.samples:
            samples = [each for each in _all_samples() if each.name in fault.samples]
        start = time.process_time()
        result = compared(place.reference, place.candidate or place.artifact, samples, **fault.settings)
        seconds = time.process_time() - start
    taps.traced.cache_clear()
    return result, seconds


def _all_samples():
    from staticvl.tools.comparing.samples import built_in_samples

    return built_in_samples()


def named(fault: Fault, result: ComparisonResult) -> str:
    """ "" where the first finding names the fault, else a sentence about what it names instead."""
    first = result.first
    if result.passed or first is None:
        return f"not found: passed {result.passed}, broken {result.broken[:2]}, notes {result.notes}"
    right = (
        first.stage == fault.stage
        and re.fullmatch(fault.where, first.where)
        and re.search(fault.says, first.text)
        and first.side == fault.side
        and (not fault.graph or re.fullmatch(fault.graph, first.graph))
        and (not fault.scope or fault.scope in result.scope)
    )
    return "" if right else f"{_brief(first)}; scope {result.scope}"


def _brief(finding: Finding) -> str:
    return f"{finding.stage}, {finding.where}, {finding.graph}, {finding.side}: {finding.text}"

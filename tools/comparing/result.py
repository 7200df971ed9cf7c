"""The result of a comparison, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .findings import STAGES, Finding
from .metrics import Figures
from .thresholds import DEFAULTS, Thresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores against the right answer: whether the texts are equal, and the boxes' intersection over union."""

    reference_exact: bool | None = None
    candidate_exact: bool | None = None
    reference_iou: float | None = None
    candidate_iou: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """The result of one sample."""

    name: str
    positions: int
    tokens: tuple[str, ...]  # forced
    figures: Figures
    broken: tuple[str, ...]
    scores: Scores | None
    layers: tuple[float, ...] = ()  # error of keys and values, by layer that attends to the text


@dataclass(frozen=True, slots=True)
class EdgeResult:
    """The result of one edge case of one graph."""

    graph: str
    column: str
    error: float
    broken: bool


@dataclass(slots=True, kw_only=True)
class ComparisonResult:
    """The result of the whole comparison."""

    reference: str
    candidate: str
    precision: str
    limits: Thresholds
    samples: list[SampleResult] = field(default_factory=list)
    edges: list[EdgeResult] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    scope: list[str] = field(default_factory=list)
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the inspected graph: own error, drift
    inspected: str = ""  # the graph, and the case that it ran in
    notes: list[str] = field(default_factory=list)
    rounding: str = ""  # a sentence, where the rounding of the quantisation explains every broken limit

    @property
    def broken(self) -> list[str]:
        """The limits that are broken, a clause each."""
        clauses = [f"{each.name}: {clause}" for each in self.samples for clause in each.broken]
        return clauses + [f"{e.graph}, {e.column}: relative error {e.error:.3g}" for e in self.edges if e.broken]

    @property
    def passed(self) -> bool:
        """There is no finding, and no limit is broken; rounding excuses default limits, not those that a user has set."""
        excused = bool(self.rounding) and self.limits == DEFAULTS.get(self.precision)
        return not self.findings and (excused or not self.broken)

    @property
    def first(self) -> Finding | None:
        """The finding of the earliest stage, which explains the others."""
        return min(self.findings, key=lambda each: STAGES.index(each.stage), default=None)

    def plain(self) -> dict[str, Any]:
        """The result as JSON types."""
        first = self.first
        return _finite(
            {
                "reference": self.reference,
                "candidate": self.candidate,
                "passed": self.passed,
                "precision": self.precision,
                "limits": asdict(self.limits),
                "broken": self.broken,
                "fault": first.plain() if first else None,
                "findings": [each.plain() for each in self.findings],
                "scope": self.scope,
                "samples": [asdict(each) for each in self.samples],
                "edges": [asdict(each) for each in self.edges],
                "layers": {name: {"own": own, "drift": drift} for name, (own, drift) in self.layers.items()},
                "looked_into": self.inspected,
                "notes": self.notes,
                "rounding": self.rounding,
            }
        )


def _finite(value: Any) -> Any:
    """A value with infinities and NaN as None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

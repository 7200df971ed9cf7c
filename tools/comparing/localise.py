"""The search for the operator that makes a case fail.

A captured run of a graph is compared operator by operator (operator_errors.py), so a fault in a compiled graph is named at
once: stage, bucket, layer and operator. Then the feeds of the steps are checked and, where transformers
is the reference, the definition itself. What a wrong input explains is not looked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .capture import CapturedRun, capture
from .feeds import FeedCheck, fed_runs
from .findings import Finding
from .first_fault import layer_errors
from .hf_side import HfPrepared, HfSide
from .layers import compare_definition
from .operator_errors import OpError
from .sides import Prepared, Side
from .static_side import StaticPrepared, StaticSide, open_eager_side
from .taps import Inspector
from .thresholds import Thresholds

MAX_CASES = 12  # that are inspected
RUNS = 3  # of one graph in one case
MAX_CORRECT_RUNS = 4  # of one graph, in cases for other graphs


@dataclass(frozen=True, slots=True, eq=False)
class FailingCase:
    """Requests that ran together with a wrong result, as each side has prepared them."""

    name: str
    graph: str  # that the case was made for; "": none
    reference: tuple[Prepared, ...]
    candidate: tuple[Prepared, ...]
    answers: tuple[np.ndarray, ...]
    route: dict[str, int] | None  # the candidate's buckets that the case is for
    error: float


class Localiser:
    """The search for causes of failing cases. `layers`: errors by layer of the graph named by `inspected`."""

    def __init__(self, reference: Side, candidate: Side, limits: Thresholds) -> None:
        self.reference, self.candidate, self.limits = reference, candidate, limits
        self.layers: dict[str, tuple[float, float]] = {}
        self.inspected = ""

    def localise(
        self, failing: Sequence[FailingCase], advance: Callable[[], object], known: Sequence[Finding] = ()
    ) -> list[Finding]:
        """Findings for the causes, each graph's first one only. `advance` is called for every case. `known`: earlier findings;
        a wrong input explains what follows from it, so that the definition is not compared then."""
        findings: list[Finding] = []
        for side, label in ((self.candidate, "candidate"), (self.reference, "reference")):
            if isinstance(side, StaticSide) and side.compiled:
                findings += self._graphs(side, label, failing, advance)
        if findings or any(each.stage in ("inputs", "feeds") for each in known):
            return findings
        for case in failing[:MAX_CASES]:
            if causes := self._feeds(case):
                return causes
        return self._definition(failing)

    # ---- graphs

    def _graphs(
        self, side: StaticSide, label: str, failing: Sequence[FailingCase], advance: Callable[[], object]
    ) -> list[Finding]:
        if side.config is None or side.artifact.manifest.pp > 1:
            return []  # unknown sizes, or stages, whose graphs are not compared by operator
        inspector = Inspector(side, self.limits.operators)
        findings: dict[str, Finding] = {}
        run_counts: Counter[str] = Counter()
        for case in _ordered(failing):
            advance()
            if case.graph in findings:
                continue
            prompts, route = (case.candidate, case.route) if label == "candidate" else (case.reference, None)
            for run in capture(side, prompts, case.answers, route, most=RUNS):
                if run.graph.name in findings or (
                    run_counts[run.graph.name] >= MAX_CORRECT_RUNS and run.graph.name != case.graph
                ):
                    continue
                run_counts[run.graph.name] += 1
                fault, errors = inspector.inspect(run)
                if not self.inspected or (fault and not findings):
                    self.layers, self.inspected = layer_errors(errors[0]), f"{run.graph.name} in {case.name}"
                if fault:
                    findings[run.graph.name] = self._finding(side, label, run, fault)
                    break
        return [*findings.values()]

    @staticmethod
    def _finding(side: StaticSide, label: str, run: CapturedRun, fault: OpError) -> Finding:
        ranks = side.artifact.manifest.tp
        where = f"rank {fault.rank} of {ranks}, " if ranks > 1 else ""
        error = "its result is not in the graph" if fault.error is None else f"relative error {fault.error:.2e}"
        note = f"; {fault.note}" if fault.note else ""
        text = f"{run.graph.name}: {where}{fault.name} {list(fault.shape)} is wrong by itself: {error}{note}"
        return Finding(
            stage="graph", where=fault.name, text=text, side=label, graph=run.graph.name, error=fault.error,
            shape=fault.shape, rank=fault.rank if ranks > 1 else None,
        )  # fmt: skip

    # ---- feeds

    def _feeds(self, case: FailingCase) -> list[Finding]:
        side, prompts = self.candidate, [each for each in case.candidate if isinstance(each, StaticPrepared)]
        if not isinstance(side, StaticSide) or len(prompts) < len(case.candidate):
            return []
        with fed_runs(side) as runs:
            side.run_forced(prompts, case.answers, route=case.route)
        return FeedCheck(side, prompts, case.answers, self.limits.inputs).findings(runs)

    # ---- the definition

    def _definition(self, failing: Sequence[FailingCase]) -> list[Finding]:
        """Findings about the definition against transformers over the same weights, where transformers is a side."""
        hf = next((side for side in (self.reference, self.candidate) if isinstance(side, HfSide)), None)
        if hf is None:
            return []
        case = max(failing, key=lambda each: each.reference[0].length)
        theirs = next(each for each in (case.reference[0], case.candidate[0]) if isinstance(each, HfPrepared))
        ours = next((each for each in (case.candidate[0], case.reference[0]) if isinstance(each, StaticPrepared)), None)
        if ours is None:
            return []
        images = len(ours.prompt.frames) or None
        eager = open_eager_side(hf.checkpoint, context=theirs.length + 8, images=images, name="definitions")
        findings, errors = compare_definition(eager, hf, ours, theirs)
        if errors and not self.inspected:
            self.layers, self.inspected = {name: (error, error) for name, error in errors.items()}, "the definition"
        return findings


def _ordered(failing: Sequence[FailingCase]) -> list[FailingCase]:
    """At most MAX_CASES cases: the worst of every graph first, then the others."""
    ordered = sorted(failing, key=lambda each: -each.error)
    first: dict[str, FailingCase] = {}
    for case in ordered:
        first.setdefault(case.graph, case)
    return [*first.values(), *(case for case in ordered if case not in first.values())][:MAX_CASES]

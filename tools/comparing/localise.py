"""From a case that came out wrong to the operator that is wrong.

A captured run of a graph is compared operator by operator (operator_errors.py), so a fault in a compiled graph is named at
once: stage, bucket, layer and operator. What no graph explains is looked for in what the steps were fed and, where
transformers is the reference, in the definition itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .capture import Captured, capture
from .feeds import compare_feeds
from .findings import Finding
from .first_fault import layer_errors
from .hf_side import HfPrepared, HfSide
from .layers import compare_definition
from .operator_errors import OpError
from .sides import Prepared, Side
from .static_side import StaticPrepared, StaticSide, open_eager_side
from .taps import Inspector
from .thresholds import Thresholds

MOST_CASES = 12  # that are looked into
RUNS = 3  # of one graph in one case
ENOUGH = 4  # runs of a graph that were right, in cases that were made for others


@dataclass(frozen=True, slots=True, eq=False)
class Failing:
    """Requests that ran together and came out wrong, as each side has prepared them."""

    name: str
    graph: str  # that the case was made for; "": none
    reference: tuple[Prepared, ...]
    candidate: tuple[Prepared, ...]
    answers: tuple[np.ndarray, ...]
    route: dict[str, int] | None  # the candidate's buckets that the case is for
    error: float


class Localiser:
    """Looks for the causes of failing cases."""

    def __init__(self, reference: Side, candidate: Side, limits: Thresholds) -> None:
        self.reference, self.candidate, self.limits = reference, candidate, limits
        self.layers: dict[str, tuple[float, float]] = {}
        self.looked_into = ""

    def localise(self, failing: Sequence[Failing], advance: Callable[[], object]) -> list[Finding]:
        """Causes, each graph's first one only."""
        found: list[Finding] = []
        for side, label in ((self.candidate, "candidate"), (self.reference, "reference")):
            if isinstance(side, StaticSide) and side.compiled:
                found += self._graphs(side, label, failing, advance)
        if found:
            return found
        for case in failing[:MOST_CASES]:
            if len(case.candidate) == 1 and (fed := self._feeds(case)):
                return fed
        return self._definition(failing)

    # ---- graphs

    def _graphs(self, side: StaticSide, label: str, failing: Sequence[Failing], advance: Callable[[], object]) -> list[Finding]:
        if side.config is None or side.artifact.manifest.pp > 1:
            return []  # sizes that are not known; stages, whose graphs are not walked
        inspector = Inspector(side, self.limits.operators)
        found: dict[str, Finding] = {}
        inspected: Counter[str] = Counter()
        for case in _spread(failing):
            advance()
            if case.graph in found:
                continue
            prompts, route = (case.candidate, case.route) if label == "candidate" else (case.reference, None)
            for run in capture(side, prompts, case.answers, route, most=RUNS):
                if run.graph.name in found or (inspected[run.graph.name] >= ENOUGH and run.graph.name != case.graph):
                    continue
                inspected[run.graph.name] += 1
                culprit, errors = inspector.inspect(run)
                if not self.looked_into or (culprit and not found):
                    self.layers, self.looked_into = layer_errors(errors[0]), f"{run.graph.name} in {case.name}"
                if culprit:
                    found[run.graph.name] = self._found(side, label, run, culprit)
                    break
        return [*found.values()]

    @staticmethod
    def _found(side: StaticSide, label: str, run: Captured, culprit: OpError) -> Finding:
        ranks = side.artifact.manifest.tp
        where = f"rank {culprit.rank} of {ranks}, " if ranks > 1 else ""
        told = "its result is nowhere in the graph" if culprit.error is None else f"relative error {culprit.error:.2e}"
        note = f"; {culprit.note}" if culprit.note else ""
        text = f"{run.graph.name}: {where}{culprit.name} {list(culprit.shape)} is wrong by itself: {told}{note}"
        return Finding(
            stage="graph", where=culprit.name, text=text, side=label, graph=run.graph.name, error=culprit.error,
            shape=culprit.shape, rank=culprit.rank if ranks > 1 else None,
        )  # fmt: skip

    # ---- what steps were fed

    def _feeds(self, case: Failing) -> list[Finding]:
        side, (prompt,), (answer,) = self.candidate, case.candidate, case.answers
        if not isinstance(side, StaticSide) or not isinstance(prompt, StaticPrepared):
            return []
        runs = capture(side, [prompt], [answer], case.route, caches=False)
        (right,) = case.reference
        expected = right.with_tokens(right.length + len(answer), np.asarray(answer)).inputs
        expected = {name: value for name, value in expected.items() if name in ("rope_cos", "rope_sin", "query_scale")}
        if isinstance(prompt, StaticPrepared) and prompt.prompt.ntk != 1:
            expected = {}  # what comes behind the prompt keeps its tables
        return compare_feeds(runs, prompt, answer, expected, self.limits.inputs)

    # ---- the definition

    def _definition(self, failing: Sequence[Failing]) -> list[Finding]:
        """Where transformers is the reference, it is asked about the definition over the same weights."""
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
        found, errors = compare_definition(eager, hf, ours, theirs)
        if errors and not self.looked_into:
            self.layers, self.looked_into = {name: (error, error) for name, error in errors.items()}, "the definition"
        return found


def _spread(failing: Sequence[Failing]) -> list[Failing]:
    """The worst case of every graph first, then the others."""
    ordered = sorted(failing, key=lambda each: -each.error)
    first: dict[str, Failing] = {}
    for case in ordered:
        first.setdefault(case.graph, case)
    return [*first.values(), *(case for case in ordered if case not in first.values())][:MOST_CASES]

"""A whole comparison: settings, weights, samples, edge cases, and the search for causes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...runtime.engine.fit import ContextError
from ...runtime.processor.images import ImageError
from ...runtime.processor.prompt import PromptError
from ...runtime.shown import shown
from ...weights.calibrated_layers import layer_of
from .edges import Edge, EdgeRequest, edges
from .fault_scope import fault_scope
from .feeds import FeedCheck, check_prompt, fed_runs
from .findings import Finding
from .hf_side import HfSide
from .inputs import compare_inputs
from .localise import FailingCase, Localiser
from .metrics import compare_logits, exact_match, matched_iou, relative_error, with_texts
from .result import ComparisonResult, EdgeResult, SampleResult, Scores
from .samples import DataError, Sample
from .settings import compare_settings, differ_in_size
from .sides import Generated, Prepared, Side, SideError, answer_text
from .static_side import StaticPrepared, StaticSide, resizing_of
from .stored_side import rounding_errors
from .stored_weights import stored_weights
from .thresholds import Thresholds, broken, coarser, precision
from .weights import WeightComparison, merged

ProgressStage = Callable[[str, int], Callable[[], object]]  # name and number of steps -> a function to call at each step


# The limits of kernels that round activations to 8 bits, where the definitions over the same weights do not.
ROUNDED_INPUTS = "w8a16"


def no_progress(_name: str, _steps: int) -> Callable[[], object]:
    return lambda: None


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Two sides, the samples, and the limits of their differences."""

    reference: Side
    candidate: Side
    samples: Sequence[Sample]
    limits: dict[str, Thresholds]
    new_tokens: int = 16
    with_edges: bool = True
    inspect: str = "failed"  # always | failed | never
    seed: int = 0
    stage: ProgressStage = no_progress
    failing: list[FailingCase] = field(default_factory=list)
    _weights_compared: bool = False  # every one
    _prepared: dict[tuple[int, str], tuple[Sample, Prepared]] = field(default_factory=dict)

    def run(self) -> ComparisonResult:
        """The result; raises DataError, ContextError or PromptError for a sample of a file that cannot be run."""
        if self.reference.info.family != self.candidate.info.family:
            families = f"{self.reference.info.family} and {self.candidate.info.family}"
            raise SideError(
                f"{self.reference.name} and {self.candidate.name} are of the families {families}; compare two sides of one "
                "model"
            )
        kind = coarser(precision(self.reference.manifest), precision(self.candidate.manifest))
        result = ComparisonResult(
            reference=self.reference.name, candidate=self.candidate.name, precision=kind, limits=self.limits[kind]
        )
        findings, notes = compare_settings(
            (self.reference.info, self.candidate.info), (self.reference.config, self.candidate.config)
        )
        result.findings += findings
        result.notes += notes
        self._attempt(result, "weights", self._weights)
        if size := differ_in_size(result.findings):
            result.notes.append(f"no sample was run: {size} differs, so that both sides' numbers have other shapes")
            return result
        self._attempt(result, "samples", self._samples)
        if self._has_edges and result.samples:
            self._attempt(result, "edges of graphs", self._edges)
        if self.failing and self.inspect != "never":
            self._attempt(result, "operators", self._localise)
        if result.broken and not result.findings:
            self._attempt(result, "rounding", self._explain)
        manifest = self.candidate.manifest
        ranks, quant = (manifest.tp, manifest.quant) if manifest else (1, "none")
        if result.rounding:
            return result
        result.scope = fault_scope(result.edges, result.findings, ranks, quant)
        return result

    @staticmethod
    def _attempt(result: ComparisonResult, what: str, step: Callable[[ComparisonResult], None]) -> None:
        """Run a stage. What stops it is a finding, unless earlier findings explain it; mistakes of a user are raised."""
        try:
            step(result)
        except (DataError, SideError, MemoryError, ModuleNotFoundError):
            raise
        except Exception as error:
            text = f"{what} could not be compared: {type(error).__name__}: {shown(' '.join(str(error).split()))}"
            if result.findings:
                result.notes.append(text)
            else:
                result.findings.append(Finding(stage="graph", where=what, text=text))

    @property
    def _has_edges(self) -> bool:
        return self.with_edges and self.candidate.manifest is not None

    # ---- weights

    def _weights(self, result: ComparisonResult) -> None:
        config = self.candidate.config or self.reference.config
        if config is None or self._same_checkpoint():
            self._weights_compared = config is not None
            return
        sides = stored_weights(self.reference), stored_weights(self.candidate)
        comparison = WeightComparison(config, *sides, self.limits)
        if not comparison.possible:
            result.notes.append("weights were not compared: both sides are sharded, over different numbers of ranks")
            return
        names, findings = comparison.names(), comparison.extra()
        if quant := comparison.folded_unknown:
            names = [name for name in names if not layer_of(name, quant)]
            result.notes.append("weights of calibrated layers were not compared one by one: scales are folded into them")
        advance = self.stage("comparing weights", len(names))
        for name in names:
            findings += comparison.compare(name)
            advance()
        self._weights_compared = not comparison.folded_unknown
        result.findings += merged(findings, len(names))
        result.notes += comparison.notes()

    def _same_checkpoint(self) -> bool:
        """Whether both sides read the weights of the same files."""
        folders = [
            side.checkpoint.folder.resolve() for side in (self.reference, self.candidate)
            if isinstance(side, StaticSide | HfSide) and side.checkpoint
        ]  # fmt: skip
        return len(folders) == 2 and folders[0] == folders[1]

    # ---- samples

    def _samples(self, result: ComparisonResult) -> None:
        advance = self.stage("running samples on both sides", len(self.samples))
        reported: set[str] = set()
        for sample in self.samples:
            try:
                sample_result = self._sample(sample, result, reported)
            except (ContextError, PromptError, ImageError, DataError) as error:
                if not sample.built_in:
                    raise DataError(f"{sample.name}: {error}") from error
                result.notes.append(f"the built-in sample {sample.name!r} was left out: {error}")
            else:
                result.samples.append(sample_result)
            advance()
        if not result.samples:
            raise DataError("no sample fits both sides; give shorter ones with --data, or compile with a larger --context")

    def _sample(self, sample: Sample, result: ComparisonResult, reported: set[str]) -> SampleResult:
        pair = [self._prepare(side, sample) for side in (self.reference, self.candidate)]
        self._report(result, sample, self._inputs(sample, pair, result.limits.inputs), reported)
        answer = self._answer(sample, pair[0])
        outputs = [
            self._forced(side, prompt, answer, sample, result, reported) for side, prompt in zip(self.sides, pair, strict=True)
        ]
        limits, tokenizer = result.limits, self.reference.processor.tokenizer
        figures = compare_logits(outputs[0].logits, outputs[1].logits, answer, tie=limits.relative)
        divergence = with_texts(figures.divergence, lambda token: tokenizer.token(token) or str(token))
        figures = dataclasses.replace(figures, divergence=divergence)
        clauses = tuple(broken(figures, limits))
        if clauses or (self.inspect == "always" and not self._has_edges):
            error = figures.relative
            self.failing.append(FailingCase(sample.name, "", (pair[0],), (pair[1],), (answer,), None, error))
        return SampleResult(
            name=sample.name,
            positions=pair[0].length,
            tokens=tuple(tokenizer.token(int(token)) or str(token) for token in answer),
            figures=figures,
            broken=clauses,
            scores=self._scores(sample, pair),
            layers=_by_layer(outputs[0].caches, outputs[1].caches),
        )

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.reference, self.candidate

    def _inputs(self, sample: Sample, pair: Sequence[Prepared], limit: float) -> list[Finding]:
        """What the host made of a prompt: by both sides, and by what the prompt requires."""
        findings = compare_inputs(pair[0].inputs, pair[1].inputs, limit, resizing_of(self.candidate, sample))
        for prompt, label in ((pair[1], "candidate"), (pair[0], "reference")):
            if isinstance(prompt, StaticPrepared):
                findings += check_prompt(prompt, label)
        return findings

    @staticmethod
    def _report(result: ComparisonResult, sample: Sample, findings: Sequence[Finding], reported: set[str]) -> None:
        """Add findings about a sample's inputs, each once, with the first sample that shows it."""
        for finding in findings:
            if finding.where not in reported:
                reported.add(finding.where)
                result.findings.append(dataclasses.replace(finding, text=f"{finding.text} (sample {sample.name!r})"))

    def _forced(
        self, side: Side, prompt: Prepared, answer: np.ndarray, sample: Sample, result: ComparisonResult, reported: set[str]
    ) -> Generated:
        """A side's logits and caches. The feeds of its runs are checked, unless wrong inputs explain them."""
        if not isinstance(side, StaticSide) or not isinstance(prompt, StaticPrepared):
            return side.run_forced([prompt], [answer], caches=True)[0]
        with fed_runs(side) as runs:
            generated = side.run_forced([prompt], [answer], caches=True)[0]
        if not any(each.stage == "inputs" for each in result.findings):
            findings = FeedCheck(side, [prompt], [answer], result.limits.inputs).findings(runs)
            label = "candidate" if side is self.candidate else "reference"
            self._report(result, sample, [dataclasses.replace(each, side=label) for each in findings], reported)
        return generated

    def _prepare(self, side: Side, sample: Sample) -> Prepared:
        key = id(side), sample.name
        if key not in self._prepared or self._prepared[key][0] is not sample:
            self._prepared[key] = sample, side.prepare(sample)
        return self._prepared[key][1]

    def _answer(self, sample: Sample, prompt: Prepared) -> np.ndarray:
        """The tokens that are forced on both sides, int64 [n]."""
        if sample.answer is not None:
            tokenizer = self.reference.processor.tokenizer
            ids = [*tokenizer.encode(sample.answer, add_bos=False), self.reference.info.eos_token_ids[0]]
            return np.array(ids, np.int64)
        return np.asarray(self.reference.greedy(prompt, self.new_tokens), np.int64)

    def _scores(self, sample: Sample, pair: Sequence[Prepared]) -> Scores | None:
        """Scores of each side's own answer; None where the right one is not known."""
        if sample.expected is None and not sample.boxes:
            return None
        expected = sample.expected or ""
        count = max(self.new_tokens, 2 * len(self.reference.processor.tokenizer.encode(expected, add_bos=False)) + 8)
        scores: dict[str, Any] = {}
        for label, side, prompt in zip(("reference", "candidate"), (self.reference, self.candidate), pair, strict=True):
            text = answer_text(side, side.greedy(prompt, count))
            if sample.expected is not None:
                scores[f"{label}_exact"] = exact_match(sample.expected, text)
            if sample.boxes:
                boxes = [box.normalised for box in side.boxes(text, prompt)]
                scores[f"{label}_iou"] = matched_iou(sample.boxes, boxes)
        return Scores(**scores)

    # ---- graphs at their edges

    def _edges(self, result: ComparisonResult) -> None:
        assert self.candidate.manifest is not None
        cases = edges(self.candidate.manifest, self.seed)
        advance = self.stage("running graphs at their edges", len(cases))
        logits: dict[tuple, np.ndarray] = {}  # the reference's, by request
        left_out = 0
        for case in cases:
            try:
                result.edges.append(self._edge(case, result.limits, logits))
            except (ContextError, PromptError):
                left_out += 1
            advance()
        if left_out:
            result.notes.append(f"{left_out} edge cases were left out: they do not fit the context")

    def _edge(self, case: Edge, limits: Thresholds, logits: dict[tuple, np.ndarray]) -> EdgeResult:
        reference = tuple(self._request_prompt(self.reference, request) for request in case.requests)
        candidate = tuple(self._request_prompt(self.candidate, request) for request in case.requests)
        expected = [
            self._expected(prompt, answer, request, logits)
            for prompt, answer, request in zip(reference, case.answers, case.requests, strict=True)
        ]
        outputs = self.candidate.run_forced(candidate, case.answers, route=case.route)
        error = max(relative_error(a, b.logits) for a, b in zip(expected, outputs, strict=True))
        wrong = not error <= limits.relative
        if wrong or (self.inspect == "always" and (case.column == "full" or "tiles" in case.column)):
            self.failing.append(FailingCase(case.name, case.graph, reference, candidate, case.answers, case.route, error))
        return EdgeResult(case.graph, case.column, error, wrong)

    def _expected(
        self, prompt: Prepared, answer: np.ndarray, request: EdgeRequest, logits: dict[tuple, np.ndarray]
    ) -> np.ndarray:
        """The reference's logits, computed once for all cases with the same request."""
        key = request.sample.name, prompt.length, tuple(request.ids[:8].tolist()), tuple(answer.tolist())
        if key not in logits:
            logits[key] = self.reference.run_forced([prompt], [answer])[0].logits
        return logits[key]

    def _request_prompt(self, side: Side, request: EdgeRequest) -> Prepared:
        prompt = self._prepare(side, request.sample)
        if request.length is None:
            return prompt
        if request.sample.images:
            return prompt.with_tokens(max(request.length, prompt.length), request.ids)
        return prompt.with_tokens(1, request.ids).with_tokens(request.length, request.ids)

    # ---- causes

    def _explain(self, result: ComparisonResult) -> None:
        """Judge broken limits of a quantised side by what its own rounding explains."""
        quantised = [side for side in self.sides if side.manifest and side.manifest.quant != "none"]
        if not quantised or not self._weights_compared:
            return
        limit = self.limits[ROUNDED_INPUTS].relative
        errors = [rounding_errors(side, self.failing, reference=side is self.reference) for side in quantised]
        known = [error for each in errors if each is not None for error in each]
        if None in errors and self.inspect == "never":
            return
        worst = max(known, default=0.0)
        if worst <= limit:
            result.rounding = "every weight and operator is what the quantisation says; what is left is its rounding" + (
                f" (the definition over the stored weights differs by {worst:.1e})" if known else ""
            )
        else:
            result.notes.append(
                f"the definition over the stored weights differs by {worst:.1e} of the largest logit (allowed: {limit:.2g})"
            )

    def _localise(self, result: ComparisonResult) -> None:
        localiser = Localiser(self.reference, self.candidate, result.limits)
        failing = [case for case in self.failing if case.error > 0]
        result.findings += localiser.localise(failing, self.stage("locating the fault", len(failing)), result.findings)
        result.layers, result.inspected = localiser.layers, localiser.inspected


def _by_layer(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[float, ...]:
    """Errors of keys and values, by layer that attends to the text."""
    if not a or a.keys() != b.keys():
        return ()
    layers = sorted({int(name.partition(".")[2]) for name in a})
    rows = min(next(iter(a.values())).shape[1], next(iter(b.values())).shape[1])
    return tuple(
        max(relative_error(a[f"{w}_cache.{i}"][:, :rows], b[f"{w}_cache.{i}"][:, :rows]) for w in "kv") for i in layers
    )

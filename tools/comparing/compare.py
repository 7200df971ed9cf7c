"""A whole comparison: settings, weights, samples, edge cases, and the search for causes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec import UNSET

from ...compiler.calibration import METHODS
from ...runtime.engine.fit import ContextError
from ...runtime.processor.images import ImageError
from ...runtime.processor.prompt import PromptError
from ...weights.calibrated_layers import layer_of
from ...weights.head_padding import head_width
from ...weights.storage import stored_targets
from .checkpoint import Checkpoint
from .edges import Edge, EdgeRequest, edges
from .fault_scope import fault_scope
from .findings import Finding
from .hf_side import HfSide
from .inputs import compare_inputs
from .localise import FailingCase, Localiser
from .metrics import compare_logits, exact_match, matched_iou, relative_error, with_texts
from .result import ComparisonResult, EdgeResult, SampleResult, Scores
from .samples import DataError, Sample
from .settings import compare_settings
from .sides import Prepared, Side, SideError, answer_text
from .static_side import StaticSide
from .thresholds import Thresholds, broken, coarser, precision
from .weights import RankWeights, WeightComparison

ProgressStage = Callable[[str, int], Callable[[], object]]  # name and number of steps -> a function to call at each step


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
    _prepared: dict[tuple[int, str], tuple[Sample, Prepared]] = field(default_factory=dict)

    def run(self) -> ComparisonResult:
        """The result; raises DataError, ContextError or PromptError for a sample of a file that cannot be run."""
        if self.reference.info.vocab_size != self.candidate.info.vocab_size:
            raise SideError(
                f"{self.reference.name} has {self.reference.info.vocab_size} tokens and {self.candidate.name} "
                f"{self.candidate.info.vocab_size}; compare two sides of one model"
            )
        kind = coarser(precision(self.reference.manifest), precision(self.candidate.manifest))
        result = ComparisonResult(
            reference=self.reference.name, candidate=self.candidate.name, precision=kind, limits=self.limits[kind]
        )
        result.findings += compare_settings(self.reference.info, self.candidate.info)
        result.findings += self._weights(result)
        self._samples(result)
        if self._has_edges:
            self._edges(result)
        if self.failing and self.inspect != "never":
            self._localise(result)
        manifest = self.candidate.manifest
        ranks, quant = (manifest.tp, manifest.quant) if manifest else (1, "none")
        result.scope = fault_scope(result.edges, result.findings, ranks, quant)
        return result

    @property
    def _has_edges(self) -> bool:
        return self.with_edges and self.candidate.manifest is not None

    # ---- weights

    def _weights(self, result: ComparisonResult) -> list[Finding]:
        weights = self._rank_weights(self.reference), self._rank_weights(self.candidate)
        config = self.candidate.config or self.reference.config
        if config is None or self._same_checkpoint():
            return []
        comparison = WeightComparison(config, *weights, result.limits.weights)
        if not comparison.possible:
            result.notes.append("weights were not compared: both sides are sharded, over different numbers of ranks")
            return []
        names, findings = comparison.names(), comparison.extra()
        if quants := self._calibrated:
            names = [name for name in names if not any(layer_of(name, quant) for quant in quants)]
            result.notes.append("weights of calibrated layers were not compared one by one: scales are folded into them")
        advance = self.stage("comparing weights", len(names))
        for name in names:
            findings += comparison.compare(name)
            advance()
        return findings

    @property
    def _calibrated(self) -> list[str]:
        """The quantisations into which scales of a calibration are folded."""
        manifests = (self.reference.manifest, self.candidate.manifest)
        calibrated = [manifest.quant for manifest in manifests if manifest and manifest.build.calibration is not UNSET]
        return [quant for quant in calibrated if quant in METHODS]

    def _same_checkpoint(self) -> bool:
        """Whether both sides read the weights of the same files."""
        folders = [
            side.checkpoint.folder.resolve() for side in (self.reference, self.candidate)
            if isinstance(side, StaticSide | HfSide) and side.checkpoint
        ]  # fmt: skip
        return len(folders) == 2 and folders[0] == folders[1]

    @staticmethod
    def _rank_weights(side: Side) -> list[RankWeights]:
        if isinstance(side, StaticSide):
            folder, manifest, config = side.artifact.folder, side.artifact.manifest, side.config
            stored = stored_targets(config, manifest.quant, tp=manifest.tp) if config else {}
            shapes = {name: tensor.shape for name, tensor in stored.items()}
            heads = {name: head_width(config, name) for name in stored} if config else {}
            return [RankWeights(folder, weights, manifest.quant, shapes, heads) for weights in side.rank_weights]
        assert isinstance(side, HfSide)
        checkpoint: Checkpoint = side.checkpoint
        return [RankWeights(checkpoint.out, checkpoint.weights)]

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
        for finding in compare_inputs(pair[0].inputs, pair[1].inputs, result.limits.inputs):
            if finding.where not in reported:  # once, with the first sample that shows it
                reported.add(finding.where)
                text = f"{finding.text} (sample {sample.name!r})"
                result.findings.append(dataclasses.replace(finding, text=text))
        answer = self._answer(sample, pair[0])
        outputs = [
            side.run_forced([prompt], [answer], caches=True)[0]
            for side, prompt in zip((self.reference, self.candidate), pair, strict=True)
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

    def _localise(self, result: ComparisonResult) -> None:
        localiser = Localiser(self.reference, self.candidate, result.limits)
        failing = [case for case in self.failing if case.error > 0]
        result.findings += localiser.localise(failing, self.stage("locating the fault", len(failing)))
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

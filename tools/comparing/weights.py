"""The comparison of both sides' stored weights, tensor by tensor, in any dtype, quantisation and number of shards.

Numbers that both sides store in one form must be equal. Quantised ones are judged by what their rounding allows (rounding.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...model_defs.config import QUANTS, ModelConfig
from ...weights.shard import rank_span, shard_axis
from ...weights.shard_span import Span
from .findings import Finding
from .folding import Folding
from .rank_weights import RankWeights, StoredNumbers
from .rounding import difference, rounding_fault
from .thresholds import Thresholds, coarser
from .weight_reasons import TensorPair, moved_rows, not_finite, own_reasons, relative, wrong_rows

__all__ = ["RankWeights", "StoredWeights", "WeightComparison"]

MATCH = 1e-5  # relative error up to which tensors are taken for equal
EQUAL = 1e-6  # relative error of two dequantised tensors of the same stored numbers, scales in float32


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The weights of one side, by rank. `calibration`: a digest of what their rounding was measured with, "" for none.

    `ready_made`: its numbers are those of a checkpoint that was quantised before.
    """

    ranks: list[RankWeights]
    calibration: str = ""
    ready_made: bool = False

    @property
    def quant(self) -> str:
        return self.ranks[0].quant


class WeightComparison:
    """The comparison of a whole reference with the shards of a candidate, or the other way round."""

    def __init__(
        self, config: ModelConfig, reference: StoredWeights, candidate: StoredWeights, limits: Mapping[str, Thresholds]
    ) -> None:
        """One of the two sides has to be whole, unless both are sharded alike. `limits`: by precision."""
        self.config, self.limits = config, limits
        self.sides = reference, candidate
        self.reference, self.candidate = reference.ranks, candidate.ranks
        self.below: dict[str, float] = {}  # tensors that differ by less than their limit, and the error
        self.folding = self._folding()

    @property
    def possible(self) -> bool:
        return len({len(self.reference), len(self.candidate)} - {1}) <= 1 or len(self.reference) == len(self.candidate)

    def names(self) -> list[str]:
        return self.reference[0].names()

    def compare(self, name: str) -> list[Finding]:
        """Findings about one parameter, by rank."""
        if name not in self.candidate[0].names():
            return [Finding(stage="weights", where=name, text=f"{name} is not among the candidate's weights")]
        shapes = [ranks[0].shape(name) for ranks in (self.reference, self.candidate) if name in ranks[0].weights]
        if len(shapes) == 2 and shapes[0] != shapes[1] and len(self.reference) == len(self.candidate):
            text = f"{name} has the shape {list(shapes[1])}; the reference has {list(shapes[0])}"
            return [Finding(stage="weights", where=name, text=text)]
        try:
            return [finding for rank in range(self.rank_count) for finding in self._compare(name, rank)]
        except (ValueError, RuntimeError, IndexError, AssertionError) as error:
            text = f"{name} cannot be compared: {' '.join(str(error).split())[:200]}"
            return [Finding(stage="weights", where=name, text=text)]

    def extra(self) -> list[Finding]:
        """Findings for parameters of the candidate alone."""
        more = set(self.candidate[0].names()) - set(self.names())
        return [
            Finding(stage="weights", where=name, text=f"{name} is among the candidate's weights alone") for name in sorted(more)
        ]

    @property
    def folded_unknown(self) -> str:
        """The quantisation whose folded scales cannot be recovered here; "" for none."""
        reference, candidate = self.sides
        if reference.calibration == candidate.calibration or self.folding:
            return ""
        return candidate.quant if candidate.calibration else reference.quant

    def notes(self) -> list[str]:
        """A sentence about differences below the limits."""
        if not self.below:
            return []
        worst = max(self.below, key=self.below.__getitem__)
        count = f"{len(self.below)} tensors differ" if len(self.below) > 1 else f"{worst} differs"
        most = f", {worst} most" if len(self.below) > 1 else ""
        return [f"{count} by less than the limit{most}, by {self.below[worst]:.1e}"]

    @property
    def rank_count(self) -> int:
        return max(len(self.reference), len(self.candidate))

    # ---- one parameter on one rank

    def _compare(self, name: str, rank: int) -> Iterator[Finding]:
        a, b = self._part(self.reference, name, rank), self._part(self.candidate, name, rank)
        if a.shape != b.shape:
            text = f"{name} has the shape {list(b.shape)}; the reference has {list(a.shape)}"
            yield Finding(stage="weights", where=name, text=text, rank=self._rank(rank))
            return
        for value, other, side in ((b, a, "candidate"), (a, b, "reference")):
            clause = not_finite(value)
            if clause and not torch.equal(torch.isfinite(value), torch.isfinite(other)):
                yield self._fault(name, rank, f"{name} {list(b.shape)} of the {side} {clause}", float("inf"), side)
                return
        if not torch.isfinite(a).all():
            a, b = (torch.where(torch.isfinite(each), each, 0.0) for each in (a, b))
        quantised = [ranks[0].quantised(name) for ranks in (self.reference, self.candidate)]
        if any(quantised) and not self._same_numbers(name):
            yield from self._quantised(name, rank, a, b, quantised)
        else:
            yield from self._equal(name, rank, a, b)

    def _same_numbers(self, name: str) -> bool:
        """Whether both sides should hold the same numbers, quantised alike."""
        (a, b), kinds = self.sides, [ranks[0].kind(name) for ranks in (self.reference, self.candidate)]
        if a.ready_made or b.ready_made:
            return self._is_ready_made(a) and self._is_ready_made(b)
        if kinds[0] != kinds[1] or a.calibration != b.calibration or len(self.reference) != len(self.candidate):
            return False
        forms = {ranks[0].one_scale(name) for ranks in (self.reference, self.candidate) if ranks[0].quantised(name)}
        return len(forms) < 2  # Ascend has other blocks than ONNX

    @staticmethod
    def _is_ready_made(side: StoredWeights) -> bool:
        return side.ready_made or side.quant not in QUANTS

    def _equal(self, name: str, rank: int, a: Tensor, b: Tensor) -> Iterator[Finding]:
        """Both in floating point, or in the same stored numbers."""
        if self.folding and self.folding.calibrated(name):
            clause = self.folding.producer_fault(name, a, b)
            if clause is not None:
                if clause:
                    yield self._fault(name, rank, f"{name} {list(b.shape)} is no multiple by powers of two: {clause}", None)
                return
            a = self.folding.expected(name, a)
        limit = self._limit(name)
        error = relative(a, b)
        if error <= limit:
            if error:
                self.below[name] = max(error, self.below.get(name, 0.0))
            return
        text = f"{name} {list(b.shape)} differs by {error:.2e} of its largest magnitude (allowed: {limit:.0e})"
        if self.candidate[0].quantised(name):
            reason = difference(a, self._numbers(self.candidate, name, rank), limit)
        else:
            reason = self._reason(name, rank, a, b, limit)
        yield self._fault(name, rank, text, error, reason=reason)

    def _limit(self, name: str) -> float:
        """The limit of the coarser of the dtypes that both sides store a parameter in."""
        dtypes = []
        for ranks in (self.reference, self.candidate):
            key = f"{name.removesuffix('.weight')}.scales" if ranks[0].quantised(name) else name
            dtypes.append(ranks[0].dtype(key))
        kind = coarser(*(each if each in self.limits else "float32" for each in dtypes))
        return self.limits[kind].weights

    def _quantised(self, name: str, rank: int, a: Tensor, b: Tensor, quantised: list[bool]) -> Iterator[Finding]:
        """One side in quantised numbers, the other in floating point or in others."""
        if all(quantised):  # each is rounded in its own way
            limit = max(self.limits[coarser(*self._precisions(name))].weights, EQUAL)
            if (error := relative(a, b)) > limit:
                text = f"{name} {list(b.shape)} differs by {error:.2e} of its largest magnitude (allowed: {limit:.0e})"
                yield self._fault(name, rank, text, error, reason=self._reason(name, rank, a, b, limit))
            return
        exact, ranks, side = (a, self.candidate, "candidate") if quantised[1] else (b, self.reference, "reference")
        numbers = self._numbers(ranks, name, rank)
        calibrated = bool(self.folding and self.folding.calibrated(name))
        if calibrated and self.folding:
            exact = self.folding.expected(name, exact)
        nearest = not self._is_ready_made(self.sides[quantised[1]]) and not (calibrated and numbers.bits == 4)
        fault = rounding_fault(exact, numbers, nearest=nearest)
        if fault is None:
            return
        text = f"{name} {list(b.shape)} is off by {fault.steps:.3g} steps of its quantisation"
        near = 0.5 * float(numbers.step.abs().max() / exact.abs().max().clamp_min(1e-30)) + MATCH
        reason = fault.text
        if reason.startswith(tuple("0123456789")):  # only where they lie: perhaps numbers of another place
            reason = next(self._reasons(name, rank, exact, numbers.value, near * 1.2), reason)
        yield self._fault(name, rank, text, relative(exact, numbers.value), side, reason=reason)

    def _precisions(self, name: str) -> list[str]:
        kinds = [ranks[0].kind(name).partition("-")[0].partition("+")[0] for ranks in (self.reference, self.candidate)]
        return [kind if kind in self.limits else "float32" for kind in kinds]

    def _fault(
        self, name: str, rank: int, text: str, error: float | None, side: str = "candidate", *, reason: str = ""
    ) -> Finding:
        weights = self.candidate[0] if side == "candidate" else self.reference[0]
        text += f" on rank {rank}" if self._rank(rank) is not None else ""
        text += f", stored in {weights.bits(name)} bits" if weights.quantised(name) else ""
        where = "image newline" if "image newline" in reason else name
        return Finding(
            stage="weights", where=where, text=text + (f": {reason}" if reason else ""), side=side, error=error,
            rank=self._rank(rank), reason=reason,
        )  # fmt: skip

    def _rank(self, rank: int) -> int | None:
        return rank if self.rank_count > 1 else None

    # ---- reading

    def _folding(self) -> Folding | None:
        """The folded scales of a calibrated candidate; None for another, or one of several ranks."""
        reference, candidate = self.sides
        if not candidate.calibration or reference.calibration or self.rank_count > 1:
            return None

        def read(name: str) -> tuple[Tensor, Tensor]:
            return self._part(self.reference, name, 0), self._part(self.candidate, name, 0)

        return Folding(self.config, candidate.quant, read)

    def _span(self, name: str, shape: tuple[int, ...], rank: int) -> Span | None:
        axis = shard_axis(self.config, name) if self.rank_count > 1 else None
        return None if axis is None else Span(axis, *rank_span(self.config, name, shape, self.rank_count, rank))

    def _part(self, ranks_weights: list[RankWeights], name: str, rank: int) -> Tensor:
        """The shard of a parameter on `rank`, of as many ranks as either side has."""
        weights = ranks_weights[rank if len(ranks_weights) > 1 else 0]
        whole = weights.read(name, self._columns(name, len(ranks_weights)))
        span = self._span(name, tuple(whole.shape), rank) if len(ranks_weights) == 1 else None
        if span is None:
            return whole
        part = span.of(whole)
        missing = -(-whole.shape[span.axis] // self.rank_count) - part.shape[span.axis] if name == "text.lm_head.weight" else 0
        return torch.nn.functional.pad(part, (0, 0, 0, missing)) if missing else part

    def _numbers(self, ranks_weights: list[RankWeights], name: str, rank: int) -> StoredNumbers:
        """The stored numbers of the same shard."""
        weights = ranks_weights[rank if len(ranks_weights) > 1 else 0]
        numbers = weights.numbers(name, self._columns(name, len(ranks_weights)))
        span = self._span(name, tuple(numbers.whole.shape), rank) if len(ranks_weights) == 1 else None
        return numbers if span is None else numbers.part(span)

    def _columns(self, name: str, ranks: int) -> int:
        """Columns of a decoder's or tower's linear layer in each of `ranks` shards, for quantised parameters."""
        text, vision = self.config.text, self.config.vision
        if name.startswith("vision."):
            width = vision.intermediate_size if name.endswith("mlp.down.weight") else vision.hidden_size
        else:
            width = text.intermediate_size if name.endswith("mlp.down.weight") else text.hidden_size
            if name.endswith("attn.o.weight"):
                width = text.heads * text.head_dim
        return width // ranks if shard_axis(self.config, name) == 1 else width

    # ---- explanations

    def _reason(self, name: str, rank: int, a: Tensor, b: Tensor, limit: float) -> str:
        pair = TensorPair(name, a, b, limit + MATCH, self.config)
        return next(self._reasons(name, rank, a, b, limit + MATCH), "") or wrong_rows(pair, limit)

    def _reasons(self, name: str, rank: int, a: Tensor, b: Tensor, near: float) -> Iterator[str]:
        """Clauses that explain the wrong numbers: changed in a known way, moved, or of another tensor."""
        pair = TensorPair(name, a, b, near, self.config)
        yield from own_reasons(pair)
        if a.dim() == 2:
            whole = self.reference[0].read(name, self._columns(name, 1)) if len(self.reference) == 1 else a
            yield from moved_rows(pair, whole, shard_axis(self.config, name) if self.rank_count > 1 else 0)
        for other in self.names():
            if other == name or self.reference[0].shape(other) != self.reference[0].shape(name):
                continue
            value = self._part(self.reference, other, rank)
            if value.shape == b.shape and relative(value, b) <= near:
                yield f"it holds the reference's {other}"


def merged(findings: list[Finding], total: int) -> list[Finding]:
    """Findings about many of `total` tensors with the same reason as one: a rounding, a rotary order, adapters."""
    groups: dict[str, list[Finding]] = {}
    alone = []
    for each in findings:
        if _COMMON.search(each.reason):
            groups.setdefault(each.reason, []).append(each)
        else:
            alone.append(each)
    for reason, group in groups.items():
        alone += group if len(group) < LEAST_ALIKE else [_as_one(reason, group, total)]
    return alone


def _as_one(reason: str, group: list[Finding], total: int) -> Finding:
    names = list(dict.fromkeys(each.where for each in group))
    shown = f"{names[0]} ... {names[-1]}"
    count = "all weights" if len(names) > 0.9 * total else f"{len(names)} of {total} weights ({shown})"
    worst = max((each.error or 0.0) for each in group)
    where = "all weights" if count == "all weights" else shown
    return replace(group[0], where=where, text=f"{count}: {reason}; they differ by up to {worst:.1e}", error=worst)


LEAST_ALIKE = 3
_COMMON = re.compile(r"^rounded to|rotary order|looks like a LoRA|BGR|order of nibbles|^it is [\d.e+-]+ times")

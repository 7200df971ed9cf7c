"""The comparison of both sides' stored weights, tensor by tensor, in any dtype, quantisation and number of shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ...compiler.weight_views import map_parameter
from ...model_defs.config import READY_MADE, ModelConfig, quant_bits
from ...runtime.artifact import WeightSpec
from ...weights.head_pieces import piece_of
from ...weights.merging import members_of
from ...weights.names import is_cache_scale
from ...weights.quantize import RoundingBound, dequantize, rounding_bound
from ...weights.shard import rank_span, shard_axis
from ...weights.shard_span import Span
from ...weights.storage import quant_of
from .findings import Finding

MATCH = 1e-5  # relative error up to which tensors are taken for equal


@dataclass(frozen=True, slots=True)
class RankWeights:
    """One rank's weights in a folder; `quant` as in its manifest. `shapes` has those of the members of merged layers, and
    `heads` the widths of the heads of parameters that may have been filled up."""

    folder: Path
    weights: Mapping[str, WeightSpec]
    quant: str = "none"
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, None]:
        """Names of stored tensors, of merged ones those of their members, of pieces that of the whole."""
        return dict.fromkeys(each for name in self.weights for each in members_of(name) or (piece_of(name)[0] or name,))

    def names(self) -> list[str]:
        """Parameters of the checkpoint, quantised ones by the names that they have in float."""
        parts, stored = (".qweight", ".scales", ".zeros"), self.stored
        floats = [name for name in stored if not name.endswith(parts) and not is_cache_scale(name)]
        return [*floats, *(f"{n.removesuffix('.qweight')}.weight" for n in stored if n.endswith(".qweight"))]

    def quantised(self, name: str) -> bool:
        return name not in self.stored

    def read(self, name: str, columns: int) -> Tensor:
        """A parameter in float32, dequantised; `columns`: without the padding of a last block of quantised weights."""
        if not self.quantised(name):
            return self._map(name).float()
        stem, stored = name.removesuffix(".weight"), self.stored
        names = [part for part in ("qweight", "scales", "zeros") if f"{stem}.{part}" in stored]
        return dequantize(quant_of(name, self.quant), {part: self._map(f"{stem}.{part}") for part in names}, columns)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter as it is stored, without what fills up its heads; of a quantised one, of its numbers."""
        key = f"{name.removesuffix('.weight')}.qweight" if self.quantised(name) else name
        stored = key in self.weights and not self.heads.get(key)
        return tuple(self.weights[key].shape if stored else self.shapes[key])

    def bits(self, name: str) -> int:
        """The bits of a quantised parameter."""
        return quant_bits(quant_of(name, self.quant))

    def rounding(self, name: str) -> RoundingBound:
        """The largest error of a parameter by its quantisation; none of one in floats."""
        if not self.quantised(name):
            return RoundingBound()
        scales = self._map(f"{name.removesuffix('.weight')}.scales").dtype
        return rounding_bound(self.bits(name), scales, ready_made=self.quant in READY_MADE)

    def _map(self, name: str) -> Tensor:
        return map_parameter(self.folder, self.weights, name, self.shapes.get(name, ()), self.heads.get(name, 0))


@dataclass(frozen=True, slots=True)
class _Part:
    """A rank's part of a parameter: its values, and the largest magnitude of each row, broadcasting against them, of what was
    quantised as one."""

    values: Tensor
    largest: Tensor
    rounding: RoundingBound

    @property
    def allowed(self) -> Tensor:
        """The error that rounding may have left."""
        return self.rounding.relative * self.largest + self.rounding.absolute


class WeightComparison:
    """The comparison of a whole reference with the shards of a candidate, or the other way round."""

    def __init__(self, config: ModelConfig, reference: list[RankWeights], candidate: list[RankWeights], limit: float) -> None:
        """Lists are by rank; one of the two has to be whole, unless both are sharded alike."""
        self.config, self.reference, self.candidate, self.limit = config, reference, candidate, limit

    @property
    def possible(self) -> bool:
        return len({len(self.reference), len(self.candidate)} - {1}) <= 1 or len(self.reference) == len(self.candidate)

    def names(self) -> list[str]:
        return self.reference[0].names()

    def compare(self, name: str) -> list[Finding]:
        """Findings about one parameter, by rank."""
        if name not in self.candidate[0].names():
            return [Finding(stage="weights", where=name, text=f"{name} is not among the candidate's weights")]
        findings = []
        for rank in range(max(len(self.reference), len(self.candidate))):
            parts = self._part(self.reference, name, rank), self._part(self.candidate, name, rank)
            a, b = (part.values for part in parts)
            if a.shape != b.shape:
                text = f"{name} has the shape {list(b.shape)}; the reference has {list(a.shape)}"
                findings.append(Finding(stage="weights", where=name, text=text, rank=self._rank(rank)))
            elif not (error := self._worst(name, *parts)) <= self.limit:
                findings.append(self._finding(name, rank, *parts, error))
        return findings

    def _quantised(self, name: str) -> bool:
        return any(side[0].quantised(name) for side in (self.reference, self.candidate))

    def _worst(self, name: str, a: _Part, b: _Part) -> float:
        """The largest error that rounding does not explain: relative to the largest magnitude of the tensor, or where a side is
        quantised, whose rows have scales of their own, of the row."""
        if not self._quantised(name):
            return _error(a.values, b.values)
        return float(_beyond(a, b).max()) if a.values.numel() else 0.0

    def extra(self) -> list[Finding]:
        """Findings for parameters of the candidate alone."""
        more = set(self.candidate[0].names()) - set(self.names())
        return [
            Finding(stage="weights", where=name, text=f"{name} is among the candidate's weights alone") for name in sorted(more)
        ]

    def _rank(self, rank: int) -> int | None:
        return rank if max(len(self.reference), len(self.candidate)) > 1 else None

    def _finding(self, name: str, rank: int, a: _Part, b: _Part, error: float) -> Finding:
        reason, shape = next(self._reasons(name, rank, a, b), ""), tuple(b.values.shape)
        measure = "a row's largest magnitude more than rounding explains" if self._quantised(name) else "its largest magnitude"
        text = f"{name} {list(shape)} differs by {error:.2e} of {measure} (allowed: {self.limit:.0e})"
        weights = self.candidate[0]
        text += f" on rank {rank}" if self._rank(rank) is not None else ""
        text += f", stored in {weights.bits(name)} bits" if weights.quantised(name) else ""
        return Finding(
            stage="weights", where=name, text=text + (f": {reason}" if reason else ""), error=error, shape=shape,
            rank=self._rank(rank),
        )  # fmt: skip

    def _part(self, ranks_weights: list[RankWeights], name: str, rank: int) -> _Part:
        """The shard of a parameter on `rank`, of as many ranks as either side has."""
        ranks = max(len(self.reference), len(self.candidate))
        weights = ranks_weights[rank if len(ranks_weights) > 1 else 0]
        axis = shard_axis(self.config, name) if ranks > 1 else None
        columns = self._columns(name, len(ranks_weights))
        whole, rounding = weights.read(name, columns), weights.rounding(name)
        largest = _largest(whole)
        if len(ranks_weights) > 1 or axis is None:
            return _Part(whole, largest, rounding)
        first, stop = rank_span(self.config, name, tuple(whole.shape), ranks, rank)
        span = Span(axis, first, stop)
        part, rows = span.of(whole), span.of(largest) if axis == 0 else largest
        missing = -(-whole.shape[axis] // ranks) - part.shape[axis] if name == "text.lm_head.weight" else 0
        if missing:
            part, rows = (torch.nn.functional.pad(each, (0, 0, 0, missing)) for each in (part, rows))
        return _Part(part, rows, rounding)

    def _columns(self, name: str, ranks: int) -> int:
        """Columns of a decoder's linear layer in each of `ranks` shards, for quantised parameters."""
        text = self.config.text
        width = text.intermediate_size if name.endswith("mlp.down.weight") else text.hidden_size
        if name.endswith("attn.o.weight"):
            width = text.heads * text.head_dim
        return width // ranks if shard_axis(self.config, name) == 1 else width

    def _reasons(self, name: str, rank: int, reference: _Part, candidate: _Part) -> Iterator[str]:
        """Clauses that explain the wrong numbers: scaled, of another tensor, moved, or only some rows."""
        a, b = reference.values, candidate.values
        near = self.limit + reference.rounding.relative + candidate.rounding.relative + MATCH
        factor = float((a * b).sum() / a.square().sum().clamp_min(1e-30))
        scaled = replace(reference, values=a * factor, largest=reference.largest * abs(factor))
        if abs(factor) > 1e-3 and self._worst(name, scaled, candidate) <= self.limit + MATCH:
            yield f"it is {factor:.4g} times the reference's"
        if a.dim() == 2:
            yield from self._moved(name, rank, a, b, near)
        for other in self.names():
            if other == name or self._part_shape(other) != self._part_shape(name):
                continue
            value = self._part(self.reference, other, rank).values
            if value.shape == b.shape and _error(value, b) <= near:
                yield f"it holds the reference's {other}"
        rows = (a - b).abs().flatten(1).amax(1) if a.dim() > 1 else (a - b).abs()
        rows = _beyond(reference, candidate).amax(1) if self._quantised(name) else rows / a.abs().max()
        wrong = torch.nonzero(rows > self.limit).flatten()
        if len(wrong) < len(rows):
            yield f"only {len(wrong)} of {len(rows)} rows, from row {int(wrong[0])} on"

    def _part_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter as the first rank of the reference stores it."""
        return self.reference[0].shape(name)

    def _moved(self, name: str, rank: int, a: Tensor, b: Tensor, near: float) -> Iterator[str]:
        """Clauses for rows or columns that are in the wrong place of the same tensor."""
        whole = self.reference[0].read(name, self._columns(name, len(self.reference))) if len(self.reference) == 1 else a
        axis = shard_axis(self.config, name) if max(len(self.reference), len(self.candidate)) > 1 else 0
        for direction, noun in ((0, "rows"), (1, "columns")):
            if axis is not None and axis != direction and whole.shape != b.shape:
                continue
            source, actual, expected = (each if direction == 0 else each.T for each in (whole, b, a))
            if source.shape[1] != actual.shape[1]:
                continue
            middle = len(actual) // 2
            actual_row, expected_row = _row_at(source, actual[middle], near), _row_at(source, expected[middle], near)
            if actual_row is None or expected_row is None or actual_row == expected_row:
                continue
            moved = torch.roll(source, expected_row - actual_row, 0)[expected_row - middle :][: len(actual)]
            distance = abs(actual_row - expected_row)
            inside = slice(distance, len(actual) - distance)
            if moved.shape == actual.shape and _error(moved[inside], actual[inside]) <= near:
                yield f"its {noun} lie {distance} too {'early' if actual_row > expected_row else 'late'}"


def _row_at(source: Tensor, row: Tensor, near: float) -> int | None:
    distance = (source - row).abs().amax(1)
    at = int(distance.argmin())
    return at if float(distance[at]) <= near * float(source.abs().max()) and float(row.abs().max()) > 0 else None


def _largest(whole: Tensor) -> Tensor:
    """The largest magnitude of each row of a matrix, [N, 1]; of other tensors, each number's own: they are not quantised."""
    return whole.abs().amax(1, keepdim=True) if whole.dim() == 2 else whole.abs()


def _beyond(a: _Part, b: _Part) -> Tensor:
    """The errors [N, K] that rounding does not explain, relative to the largest magnitude of the row; infinite where a value is
    not finite."""
    error = (a.values - b.values).abs() - a.allowed - b.allowed
    error = error.clamp_min(0) / torch.maximum(a.largest, b.largest).clamp_min(1e-30)
    return torch.where(torch.isfinite(b.values), error, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _error(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    if not torch.isfinite(b).all():
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))

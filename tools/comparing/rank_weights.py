"""The stored weights of one rank of a side: parameters as float32, and quantised ones as the numbers that they are stored in.

N rows (output features), K columns (input features).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ...compiler.weight_views import map_parameter
from ...model_defs.config import quant_bits
from ...runtime.artifact import WeightSpec
from ...weights.head_pieces import piece_name, piece_of
from ...weights.merging import members_of, merged_name
from ...weights.names import is_cache_scale
from ...weights.quantize import dequantize
from ...weights.shard_span import Span
from ...weights.storage import quant_of

ENDS = {4: (-8, 7), 8: (-127, 127)}  # the smallest and the largest number of each width, around 0
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}  # relative, of one number


@dataclass(frozen=True, slots=True, eq=False)
class StoredNumbers:
    """A quantised weight [N, K] number by number: `whole` times `step`, both float32 [N, K].

    `whole`: the stored integers less their zero points. `block`: numbers of a row that share a step; 0: not known.
    `rounding`: the relative error with which steps are stored.
    """

    whole: Tensor
    step: Tensor
    block: int
    bits: int
    rounding: float

    @property
    def value(self) -> Tensor:
        return self.whole * self.step

    def rows(self, rows: slice) -> StoredNumbers:
        """Some rows, as a view."""
        return replace(self, whole=self.whole[rows], step=self.step[rows])

    def part(self, span: Span) -> StoredNumbers:
        """Some rows or columns."""
        whole, step = span.of(self.whole), span.of(self.step)
        return replace(self, whole=whole, step=step, block=self.block if whole.shape[1] == self.whole.shape[1] else 0)


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

    def kind(self, name: str) -> str:
        """The quantisation of a parameter; "none" for one in floating point."""
        return quant_of(name, self.quant) if self.quantised(name) else "none"

    def dtype(self, name: str) -> str:
        """The dtype in which a parameter in floating point, or a stored part, is stored."""
        key = next(each for each in (name, merged_name(name), piece_name(name, 0)) if each in self.weights)
        return self.weights[key].dtype

    def read(self, name: str, columns: int) -> Tensor:
        """A parameter in float32, dequantised; `columns`: without the padding of a last block of quantised weights."""
        if not self.quantised(name):
            return self._map(name).float()
        return dequantize(self.kind(name), self._parts(name), columns)

    def numbers(self, name: str, columns: int) -> StoredNumbers:
        """The stored numbers of a quantised parameter."""
        kind, parts = self.kind(name), self._parts(name)
        scales = parts["scales"]
        rounding = ROUNDING.get(str(scales.dtype).removeprefix("torch."), 1e-7)
        whole = dequantize(kind, {**parts, "scales": torch.ones_like(scales)}, columns)
        steps = scales.float()
        if kind.partition("+")[0] == "w8a8":
            return StoredNumbers(whole, steps[:, None].expand(-1, columns), columns, 8, rounding)
        block = parts["qweight"].shape[2] * 8 // quant_bits(kind)
        step = steps.repeat_interleave(block, dim=1)[:, :columns]
        return StoredNumbers(whole, step, block, quant_bits(kind), rounding)

    def _parts(self, name: str) -> dict[str, Tensor]:
        stem, stored = name.removesuffix(".weight"), self.stored
        names = [part for part in ("qweight", "scales", "zeros") if f"{stem}.{part}" in stored]
        return {part: self._map(f"{stem}.{part}") for part in names}

    def one_scale(self, name: str) -> bool:
        """Whether a quantised parameter is stored with one scale for each row, as artifacts for Ascend have it in 8 bits."""
        scales = f"{name.removesuffix('.weight')}.scales"
        key = next(each for each in (scales, merged_name(scales), piece_name(scales, 0)) if each in self.weights)
        return len(shape := self.weights[key].shape) == 1 or shape[-1] == 1

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter as it is stored, without what fills up its heads; of a quantised one, of its numbers."""
        key = f"{name.removesuffix('.weight')}.qweight" if self.quantised(name) else name
        stored = key in self.weights and not self.heads.get(key)
        return tuple(self.weights[key].shape if stored else self.shapes[key])

    def bits(self, name: str) -> int:
        """The bits of a quantised parameter."""
        return quant_bits(quant_of(name, self.quant))

    def _map(self, name: str) -> Tensor:
        return map_parameter(self.folder, self.weights, name, self.shapes.get(name, ()), self.heads.get(name, 0))

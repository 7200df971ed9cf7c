"""A quantised checkpoint as a source of plain weights: packed tensors are listed and read dequantised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...model_defs.config import ModelConfig
from ..names.rule import Shape
from ..shard_span import Rows, Span
from ..source import Source
from ..storage import quant_of
from ..tensors import FLOATS, SourceTensor, WeightsError
from ..weight_map import WeightMap, published_names
from .layouts import PackedWeight, unpack
from .repack import repack
from .settings import Packing

_PARTS = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
}
_DTYPES = {
    "scales": FLOATS, "weight_scale": FLOATS, "weight": ("int8",), "weight_zero_point": ("int32", "int8"),
    "g_idx": ("int32", "int64"), "weight_g_idx": ("int32", "int64"),
}  # fmt: skip
_WORDS = ("int32",)  # everything else


@dataclass(frozen=True, slots=True)
class _Module:
    """One quantised layer: the tensors that it is made of, by their last name, and the weight's shape."""

    name: str
    parts: dict[str, SourceTensor]
    shape: Shape


class PackedSource(Source):
    """A checkpoint with packed weights; `read` gives them dequantised, in float32."""

    def __init__(self, base: Source, packing: Packing, modules: Mapping[str, _Module], tensors: Mapping[str, SourceTensor]):
        """`modules`: name of a weight -> its packed tensors; `tensors`: the checkpoint's, with weights for packed tensors."""
        super().__init__(tensors, base.files)
        self.packing = packing
        self._base, self._modules = base, dict(modules)

    def packed(self, name: str) -> bool:
        """Whether a weight is quantised."""
        return name in self._modules

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """As Source.read; a packed weight is read whole, whatever the `rows`."""
        if name not in self._modules:
            return self._base.read(name, rows)
        packed = self.unpack(name)
        return (packed.rows(*rows) if rows else packed).dequantised(self.packing.bits)

    def unpack(self, name: str) -> PackedWeight:
        """A packed weight's numbers. Raises WeightsError where they contradict the settings or are not finite."""
        module = self._modules[name]
        file = next(iter(module.parts.values())).file
        try:
            packed = unpack(self.packing, module.parts, lambda part: self._part(module, part), module.shape[1])
        except WeightsError as error:
            raise WeightsError(f"{file}: {module.name} {error}; fetch the checkpoint again") from error
        if not bool(packed.scales.isfinite().all()):
            raise WeightsError(f"{file}: {module.name} has scales that are not finite; fetch the file again")
        if int(packed.groups.max()) >= packed.scales.shape[1]:
            raise WeightsError(f"{file}: {module.name} has columns of groups without a scale; fetch the checkpoint again")
        return packed

    def repack(self, name: str, kind: str, rows: Rows | None = None, span: Span | None = None) -> dict[str, Tensor]:
        """The stored parts of a packed weight, of its `rows` alone, or of the shard `span` of these.

        Raises WeightsError as `unpack`, and where columns are in another order than that of groups.
        """
        packed = self.unpack(name)
        if rows:
            packed = packed.rows(*rows)
        if span:
            packed = (packed.columns if span.axis else packed.rows)(span.first, span.stop)
        try:
            return repack(packed, kind)
        except WeightsError as error:
            raise WeightsError(f"{self.tensors[name].file}: {name} {error}") from error

    def _part(self, module: _Module, part: str) -> Tensor:
        return self._base.read_any(module.parts[part].name)


def open_packed(source: Source, packing: Packing, config: ModelConfig) -> PackedSource:
    """`source`, a checkpoint of `config` whose layers are packed as `packing` says.

    Raises WeightsError where there is no packed layer, and where parts of one are missing or of another shape or dtype.
    """
    stems = _stems(source, packing)
    if not stems:
        raise WeightsError(
            f"the checkpoint's settings say that it is quantised ({packing.method}), but it holds no such tensors; check that "
            "they belong to these weights"
        )
    names = ("weight", *_PARTS[packing.method])
    used: set[str] = set()
    modules: dict[str, _Module] = {}
    for stem in stems:
        parts = {part: source.tensors[f"{stem}.{part}"] for part in names if f"{stem}.{part}" in source.tensors}
        modules[f"{stem}.weight"] = _Module(stem, parts, _shape(source, packing, stem, parts))
        used |= {tensor.name for tensor in parts.values()}
    used |= set(_needless_biases(source, stems, published_names(config)))
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in used}
    for name, module in modules.items():
        like = next(iter(module.parts.values()))
        tensors[name] = replace(like, name=name, dtype="float32", shape=module.shape, stride=(module.shape[1], 1))
    return PackedSource(source, packing, modules, tensors)


def check_layers(weight_map: WeightMap, source: PackedSource, quant: str) -> None:
    """Raise WeightsError unless all layers that an artifact of `quant` stores quantised are packed, and the first of them as it
    can be stored."""
    recipes = {name: recipe for name, recipe in weight_map.recipes.items() if quant_of(name, quant) != "none"}
    floats = [tensor.name for recipe in recipes.values() for tensor in recipe.tensors if not source.packed(tensor.name)]
    if floats:
        raise WeightsError(
            f"the checkpoint has quantised some layers of its decoder and not others ({floats[0]}, {len(floats)} in all), but "
            "an artifact has one form for all; compile with --quant none, which stores all of them in floating point"
        )
    name, recipe = next(iter(recipes.items()))
    source.repack(recipe.tensors[0].name, quant_of(name, quant))


def _stems(source: Source, packing: Packing) -> list[str]:
    """Names of quantised layers."""
    if packing.method != "compressed-tensors":
        return [name.removesuffix(".qweight") for name in source.tensors if name.endswith(".qweight")]
    packed = [name.removesuffix("_packed") for name in source.tensors if name.endswith(".weight_packed")]
    whole = [name for name, tensor in source.tensors.items() if name.endswith(".weight") and tensor.dtype == "int8"]
    return [name.removesuffix(".weight") for name in (*packed, *whole)]


def _shape(source: Source, packing: Packing, stem: str, parts: Mapping[str, SourceTensor]) -> Shape:
    """The weight's shape, by which those of its parts are checked."""
    per_word = 32 // packing.bits
    if "weight" in parts:
        shape = parts["weight"].shape
    elif "weight_packed" in parts:
        if "weight_shape" not in parts:
            raise WeightsError(f"{stem} lacks weight_shape; fetch the checkpoint again")
        shape = tuple(source.read_any(parts["weight_shape"].name).tolist())
    elif packing.method == "gptq":
        shape = parts["qweight"].shape[1], parts["qweight"].shape[0] * per_word
    else:
        shape = parts["qweight"].shape[1] * per_word, parts["qweight"].shape[0]
    for part, expected in _expected(packing, parts, shape).items():
        if part not in parts:
            raise WeightsError(f"{stem} lacks {part}; fetch the checkpoint again")
        tensor = parts[part]
        dtypes = _DTYPES.get(part, _WORDS)
        if tensor.shape != expected or tensor.dtype not in dtypes:
            raise WeightsError(
                f"{tensor.file}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected {' or '.join(dtypes)} "
                f"{list(expected)} for {packing.bits} bits and groups of {packing.group or 'a whole row'}; check that the "
                "settings belong to these weights"
            )
    return shape


def _expected(packing: Packing, parts: Mapping[str, SourceTensor], shape: Shape) -> dict[str, Shape]:
    """The shapes of a module's parts, of those that may be missing only if they are there."""
    n, k = shape
    per_word = 32 // packing.bits
    groups = math.ceil(k / packing.group) if packing.group else 1
    if packing.method == "compressed-tensors":
        expected: dict[str, Shape] = {"weight_scale": (n, groups)}
        if "weight" not in parts:
            expected["weight_packed"] = n, math.ceil(k / per_word)
        if not packing.symmetric or "weight_zero_point" in parts:
            whole = "weight_zero_point" in parts and parts["weight_zero_point"].dtype == "int8"
            expected["weight_zero_point"] = n if whole else math.ceil(n / per_word), groups
        return expected | ({"weight_g_idx": (k,)} if "weight_g_idx" in parts else {})
    words = (k // per_word, n) if packing.method == "gptq" else (k, n // per_word)
    expected = {"qweight": words, "qzeros": (groups, math.ceil(n / per_word)), "scales": (groups, n)}
    return expected | ({"g_idx": (k,)} if "g_idx" in parts else {})


def _needless_biases(source: Source, stems: list[str], published: Mapping[str, str]) -> list[str]:
    """Biases of zeros, which AutoGPTQ wrote for layers that have none."""
    names = [f"{stem}.bias" for stem in stems if f"{stem}.bias" in source.tensors and f"{stem}.bias" not in published]
    return [name for name in names if not torch.count_nonzero(source.read(name))]

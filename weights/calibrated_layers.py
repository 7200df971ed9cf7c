"""Layers quantised by the statistics of a calibration, kept on disk until the weight files are written.

There is one file for each layer with the shards of every rank. An interrupted calibration continues after the last file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from ..model_defs.config import ModelConfig, TextConfig, tower_quant
from ..runtime.artifact import WEIGHTS
from ..runtime.files import write_atomically
from .gptq import gptq_w4
from .input_statistics import InputStatistics
from .quantize import quantize
from .shard import rank_span, shard_axis
from .shard_span import Span
from .smoothing import Fold, best_scales
from .storage import quant_of
from .weight_map import targets

_LAYER = re.compile(r"((?:text\.|vision\.|vision\.global_)layers\.\d+)\.")
Layer = dict[str, Tensor]  # parameters of one layer by their names in it, e.g. attn.q.weight


@dataclass(frozen=True, slots=True)
class CalibratedLayers:
    """The finished layers of a build; `key` is a digest of everything that they are made from."""

    out: Path
    key: str

    @property
    def folder(self) -> Path:
        return self.out / WEIGHTS / f"{self.key}.calibrated"

    def has(self, layer: str) -> bool:
        return self._path(layer).is_file()

    def write(self, layer: str, ranks: Sequence[Layer]) -> None:
        """Keep the stored tensors of `layer` (e.g. text.layers.0), one mapping for each rank."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Copies: a parameter that is not sharded is one tensor under several names, which the format refuses.
        tensors = {
            f"{rank}/{name}": value.clone(memory_format=torch.contiguous_format)
            for rank, shard in enumerate(ranks)
            for name, value in shard.items()
        }
        write_atomically(self._path(layer), safetensors.torch.save(tensors))

    def parameter(self, name: str, rank: int) -> Layer:
        """A rank's stored tensors of a parameter: itself, or its quantised parts; {} if it is in no calibrated layer."""
        match = _LAYER.match(name)
        stem = match[1] if match else ""
        if not stem or not self.has(stem):
            return {}
        parts = [name, *(name.removesuffix("weight") + part for part in ("qweight", "scales"))]
        with safe_open(self._path(stem), "pt") as file:
            stored_keys = set(file.keys())
            keys = {part: f"{rank}/{part.removeprefix(f'{stem}.')}" for part in parts}
            return {part: file.get_tensor(key) for part, key in keys.items() if key in stored_keys}

    def _path(self, layer: str) -> Path:
        return self.folder / f"{layer}.safetensors"


def layer_of(name: str, quant: str) -> str:
    """The layer of a parameter that calibration changes, e.g. text.layers.0; "" for all others."""
    match = _LAYER.match(name)
    return match[1] if match and (name.startswith("text.") or tower_quant(quant) != "none") else ""


def decoder_folds(text: TextConfig, layer: int) -> dict[str, Fold]:
    """The folds of one decoder layer, by the linear layer whose inputs are divided."""
    attends_to_images = layer in text.cross_layers
    qkv = ("attn.q.weight",) if attends_to_images else ("attn.q.weight", "attn.k.weight", "attn.v.weight")
    folds = {
        "attn.q": Fold(("attn_norm.weight",), qkv),
        "mlp.gate": Fold(("mlp_norm.weight",), ("mlp.gate.weight", "mlp.up.weight")),
        "mlp.down": Fold(("mlp.up.weight",), ("mlp.down.weight",)),
    }
    if not attends_to_images:  # the values of images are made in the vision graph
        shared = {"repeats": text.heads // text.kv_heads, "run": text.head_dim}
        folds["attn.o"] = Fold(("attn.v.weight", "attn.v.bias", "attn.v_scale"), ("attn.o.weight",), **shared)
    return folds


def tower_folds() -> dict[str, Fold]:
    """The folds of one layer of a vision tower; none before `down`, since scales do not pass its activation."""
    qkv = ("attn.q.weight", "attn.k.weight", "attn.v.weight")
    return {
        "attn.q": Fold(("attn_norm.weight", "attn_norm.bias"), qkv),
        "attn.o": Fold(("attn.v.weight", "attn.v.bias"), ("attn.o.weight",)),
        "mlp.up": Fold(("mlp_norm.weight", "mlp_norm.bias"), ("mlp.up.weight",)),
    }


# linear layer -> the linear layer that has the same inputs
SAME_INPUTS = {"attn.k": "attn.q", "attn.v": "attn.q", "mlp.up": "mlp.gate"}


def smoothed(
    layer: Layer, inputs: Mapping[str, InputStatistics], folds: Mapping[str, Fold], quant: str
) -> tuple[Layer, dict[str, InputStatistics]]:
    """A layer in float32 and the statistics of its inputs, both with the best scales folded in."""
    inputs = dict(inputs)
    for name, fold in folds.items():
        scales = best_scales(fold, layer, inputs[name], quant)
        layer, inputs[name] = fold.apply(layer, scales), inputs[name].divided(fold.spread(scales))
    return layer, inputs


def stored_by_ranks(
    config: ModelConfig, stem: str, layer: Layer, inputs: Mapping[str, InputStatistics], quant: str, tp: int
) -> list[Layer]:
    """Every rank's stored tensors of the layer `stem` (e.g. text.layers.0): shards in the form that `quant` gives them."""
    ranks: list[Layer] = [{} for _ in range(tp)]
    shapes = targets(config)
    for name, tensor in layer.items():
        whole = f"{stem}.{name}"
        axis = shard_axis(config, whole)
        spans = [rank_span(config, whole, shapes[whole], tp, rank) for rank in range(tp)] if axis is not None else []
        kind, linear = quant_of(whole, quant), name.removesuffix(".weight")
        if kind.startswith("w4a16"):
            moment = inputs[SAME_INPUTS.get(linear, linear)].moment
            assert moment is not None
            stored = [
                {"qweight": q, "scales": scales} for q, scales in gptq_w4(tensor, moment, spans if axis == 1 else None, kind)
            ]
            if axis == 0:
                stored = [{key: value[first:stop] for key, value in stored[0].items()} for first, stop in spans]
        else:
            shards = [Span(axis, *span).of(tensor) for span in spans] if axis is not None else [tensor] * tp
            stored = [{name: shard} for shard in shards] if kind == "none" else [quantize(kind, shard) for shard in shards]
        for rank, parts in enumerate(stored):
            ranks[rank] |= {key if kind == "none" else f"{linear}.{key}": value for key, value in parts.items()}
    return ranks

"""Layers quantised by what a calibration knows of their inputs, kept on disk until the weight files are written.

One file for each layer, with what every rank stores of it: a conversion that was broken off goes on behind the last.
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
from .input_statistics import Inputs
from .quantize import quantize
from .shard import rank_span, shard_axis
from .shard_span import Span
from .smoothing import Fold, best_scales
from .storage import quant_of
from .weight_map import targets

_LAYER = re.compile(r"((?:text\.|vision\.|vision\.global_)layers\.\d+)\.")
Layer = dict[str, Tensor]  # parameters of one layer by their names in it, e.g. attn.q.weight


@dataclass(frozen=True, slots=True)
class Store:
    """Finished layers; `key` names everything that they are made from, as the prefix of weight files does."""

    out: Path
    key: str

    @property
    def folder(self) -> Path:
        return self.out / WEIGHTS / f"{self.key}.calibrated"

    def has(self, layer: str) -> bool:
        return self._path(layer).is_file()

    def write(self, layer: str, ranks: Sequence[Layer]) -> None:
        """Of every rank, what it stores of `layer` (e.g. text.layers.0)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Copies, since the format refuses what is whole on every rank and so one tensor under several names.
        tensors = {
            f"{rank}/{name}": value.clone(memory_format=torch.contiguous_format)
            for rank, parts in enumerate(ranks)
            for name, value in parts.items()
        }
        write_atomically(self._path(layer), safetensors.torch.save(tensors))

    def parameter(self, name: str, rank: int) -> Layer:
        """What a rank stores of a parameter: itself, or its quantised parts; nothing if no calibrated layer has it."""
        found = _LAYER.match(name)
        stem = found[1] if found else ""
        if not stem or not self.has(stem):
            return {}
        wanted = [name, *(name.removesuffix("weight") + part for part in ("qweight", "scales"))]
        with safe_open(self._path(stem), "pt") as file:
            there = set(file.keys())
            keys = {part: f"{rank}/{part.removeprefix(f'{stem}.')}" for part in wanted}
            return {part: file.get_tensor(key) for part, key in keys.items() if key in there}

    def _path(self, layer: str) -> Path:
        return self.folder / f"{layer}.safetensors"


def layer_of(name: str, quant: str) -> str:
    """The layer of a parameter that calibration changes, e.g. text.layers.0; "" for all others."""
    found = _LAYER.match(name)
    return found[1] if found and (name.startswith("text.") or tower_quant(quant) != "none") else ""


def decoder_folds(text: TextConfig, layer: int) -> dict[str, Fold]:
    """Where a decoder's layer takes scales, by the linear layer whose inputs are divided."""
    attends_to_images = layer in text.cross_layers
    qkv = ("attn.q.weight",) if attends_to_images else ("attn.q.weight", "attn.k.weight", "attn.v.weight")
    found = {
        "attn.q": Fold(("attn_norm.weight",), qkv),
        "mlp.gate": Fold(("mlp_norm.weight",), ("mlp.gate.weight", "mlp.up.weight")),
        "mlp.down": Fold(("mlp.up.weight",), ("mlp.down.weight",)),
    }
    if not attends_to_images:  # there the values are made in the vision graph
        shared = {"repeats": text.heads // text.kv_heads, "run": text.head_dim}
        found["attn.o"] = Fold(("attn.v.weight", "attn.v.bias", "attn.v_scale"), ("attn.o.weight",), **shared)
    return found


def tower_folds() -> dict[str, Fold]:
    """The same of a vision tower's layer; what goes into `down` has passed an activation, which knows no scales."""
    qkv = ("attn.q.weight", "attn.k.weight", "attn.v.weight")
    return {
        "attn.q": Fold(("attn_norm.weight", "attn_norm.bias"), qkv),
        "attn.o": Fold(("attn.v.weight", "attn.v.bias"), ("attn.o.weight",)),
        "mlp.up": Fold(("mlp_norm.weight", "mlp_norm.bias"), ("mlp.up.weight",)),
    }


# linear layer -> the one whose inputs it shares
SAME_INPUTS = {"attn.k": "attn.q", "attn.v": "attn.q", "mlp.up": "mlp.gate"}


def smoothed(
    layer: Layer, inputs: Mapping[str, Inputs], places: Mapping[str, Fold], quant: str
) -> tuple[Layer, dict[str, Inputs]]:
    """A layer in float32 and its inputs, with the best scales folded in."""
    inputs = dict(inputs)
    for name, fold in places.items():
        scales = best_scales(fold, layer, inputs[name], quant)
        layer, inputs[name] = fold.apply(layer, scales), inputs[name].divided(fold.spread(scales))
    return layer, inputs


def stored_by_ranks(
    config: ModelConfig, stem: str, layer: Layer, inputs: Mapping[str, Inputs], quant: str, tp: int
) -> list[Layer]:
    """What every rank stores of the layer `stem` (e.g. text.layers.0): each of its parameters as it is stored."""
    ranks: list[Layer] = [{} for _ in range(tp)]
    shapes = targets(config)
    for name, tensor in layer.items():
        whole = f"{stem}.{name}"
        axis = shard_axis(config, whole)
        cuts = [rank_span(config, whole, shapes[whole], tp, rank) for rank in range(tp)] if axis is not None else []
        kind, linear = quant_of(whole, quant), name.removesuffix(".weight")
        if kind.startswith("w4a16"):
            known = inputs[SAME_INPUTS.get(linear, linear)].moment
            assert known is not None
            parts = [
                {"qweight": q, "scales": scales} for q, scales in gptq_w4(tensor, known, cuts if axis == 1 else None, kind)
            ]
            if axis == 0:
                parts = [{key: value[first:stop] for key, value in parts[0].items()} for first, stop in cuts]
        else:
            cut = [Span(axis, *cut).of(tensor) for cut in cuts] if axis is not None else [tensor] * tp
            parts = [{name: each} for each in cut] if kind == "none" else [quantize(kind, each) for each in cut]
        for rank, part in enumerate(parts):
            ranks[rank] |= {key if kind == "none" else f"{linear}.{key}": value for key, value in part.items()}
    return ranks

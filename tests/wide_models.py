"""Tiny models of every family whose sizes divide among 8 ranks, and random checkpoints of them, without tokenizers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from staticvl.model_defs.config import ClipConfig, ModelConfig, ResampledConfig, TiledConfig, read_config
from staticvl.tools.development.random_checkpoint import random_tensor
from staticvl.weights.shard import rank_span, shard_axis
from staticvl.weights.tensors import StoredTensor
from staticvl.weights.weight_map import source_names
from staticvl.weights.writer import lay_out, write_weight_file

from .conftest import EMBEDDED
from .tiny_families import GOLDEN_QWEN

CONFIGS = {
    "llava": EMBEDDED,
    "llava_next": EMBEDDED.with_name("tiny_llava16"),
    "mllama": EMBEDDED.with_name("tiny_mllama"),
    "qwen_vl": GOLDEN_QWEN,
}
SCALE = 0.15  # larger than in real models of this width, so that an error shows


def wide_config(family: str, kv_heads: int = 8) -> ModelConfig:
    """8 heads of 8 features everywhere; shares of 8 ranks are odd numbers where they can be."""
    config = read_config(CONFIGS[family])
    cross = (1, 3) if config.text.cross_layers else ()
    assert kv_heads == 8 or not config.text.qkv_bias, "Qwen has as many key-value heads as heads"
    text = replace(
        config.text,
        hidden_size=64,
        layers=2 + len(cross),
        cross_layers=cross,
        heads=8,
        kv_heads=kv_heads,
        head_dim=8,
        intermediate_size=104,
        vocab_size=83,  # divides among no ranks
        embed_rows=96,
    )
    return replace(config, text=text, vision=_wide(config.vision))


def _wide(vision: ClipConfig | TiledConfig | ResampledConfig) -> ClipConfig | TiledConfig | ResampledConfig:
    match vision:
        case ClipConfig():
            sizes = {"layers": 3, "used_layers": 2, "image_size": 28, "patch_size": 7}
        case TiledConfig():
            sizes = {"layers": 3, "global_layers": 2, "taps": (0, 2), "image_size": 28, "patch_size": 14}
        case _:
            sizes = {"layers": 2, "output_size": 64, "resampler_head_dim": 8, "queries": 4, "image_size": 28, "patch_size": 7}
    return replace(vision, hidden_size=40, heads=8, intermediate_size=56, **sizes)


def write_random(config: ModelConfig, folder: Path, seed: int = 0) -> Path:
    """model.safetensors with every tensor of a checkpoint of `config`, float32; biases are random too."""
    tensors = {name: StoredTensor("float32", shape) for name, shape in source_names(config).items()}
    draw = partial(random_tensor, seed=seed, scale=SCALE)
    write_weight_file(folder, lay_out("model.safetensors", tensors), lambda name: draw(name, tensors[name]))
    return folder


def part(config: ModelConfig, name: str, whole: Tensor, tp: int, rank: int) -> Tensor:
    """What a rank holds of one parameter; rows of lm_head that stand for no token are zeros."""
    axis = shard_axis(config, name)
    if axis is None:
        return whole
    first, stop = rank_span(config, name, tuple(whole.shape), tp, rank)
    held = whole.narrow(axis, first, stop - first)
    missing = -(-whole.shape[0] // tp) - len(held) if name == "text.lm_head.weight" else 0
    return torch.cat((held, held.new_zeros(missing, *held.shape[1:]))) if missing else held

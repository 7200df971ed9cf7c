"""A CLIP vision tower. Part: vision."""

from __future__ import annotations

from collections.abc import Iterator

from ...model_defs.config import ClipConfig
from .rule import Rule, left_out, plain, with_bias


def clip(vision: ClipConfig) -> Iterator[Rule]:
    """The layers after the selected one, and the norm after the last, are ignored."""
    width, side = vision.hidden_size, vision.patch_size
    yield plain("vision.class_embedding", "vision", "embeddings.class_embedding", width)
    yield plain("vision.patch.weight", "vision", "embeddings.patch_embedding.weight", width, 3, side, side)
    yield plain("vision.positions.weight", "vision", "embeddings.position_embedding.weight", vision.patches + 1, width)
    yield from with_bias("vision.pre_norm", "vision", "pre_layrnorm", width)  # the published spelling
    for i in range(vision.layers):
        rules = _layer(vision, i)
        yield from rules if i < vision.used_layers else map(left_out, rules)
    yield from map(left_out, with_bias("", "vision", "post_layernorm", width))


def _layer(vision: ClipConfig, layer: int) -> Iterator[Rule]:
    ours, theirs = f"vision.layers.{layer}", f"encoder.layers.{layer}"
    width, inner = vision.hidden_size, vision.intermediate_size
    yield from with_bias(f"{ours}.attn_norm", "vision", f"{theirs}.layer_norm1", width)
    for name, attention in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        yield from with_bias(f"{ours}.attn.{name}", "vision", f"{theirs}.self_attn.{attention}", width, width)
    yield from with_bias(f"{ours}.mlp_norm", "vision", f"{theirs}.layer_norm2", width)
    yield from with_bias(f"{ours}.mlp.up", "vision", f"{theirs}.mlp.fc1", inner, width)
    yield from with_bias(f"{ours}.mlp.down", "vision", f"{theirs}.mlp.fc2", width, inner)

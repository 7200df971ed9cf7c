"""Llama-3.2-Vision: a decoder some of whose layers attend to images, and a tower that sees all tiles at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from ...model_defs.config import ModelConfig, TextConfig, TiledConfig
from . import llama
from .rule import NameTable, Rule, SourceRef, plain, spelled, with_bias
from .transforms import blockwise_taps, gated_table, mixed_positions, tanh_gate

# The hub (also what transformers saves), transformers in memory.
SPELLINGS = {
    "text": llama.TEXT,
    "lm_head": llama.LM_HEAD,
    "projector": ("multi_modal_projector", "model.multi_modal_projector"),
    "vision": ("vision_model.", "model.vision_model."),
}


def mllama_table(config: ModelConfig) -> NameTable:
    ignored = re.compile(rf"{spelled(llama.TEXT)}(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
    return NameTable(tuple(_rules(config)), SPELLINGS, {part: names[0] for part, names in SPELLINGS.items()}, ignored)


def _rules(config: ModelConfig) -> Iterator[Rule]:
    text, vision = config.text, config.vision
    assert isinstance(vision, TiledConfig)
    yield llama.embedding(text)
    for layer in range(text.layers):
        yield from _cross_layer(text, layer) if layer in text.cross_layers else llama.self_layer(text, layer)
    yield from llama.ending(text)
    for j, layer in enumerate(text.cross_layers):
        yield from _cross_keys(text, j, layer)
    yield from _tower(vision)
    yield from _projector(vision, text.hidden_size)


def _cross_layer(text: TextConfig, layer: int) -> Iterator[Rule]:
    """The text part of a layer that attends to images."""
    ours, theirs, width = f"text.layers.{layer}", f"layers.{layer}", text.hidden_size
    q = text.heads * text.head_dim
    yield llama.attention_norm(text, layer)
    yield plain(f"{ours}.attn.q.weight", "text", f"{theirs}.cross_attn.q_proj.weight", q, width)
    yield plain(f"{ours}.attn.o.weight", "text", f"{theirs}.cross_attn.o_proj.weight", width, q)
    yield plain(f"{ours}.attn.q_norm.weight", "text", f"{theirs}.cross_attn.q_norm.weight", text.head_dim)
    yield _gate(f"{ours}.attn_gate", "text", f"{theirs}.cross_attn_attn_gate")
    yield from llama.mlp(text, layer)
    yield _gate(f"{ours}.mlp_gate", "text", f"{theirs}.cross_attn_mlp_gate")


def _cross_keys(text: TextConfig, j: int, layer: int) -> Iterator[Rule]:
    """The projections to keys and values of images; they run in the vision graph, which numbers the cross layers alone."""
    theirs, kv = f"layers.{layer}.cross_attn", text.kv_heads * text.head_dim
    yield plain(f"cross.{j}.k.weight", "text", f"{theirs}.k_proj.weight", kv, text.hidden_size)
    yield plain(f"cross.{j}.v.weight", "text", f"{theirs}.v_proj.weight", kv, text.hidden_size)
    yield plain(f"cross.{j}.k_norm.weight", "text", f"{theirs}.k_norm.weight", text.head_dim)


def _tower(vision: TiledConfig) -> Iterator[Rule]:
    width, side = vision.hidden_size, vision.patch_size
    yield plain("vision.class_embedding", "vision", "class_embedding", width)
    yield plain("vision.patch.weight", "vision", "patch_embedding.weight", width, 3, side, side)
    yield _tile_table("pre_tile", vision)
    yield _positions(vision)
    yield _tile_table("post_tile", vision)
    yield from with_bias("vision.pre_norm", "vision", "layernorm_pre", width)
    for i in range(vision.layers):
        yield from _tower_layer(vision, f"vision.layers.{i}", f"transformer.layers.{i}")
    yield from with_bias("vision.post_norm", "vision", "layernorm_post", width)
    for i in range(vision.global_layers):
        ours, theirs = f"vision.global_layers.{i}", f"global_transformer.layers.{i}"
        yield from _tower_layer(vision, ours, theirs)
        yield _gate(f"{ours}.attn_gate", "vision", f"{theirs}.gate_attn")
        yield _gate(f"{ours}.mlp_gate", "vision", f"{theirs}.gate_ffn")


def _tower_layer(vision: TiledConfig, ours: str, theirs: str) -> Iterator[Rule]:
    width, inner = vision.hidden_size, vision.intermediate_size
    yield from with_bias(f"{ours}.attn_norm", "vision", f"{theirs}.input_layernorm", width)
    for name in "qkvo":
        yield plain(f"{ours}.attn.{name}.weight", "vision", f"{theirs}.self_attn.{name}_proj.weight", width, width)
    yield from with_bias(f"{ours}.mlp_norm", "vision", f"{theirs}.post_attention_layernorm", width)
    yield from with_bias(f"{ours}.mlp.up", "vision", f"{theirs}.mlp.fc1", inner, width)
    yield from with_bias(f"{ours}.mlp.down", "vision", f"{theirs}.mlp.fc2", width, inner)


def _tile_table(name: str, vision: TiledConfig) -> Rule:
    """One row per aspect ratio, after row 0, which stands for no image: a vector for each tile."""
    shape, theirs = (len(vision.ratios) + 1, vision.tiles * vision.hidden_size), f"{name}_positional_embedding"
    sources = SourceRef("vision", f"{theirs}.gate", (1,)), SourceRef("vision", f"{theirs}.embedding.weight", shape)
    return Rule(f"vision.{name}.weight", shape, sources, gated_table)


def _positions(vision: TiledConfig) -> Rule:
    theirs, one = "gated_positional_embedding", (vision.rows_per_tile, vision.hidden_size)
    shape = len(vision.ratios) + 1, vision.tiles * vision.rows_per_tile * vision.hidden_size
    sources = (
        SourceRef("vision", f"{theirs}.gate", (1,)),
        SourceRef("vision", f"{theirs}.embedding", one),
        SourceRef("vision", f"{theirs}.tile_embedding.weight", shape),
    )
    return Rule("vision.positions.weight", shape, sources, mixed_positions)


def _projector(vision: TiledConfig, width: int) -> Iterator[Rule]:
    shape = width, vision.feature_size
    make = partial(blockwise_taps, taps=len(vision.taps))
    yield Rule("projector.weight", shape, (SourceRef("projector", ".weight", shape),), make)
    yield plain("projector.bias", "projector", ".bias", width)


def _gate(target: str, part: str, name: str) -> Rule:
    return Rule(target, (1,), (SourceRef(part, name, (1,)),), tanh_gate)

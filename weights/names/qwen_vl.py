"""Qwen-VL: a decoder with fused and biased q, k, v, a ViT, and queries that resample its patches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from ...model_defs.config import ModelConfig, ResampledConfig, TextConfig
from .rule import NameTable, Rule, SourceRef, plain, with_bias
from .transforms import head_slices, resized_grid, transposed

SPELLINGS = {"text": ("transformer.",), "lm_head": ("lm_head",), "vision": ("transformer.visual.",)}


def qwen_vl_table(config: ModelConfig) -> NameTable:
    ignored = re.compile(r"transformer\.(?:h\.\d+\.attn\.)?(?:masked_bias|rotary_emb\.inv_freq)")
    return NameTable(tuple(_rules(config)), SPELLINGS, {part: names[0] for part, names in SPELLINGS.items()}, ignored)


def _rules(config: ModelConfig) -> Iterator[Rule]:
    text, vision = config.text, config.vision
    assert isinstance(vision, ResampledConfig)
    yield plain("text.embed.weight", "text", "wte.weight", text.embed_rows, text.hidden_size)
    for layer in range(text.layers):
        yield from _text_layer(text, layer)
    yield plain("text.norm.weight", "text", "ln_f.weight", text.hidden_size)
    yield plain("text.lm_head.weight", "lm_head", ".weight", text.vocab_size, text.hidden_size)
    yield from _tower(vision)
    yield from _resampler(vision)
    size = vision.output_size
    yield Rule("projector.weight", (size, size), (SourceRef("vision", "proj", (size, size)),), transposed)


def _text_layer(text: TextConfig, layer: int) -> Iterator[Rule]:
    ours, theirs = f"text.layers.{layer}", f"h.{layer}"
    width, inner, q = text.hidden_size, text.intermediate_size, text.heads * text.head_dim
    yield plain(f"{ours}.attn_norm.weight", "text", f"{theirs}.ln_1.weight", width)
    yield from _thirds(f"{ours}.attn", "text", f"{theirs}.attn.c_attn.", q, width)
    yield plain(f"{ours}.attn.o.weight", "text", f"{theirs}.attn.c_proj.weight", width, q)
    yield plain(f"{ours}.mlp_norm.weight", "text", f"{theirs}.ln_2.weight", width)
    yield plain(f"{ours}.mlp.gate.weight", "text", f"{theirs}.mlp.w2.weight", inner, width)
    yield plain(f"{ours}.mlp.up.weight", "text", f"{theirs}.mlp.w1.weight", inner, width)
    yield plain(f"{ours}.mlp.down.weight", "text", f"{theirs}.mlp.c_proj.weight", width, inner)


def _thirds(target: str, part: str, stem: str, out: int, width: int) -> Iterator[Rule]:
    """q, k and v with their biases from tensors that hold all q rows, then all k rows, then all v rows."""
    for i, name in enumerate("qkv"):
        rows = i * out, (i + 1) * out
        weight = SourceRef(part, f"{stem}weight", (3 * out, width), rows)
        yield Rule(f"{target}.{name}.weight", (out, width), (weight,))
        yield Rule(f"{target}.{name}.bias", (out,), (SourceRef(part, f"{stem}bias", (3 * out,), rows),))


def _tower(vision: ResampledConfig) -> Iterator[Rule]:
    width, inner, side = vision.hidden_size, vision.intermediate_size, vision.patch_size
    yield plain("vision.patch.weight", "vision", "conv1.weight", width, 3, side, side)
    positions = SourceRef("vision", "positional_embedding", (vision.stored_positions, width))
    yield _resized("vision.positions.weight", positions, vision.patches)
    yield from with_bias("vision.pre_norm", "vision", "ln_pre", width)
    for i in range(vision.layers):
        ours, theirs = f"vision.layers.{i}", f"transformer.resblocks.{i}"
        yield from with_bias(f"{ours}.attn_norm", "vision", f"{theirs}.ln_1", width)
        yield from _alternating(ours, f"{theirs}.attn.in_proj", vision)
        yield from with_bias(f"{ours}.attn.o", "vision", f"{theirs}.attn.out_proj", width, width)
        yield from with_bias(f"{ours}.mlp_norm", "vision", f"{theirs}.ln_2", width)
        yield from with_bias(f"{ours}.mlp.up", "vision", f"{theirs}.mlp.c_fc", inner, width)
        yield from with_bias(f"{ours}.mlp.down", "vision", f"{theirs}.mlp.c_proj", width, inner)


def _alternating(ours: str, theirs: str, vision: ResampledConfig) -> Iterator[Rule]:
    """q, k and v with their biases from tensors that hold q, k and v of one head after another."""
    width = vision.hidden_size
    for i, name in enumerate("qkv"):
        make = partial(head_slices, which=i, heads=vision.heads)
        weight, bias = (
            SourceRef("vision", f"{theirs}.weight", (3 * width, width)),
            SourceRef("vision", f"{theirs}.bias", (3 * width,)),
        )
        yield Rule(f"{ours}.attn.{name}.weight", (width, width), (weight,), make)
        yield Rule(f"{ours}.attn.{name}.bias", (width,), (bias,), make)


def _resampler(vision: ResampledConfig) -> Iterator[Rule]:
    width, size = vision.hidden_size, vision.output_size
    if width != size:  # otherwise patches are not projected
        yield plain("pool.kv.weight", "vision", "attn_pool.kv_proj.weight", size, width)
    yield from with_bias("pool.kv_norm", "vision", "attn_pool.ln_kv", size)
    yield plain("pool.query", "vision", "attn_pool.query", vision.queries, size)
    yield from with_bias("pool.query_norm", "vision", "attn_pool.ln_q", size)
    positions = SourceRef("vision", "attn_pool.pos_embed", (vision.queries, size))
    yield Rule("pool.positions.weight", (vision.queries, size), (positions,))
    yield _resized("pool.key_positions.weight", positions, vision.patches)
    yield from _thirds("pool.attn", "vision", "attn_pool.attn.in_proj_", size, size)
    yield from with_bias("pool.attn.o", "vision", "attn_pool.attn.out_proj", size, size)
    yield from with_bias("pool.norm", "vision", "ln_post", size)


def _resized(target: str, table: SourceRef, rows: int) -> Rule:
    return Rule(target, (rows, table.shape[1]), (table,), partial(resized_grid, rows=rows))

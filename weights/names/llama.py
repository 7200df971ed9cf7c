"""The decoder in Llama's spelling, which LLaVA and Llama-3.2-Vision share. Parts: text, lm_head."""

from __future__ import annotations

from collections.abc import Iterator

from ...model_defs.config import TextConfig
from .rule import Rule, plain

# Hugging Face's hub (also what transformers saves), transformers in memory.
TEXT = ("language_model.model.", "model.language_model.")
LM_HEAD = ("language_model.lm_head", "lm_head")


def embedding(text: TextConfig) -> Rule:
    return plain("text.embed.weight", "text", "embed_tokens.weight", text.embed_rows, text.hidden_size)


def self_layer(text: TextConfig, layer: int) -> Iterator[Rule]:
    """A layer that attends to the text."""
    ours, theirs, width = f"text.layers.{layer}", f"layers.{layer}", text.hidden_size
    q, kv = text.heads * text.head_dim, text.kv_heads * text.head_dim
    yield attention_norm(text, layer)
    yield plain(f"{ours}.attn.q.weight", "text", f"{theirs}.self_attn.q_proj.weight", q, width)
    yield plain(f"{ours}.attn.k.weight", "text", f"{theirs}.self_attn.k_proj.weight", kv, width)
    yield plain(f"{ours}.attn.v.weight", "text", f"{theirs}.self_attn.v_proj.weight", kv, width)
    yield plain(f"{ours}.attn.o.weight", "text", f"{theirs}.self_attn.o_proj.weight", width, q)
    yield from mlp(text, layer)


def attention_norm(text: TextConfig, layer: int) -> Rule:
    return plain(f"text.layers.{layer}.attn_norm.weight", "text", f"layers.{layer}.input_layernorm.weight", text.hidden_size)


def mlp(text: TextConfig, layer: int) -> Iterator[Rule]:
    """A layer's MLP and the norm before it."""
    ours, theirs = f"text.layers.{layer}", f"layers.{layer}"
    width, inner = text.hidden_size, text.intermediate_size
    yield plain(f"{ours}.mlp_norm.weight", "text", f"{theirs}.post_attention_layernorm.weight", width)
    yield plain(f"{ours}.mlp.gate.weight", "text", f"{theirs}.mlp.gate_proj.weight", inner, width)
    yield plain(f"{ours}.mlp.up.weight", "text", f"{theirs}.mlp.up_proj.weight", inner, width)
    yield plain(f"{ours}.mlp.down.weight", "text", f"{theirs}.mlp.down_proj.weight", width, inner)


def ending(text: TextConfig) -> Iterator[Rule]:
    yield plain("text.norm.weight", "text", "norm.weight", text.hidden_size)
    yield plain("text.lm_head.weight", "lm_head", ".weight", text.vocab_size, text.hidden_size)

"""Name tables: which tensors of a checkpoint become which of our parameters, for each family of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ...model_defs.config import ModelConfig, TextConfig
from .llava import llava_table
from .mllama import mllama_table
from .qwen_vl import qwen_vl_table
from .rule import NameTable, Rule

TABLES: dict[str, Callable[[ModelConfig], NameTable]] = {
    "llava": llava_table,
    "llava_next": llava_table,
    "mllama": mllama_table,
    "qwen_vl": qwen_vl_table,
}


def name_table(config: ModelConfig) -> NameTable:
    """Everything known about the tensors of a model of this config."""
    table = TABLES[config.family](config)
    return replace(table, rules=(*table.rules, *_cache_scales(config.text)))


def is_cache_scale(name: str) -> bool:
    """Whether a parameter is a scale of a cache in 8 bits, which no checkpoint has."""
    return name.endswith((".attn.k_scale", ".attn.v_scale"))


def _cache_scales(text: TextConfig) -> Iterator[Rule]:
    """Rules for a cache in 8 bits: a scale for each channel of keys and of values, measured by a calibration."""
    layers = [layer for layer in range(text.layers) if layer not in text.cross_layers]
    for layer in layers if text.int8_cache else ():
        for which in "kv":
            yield Rule(f"text.layers.{layer}.attn.{which}_scale", (text.kv_heads * text.head_dim,), ())

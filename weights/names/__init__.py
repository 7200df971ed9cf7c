"""Name tables: which tensors of a checkpoint become which of our parameters, for each family of models."""

from __future__ import annotations

from collections.abc import Callable

from ...model_defs.config import ModelConfig
from .llava import llava_table
from .mllama import mllama_table
from .qwen_vl import qwen_vl_table
from .rule import Table

TABLES: dict[str, Callable[[ModelConfig], Table]] = {
    "llava": llava_table,
    "llava_next": llava_table,
    "mllama": mllama_table,
    "qwen_vl": qwen_vl_table,
}


def name_table(config: ModelConfig) -> Table:
    """Everything known about the tensors of a model of this config."""
    return TABLES[config.family](config)

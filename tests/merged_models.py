"""Tiny models of all families with fewer key-value heads than heads, and one of each kind of their graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from staticvl.compiler.buckets import Buckets
from staticvl.compiler.graphs import GraphContext, GraphDef, define_graph
from staticvl.compiler.options import Options
from staticvl.compiler.plan import make_plan
from staticvl.model_defs.config import ModelConfig
from staticvl.runtime.artifact import ImageProcessorConfig

from .wide_models import wide_config

FAMILIES = ("llava", "llava_next", "mllama", "qwen_vl")


def model_config(family: str) -> ModelConfig:
    """Qwen-VL alone has as many key-value heads as heads."""
    return wide_config(family, 8 if family == "qwen_vl" else 2)


def graphs(family: str, quant: str = "none", ranks: int = 1, heads: int = 0) -> Iterator[GraphDef]:
    """One graph of each kind; `heads`: of so many features each, as Ascend's attention takes them."""
    config = model_config(family)
    config = replace(config, text=replace(config.text, head_dim=heads or config.text.head_dim))
    images = (1,) if config.text.cross_layers else None
    buckets = Buckets(prefill=(8,), decode=(2,), verify=(4,), images=images, context=32, slots=2)
    plan = make_plan(config, Options(checkpoint=Path(), out=Path(), tp=ranks, buckets=buckets))
    size, third = config.vision.image_size, (0.3, 0.4, 0.5)
    image = ImageProcessorConfig(mode="stretch", size=size, rows=config.vision.rows_per_tile, mean=third, std=third)
    context = GraphContext(config=config, image=image, cache=plan.cache, quant=quant, ranks=ranks)
    yield from (define_graph(context, key) for key in plan.graphs if key.images or key.kind == "vision" or not images)

"""A graph kind and a bucket -> the torch module that computes it, with its named inputs and outputs.

Modules are made on the meta device: a graph never meets the weights, which the emitters refer to by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..model_defs import llava
from ..model_defs.config import ModelConfig
from ..model_defs.decoder import DecodeGraph, PrefillGraph
from ..runtime.artifact import CacheSpec, ImageFacts, Kind, TensorSpec

VISION_GRAPHS = {"llava": llava.VisionGraph}


@dataclass(frozen=True, slots=True)
class GraphDef:
    """One graph before it is compiled; `constants` are parameters whose values are settings, not weights."""

    kind: Kind
    bucket: int
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    constants: dict[str, np.ndarray] = field(default_factory=dict)


def define_graph(config: ModelConfig, image: ImageFacts, cache: CacheSpec, quant: str, kind: Kind, bucket: int) -> GraphDef:
    """The definition of one graph, on the meta device."""
    with torch.device("meta"):
        if kind == "vision":
            return _vision(config, image, bucket)
        return _text(config, cache, quant, kind, bucket)


def _vision(config: ModelConfig, image: ImageFacts, tiles: int) -> GraphDef:
    mean, std = np.array(image.mean), np.array(image.std)
    return GraphDef(
        kind="vision",
        bucket=tiles,
        module=VISION_GRAPHS[config.family](config),
        inputs=(TensorSpec(name="pixels", dtype="uint8", shape=(tiles, image.size, image.size, 3)),),
        outputs=(TensorSpec(name="image_rows", dtype="float32", shape=(tiles, image.rows, config.text.hidden_size)),),
        constants={
            "pixel_scale": (image.rescale / std).astype(np.float32),
            "pixel_shift": (-mean / std).astype(np.float32),
        },
    )


def _text(config: ModelConfig, cache: CacheSpec, quant: str, kind: Kind, bucket: int) -> GraphDef:
    text = config.text
    b, t = (1, bucket) if kind == "prefill" else (bucket, 1)

    def ints(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="int32", shape=shape)

    def floats(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    ropes = [floats(name, b, t, text.head_dim) for name in ("rope_cos", "rope_sin")]
    caches = [
        TensorSpec(name=f"{which}_cache.{i}", dtype=cache.dtype, shape=(b, cache.kv_heads, cache.rows, cache.head_dim))
        for i in range(cache.layers)
        for which in "kv"
    ]
    if kind == "prefill":
        rows = (ints("row_index", 1, t), floats("image_rows", t, text.hidden_size))
        inputs = [ints("token_ids", 1, t), *rows, ints("lengths", 1), ints("last_index", 1), *ropes, *caches]
        module = PrefillGraph(text, quant)
    else:
        inputs = [ints("token_ids", b, 1), ints("lengths", b), *ropes, *caches]
        module = DecodeGraph(text, quant)
    outputs = [floats("logits", b, text.vocab_size), *(_renamed(spec) for spec in caches)]
    return GraphDef(kind=kind, bucket=bucket, module=module, inputs=tuple(inputs), outputs=tuple(outputs))


def _renamed(cache: TensorSpec) -> TensorSpec:
    """A cache as output: bound to the very memory of the input."""
    return TensorSpec(name=f"{cache.name}.out", dtype=cache.dtype, shape=cache.shape)


def trace(graph: GraphDef) -> torch.export.ExportedProgram:
    """The graph as torch.export sees it: ops of our vocabulary and a few of aten's."""
    return torch.export.export(graph.module, example_inputs(graph), strict=False)


def example_inputs(graph: GraphDef) -> tuple[Tensor, ...]:
    """Tensors without data, of the graph's input shapes and dtypes."""
    return tuple(torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta") for s in graph.inputs)

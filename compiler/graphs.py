"""A graph kind and a bucket -> the torch module that computes it, with its named inputs and outputs.

Modules are made on the meta device: a graph never meets the weights, which the emitters refer to by name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..model_defs import llava, mllama, qwen_vl
from ..model_defs.config import ModelConfig
from ..model_defs.decoder import TextGraph
from ..runtime.artifact import CacheSpec, ImageFacts, Kind, TensorSpec, graph_name

VISION_GRAPHS: dict[str, type[nn.Module]] = {
    "llava": llava.VisionGraph,
    "llava_next": llava.VisionGraph,
    "mllama": mllama.VisionGraph,
    "qwen_vl": qwen_vl.VisionGraph,
}


@dataclass(frozen=True, slots=True, eq=False)
class GraphDef:
    """One graph before it is compiled; `constants` are parameters whose values are settings, not weights."""

    kind: Kind
    bucket: int
    images: int
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return graph_name(self.kind, self.bucket, self.images)


def define_graph(
    config: ModelConfig,
    image: ImageFacts,
    cache: CacheSpec,
    quant: str,
    kind: Kind,
    bucket: int,
    images: int,
    ranks: int = 1,
) -> GraphDef:
    """The definition of one graph, on the meta device.

    With several `ranks` it is what each of them runs, `cache` being the cache of one.
    """
    assert cache.kv_heads == config.text.rank_kv_heads(ranks), (cache.kv_heads, ranks)
    with torch.device("meta"):
        if kind == "vision":
            return _vision(config, image, cache, bucket, ranks)
        return _text(config, cache, quant, kind, bucket, images, ranks)


def _vision(config: ModelConfig, image: ImageFacts, cache: CacheSpec, tiles: int, ranks: int) -> GraphDef:
    inputs = [TensorSpec(name="pixels", dtype="uint8", shape=(tiles, image.size, image.size, 3))]
    if cross := cache.cross:
        inputs += [_ints("tile_count", 1), _ints("aspect_id", 1)]
        shape = (1, cache.kv_heads, cross.rows, cache.head_dim)
        names = [f"cross_{which}.{i}" for i in range(cross.layers) for which in "kv"]
        outputs = [TensorSpec(name=name, dtype=cache.dtype, shape=shape) for name in names]
    else:
        outputs = [_floats("image_rows", tiles, image.rows, config.text.hidden_size)]
    mean, std = np.array(image.mean), np.array(image.std)
    return GraphDef(
        kind="vision",
        bucket=tiles,
        images=0,
        module=VISION_GRAPHS[config.family](config, ranks),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        constants={
            "pixels.scale": (image.rescale / std).astype(np.float32),
            "pixels.shift": (-mean / std).astype(np.float32),
        },
    )


def _text(config: ModelConfig, cache: CacheSpec, quant: str, kind: Kind, bucket: int, images: int, ranks: int) -> GraphDef:
    text = config.text
    b, t = (1, bucket) if kind == "prefill" else (bucket, 1)
    inputs = [_ints("token_ids", b, t)]
    if kind == "prefill" and not cache.cross:
        inputs += [_ints("row_index", 1, t), _floats("image_rows", t, text.hidden_size)]
    inputs.append(_ints("lengths", b))
    if kind == "prefill":
        inputs.append(_ints("last_index", 1))
    inputs += [_floats(name, b, t, text.head_dim) for name in ("rope_cos", "rope_sin")]
    if text.rope.logn_positions:
        inputs.append(_floats("query_scale", b, t, 1))
    if images:
        inputs += _cross_inputs(cache, b, t, images)
    shape = (b, cache.kv_heads, cache.rows, cache.head_dim)
    caches = [
        TensorSpec(name=f"{which}_cache.{i}", dtype=cache.dtype, shape=shape) for i in range(cache.layers) for which in "kv"
    ]
    inputs += caches
    return GraphDef(
        kind=kind,
        bucket=bucket,
        images=images,
        module=TextGraph(text, quant, [spec.name for spec in inputs], images, ranks),
        inputs=tuple(inputs),
        outputs=(_floats("logits", b, text.vocab_size), *map(_updated, caches)),
    )


def _cross_inputs(cache: CacheSpec, b: int, t: int, images: int) -> list[TensorSpec]:
    cross = cache.cross
    assert cross is not None
    shape = (b, cache.kv_heads, cross.rows, cache.head_dim)
    names = [f"cross_{which}.{i}.{j}" for i in range(cross.layers) for which in "kv" for j in range(images)]
    return [
        _floats("cross_mask", b, t, images * cross.tiles),
        _floats("cross_gate", b, t, 2),
        *(TensorSpec(name=name, dtype=cache.dtype, shape=shape) for name in names),
    ]


def _ints(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="int32", shape=shape)


def _floats(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def _updated(cache: TensorSpec) -> TensorSpec:
    """A cache as output: bound to the very memory of the input."""
    return TensorSpec(name=f"{cache.name}.out", dtype=cache.dtype, shape=cache.shape)


@functools.lru_cache(maxsize=1)  # a graph is traced once, whoever asks
def trace(graph: GraphDef) -> torch.export.ExportedProgram:
    """The graph as torch.export sees it: ops of our vocabulary and a few of aten's."""
    return torch.export.export(graph.module, example_inputs(graph), strict=False)


def example_inputs(graph: GraphDef) -> tuple[Tensor, ...]:
    """Tensors without data, of the graph's input shapes and dtypes."""
    return tuple(torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta") for s in graph.inputs)

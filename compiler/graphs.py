"""A graph kind and a bucket -> the torch module that computes it, with its named inputs and outputs.

Modules are made on the meta device: a graph never meets the weights, which the emitters refer to by name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from msgspec import UNSET, UnsetType
from torch import Tensor, nn

from ..model_defs import llava, mllama, qwen_vl
from ..model_defs.config import ModelConfig, TextConfig, tower_quant
from ..model_defs.decoder import TextGraph
from ..runtime.artifact import CacheSpec, GraphSpec, ImageProcessorConfig, Kernels, Kind, TensorSpec, graph_name

VISION_GRAPHS: dict[str, type[nn.Module]] = {
    "llava": llava.VisionGraph,
    "llava_next": llava.VisionGraph,
    "mllama": mllama.VisionGraph,
    "qwen_vl": qwen_vl.VisionGraph,
}


@dataclass(frozen=True, slots=True, eq=False)
class GraphDef:
    """One graph before it is compiled; `constants` are parameters whose values are settings, not weights, and `kernels` is how
    this machine wants it lowered."""

    kind: Kind
    bucket: int
    images: int
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    kernels: Kernels | UnsetType = UNSET

    @property
    def name(self) -> str:
        return graph_name(self.kind, self.bucket, self.images)

    def spec(self, file: str = "", key: str = "", cost_ms: float = 0.0) -> GraphSpec:
        """What a backend has to know of the graph; the rest is what it was emitted as."""
        return GraphSpec(
            kind=self.kind,
            bucket=self.bucket,
            images=self.images,
            file=file,
            key=key,
            inputs=self.inputs,
            outputs=self.outputs,
            cost_ms=cost_ms,
            kernels=self.kernels,
        )


def define_graph(
    config: ModelConfig,
    image: ImageProcessorConfig,
    cache: CacheSpec,
    quant: str,
    kind: Kind,
    bucket: int,
    images: int,
    ranks: int = 1,
    candidates: int = 0,
) -> GraphDef:
    """The definition of one graph, on the meta device.

    `candidates`: how many of the likeliest tokens a text graph puts out behind its logits.

    With several `ranks` it is what each of them runs, `cache` being the cache of one. Of a pipeline it is the graph of the
    config's stage: what it takes from the stage before it is an input, and what it hands on its first output.
    """
    assert cache.kv_heads == config.text.rank_kv_heads(ranks), (cache.kv_heads, ranks)
    assert config.text.int8_cache == (cache.text_dtype == "int8"), cache
    with torch.device("meta"):
        if kind == "vision":
            return _vision(config, image, cache, tower_quant(quant), bucket, ranks)
        return _text(config, image, cache, quant, kind, bucket, images, ranks, candidates)


def fed_inputs(
    config: ModelConfig,
    image: ImageProcessorConfig,
    cache: CacheSpec,
    kind: Kind,
    bucket: int,
    images: int,
    candidates: int = 0,
) -> list[TensorSpec]:
    """What a run is fed, whatever the stages of a pipeline take of it: every input but caches."""
    if kind == "vision":
        pixels = TensorSpec(name="pixels", dtype="uint8", shape=(bucket, image.size, image.size, 3))
        return [pixels, _ints("tile_count", 1), _ints("aspect_id", 1)] if cache.cross else [pixels]
    text = config.text
    b, t = (bucket, 1) if kind == "decode" else (1, bucket)
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
        assert cache.cross is not None
        inputs += [_floats("cross_mask", b, t, images * cache.cross.tiles), _floats("cross_gate", b, t, 2)]
    if candidates:
        inputs.append(_floats("inverse_temperature", b))
    return inputs


def _vision(config: ModelConfig, image: ImageProcessorConfig, cache: CacheSpec, quant: str, tiles: int, ranks: int) -> GraphDef:
    stage = config.text.stage
    inputs = fed_inputs(config, image, cache, "vision", tiles, 0)
    if cross := cache.cross:
        features = 1, cross.rows, config.text.hidden_size
        shape = (1, cache.kv_heads, cross.rows, cache.head_dim)
        names = [f"cross_{which}.{i}" for i in range(cross.layers) for which in "kv"]
        outputs = [TensorSpec(name=name, dtype=cache.dtype, shape=shape) for name in names]
        inputs = inputs if stage.first else [_floats("features", *features)]
        outputs = outputs if stage.last else [_floats("next_features", *features), *outputs]
    else:
        assert stage.first, "only cross-attention needs an image behind the first stage"
        outputs = [_floats("image_rows", tiles, image.rows, config.text.hidden_size)]
    mean, std = np.array(image.mean), np.array(image.std)
    constants = {
        "pixels.scale": (image.rescale / std).astype(np.float32),
        "pixels.shift": (-mean / std).astype(np.float32),
    }
    return GraphDef(
        kind="vision",
        bucket=tiles,
        images=0,
        module=VISION_GRAPHS[config.family](config, ranks, quant),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        constants=constants if stage.first else {},
    )


def _text(
    config: ModelConfig,
    image: ImageProcessorConfig,
    cache: CacheSpec,
    quant: str,
    kind: Kind,
    bucket: int,
    images: int,
    ranks: int,
    candidates: int,
) -> GraphDef:
    text, stage = config.text, config.text.stage
    assert stage.count == 1 or not candidates, "stages of a pipeline hand on whole logits"
    fed = fed_inputs(config, image, cache, kind, bucket, images, candidates)
    inputs = [spec for spec in fed if _taken(text, spec.name)]
    b, t, _ = next(spec.shape for spec in inputs if spec.name == "rope_cos")
    if not stage.first:
        inputs.insert(0, _floats("hidden", b, t, text.hidden_size))
    if images:
        inputs += _images(cache, b, images)
    shape = (b, cache.kv_heads, cache.rows, cache.head_dim)
    caches = [
        TensorSpec(name=name, dtype=cache.dtype_of(name), shape=shape)
        for name in (f"{which}_cache.{i}" for i in range(cache.layers) for which in "kv")
    ]
    inputs += caches
    rows = t if kind == "verify" else b
    first = _floats("logits", rows, text.vocab_size) if stage.last else _floats("next_hidden", b, t, text.hidden_size)
    top_k_outputs = (_floats("top_logits", rows, candidates), _ints("top_ids", rows, candidates), _floats("mass", rows))
    return GraphDef(
        kind=kind,
        bucket=bucket,
        images=images,
        module=TextGraph(text, quant, [spec.name for spec in inputs], images, ranks, candidates),
        inputs=tuple(inputs),
        outputs=(first, *(top_k_outputs if candidates else ()), *map(_updated, caches)),
    )


def _taken(text: TextConfig, name: str) -> bool:
    """Whether the stage has a use for what a text graph is fed."""
    if name in ("token_ids", "row_index", "image_rows"):
        return text.stage.first
    if name.startswith("cross_"):
        return bool(text.stage_cross)
    return text.stage.last if name == "last_index" else True


def _images(cache: CacheSpec, b: int, images: int) -> list[TensorSpec]:
    """Keys and values of images, [B, K, X, D]."""
    cross = cache.cross
    assert cross is not None
    shape = (b, cache.kv_heads, cross.rows, cache.head_dim)
    names = [f"cross_{which}.{i}.{j}" for i in range(cross.layers) for which in "kv" for j in range(images)]
    return [TensorSpec(name=name, dtype=cache.dtype, shape=shape) for name in names]


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

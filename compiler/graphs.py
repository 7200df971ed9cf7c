"""A graph key -> the torch module that computes the graph, with its named inputs and outputs.

Modules are made on the meta device, without weights; the emitters refer to these by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from msgspec import UNSET, UnsetType
from torch import Tensor, nn

from ..model_defs import llava, mllama, qwen_vl
from ..model_defs.config import ModelConfig, TextConfig, tower_quant
from ..model_defs.decoder import TextGraph
from ..runtime.artifact import CacheSpec, GraphKey, GraphSpec, ImageProcessorConfig, Kernels, Kind, TensorSpec
from ..weights.head_padding import head_width
from .tracing import Trace, record

VISION_GRAPHS: dict[str, type[nn.Module]] = {
    "llava": llava.VisionGraph,
    "llava_next": llava.VisionGraph,
    "mllama": mllama.VisionGraph,
    "qwen_vl": qwen_vl.VisionGraph,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphContext:
    """The common settings of the graphs of a model, or of one pipeline stage.

    `cache` is that of one rank of `ranks`. `candidates`: the number of top-k tokens after the logits of a text graph.
    """

    config: ModelConfig
    image: ImageProcessorConfig
    cache: CacheSpec
    quant: str = "none"
    ranks: int = 1
    candidates: int = 0

    def __post_init__(self) -> None:
        text, cache = self.config.text, self.cache
        assert cache.kv_heads == text.rank_kv_heads(self.ranks), (cache.kv_heads, self.ranks)
        assert text.int8_cache == (cache.text_dtype == "int8"), cache


@dataclass(frozen=True, slots=True, eq=False)
class GraphDef:
    """One graph before it is compiled. `constants`: parameters whose values are settings, not weights. `quant`: that of the
    artifact. `kernels`: the lowering chosen for this machine. `heads`: the widths of the heads that parameters have rows or
    columns of, where artifacts for Ascend may fill them up (weights/head_padding.py)."""

    graph_key: GraphKey
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    quant: str = "none"
    kernels: Kernels | UnsetType = UNSET
    heads: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return self.graph_key.kind

    @property
    def bucket(self) -> int:
        return self.graph_key.bucket

    @property
    def name(self) -> str:
        return self.graph_key.name

    def spec(self, file: str = "", key: str = "", cost_ms: float = 0.0) -> GraphSpec:
        """The record of the graph for backends, without what the emitter adds."""
        return GraphSpec(
            **self.graph_key._asdict(),
            file=file,
            key=key,
            inputs=self.inputs,
            outputs=self.outputs,
            cost_ms=cost_ms,
            kernels=self.kernels,
        )


def define_graph(context: GraphContext, key: GraphKey) -> GraphDef:
    """The definition of one graph, as each rank runs it, on the meta device.

    For a pipeline it is the graph of the config's stage: tensors from the stage before are inputs, and the tensor for the next
    stage is the first output.
    """
    with torch.device("meta"):
        return _vision(context, key) if key.kind == "vision" else _text(context, key)


def fed_inputs(context: GraphContext, key: GraphKey) -> list[TensorSpec]:
    """The inputs that the engine feeds to a run, of all stages of a pipeline together: all but caches."""
    return _fed_vision(context, key.bucket) if key.kind == "vision" else _fed_text(context, key)


def _fed_vision(context: GraphContext, tiles: int) -> list[TensorSpec]:
    size = context.image.size
    pixels = TensorSpec(name="pixels", dtype="uint8", shape=(tiles, size, size, 3))
    return [pixels, _ints("tile_count", 1), _ints("aspect_id", 1)] if context.cache.cross else [pixels]


def _fed_text(context: GraphContext, key: GraphKey) -> list[TensorSpec]:
    text, cross = context.config.text, context.cache.cross
    b, t = (key.bucket, 1) if key.kind == "decode" else (1, key.bucket)
    inputs = [_ints("token_ids", b, t)]
    if key.kind == "prefill" and not cross:
        inputs += [_ints("row_index", 1, t), _floats("image_rows", t, text.hidden_size)]
    inputs.append(_ints("lengths", b))
    if context.cache.pages:
        inputs += [_ints("block_table", b, context.cache.table_width), _ints("slot_mapping", b, t)]
    if key.kind == "prefill":
        inputs.append(_ints("last_index", 1))
    inputs += [_floats(name, b, t, text.head_dim) for name in ("rope_cos", "rope_sin")]
    if text.rope.logn_positions:
        inputs.append(_floats("query_scale", b, t, 1))
    if key.images:
        assert cross is not None
        inputs += [_floats("cross_mask", b, t, key.images * cross.tiles), _floats("cross_gate", b, t, 2)]
    if context.candidates:
        inputs.append(_floats("inverse_temperature", b))
    return inputs


def _vision(context: GraphContext, key: GraphKey) -> GraphDef:
    config, image, cache, tiles = context.config, context.image, context.cache, key.bucket
    stage = config.text.stage
    inputs = _fed_vision(context, tiles)
    if cross := cache.cross:
        features = 1, cross.rows, config.text.hidden_size
        shape = (1, cache.kv_heads, cross.rows, cache.head_dim)
        names = [f"cross_{which}.{i}" for i in range(cross.layers) for which in "kv"]
        outputs = [TensorSpec(name=name, dtype=cache.dtype, shape=shape) for name in names]
        inputs = inputs if stage.first else [_floats("features", *features)]
        outputs = outputs if stage.last else [_floats("next_features", *features), *outputs]
    else:
        assert stage.first, "only cross-attention needs an image after the first stage"
        outputs = [_floats("image_rows", tiles, image.rows, config.text.hidden_size)]
    module = VISION_GRAPHS[config.family](config, context.ranks, tower_quant(context.quant))
    heads = {name: width for name, _ in module.named_parameters() if (width := head_width(config, name))}
    constants = _colours(image) if stage.first else {}
    return GraphDef(key, module, tuple(inputs), tuple(outputs), constants, context.quant, heads=heads)


def _colours(image: ImageProcessorConfig) -> dict[str, np.ndarray]:
    """Factors that normalise pixels of 0 to 255: x * scale + shift, [3] each."""
    mean, std = np.array(image.mean), np.array(image.std)
    return {"pixels.scale": (image.rescale / std).astype(np.float32), "pixels.shift": (-mean / std).astype(np.float32)}


def _text(context: GraphContext, key: GraphKey) -> GraphDef:
    text, stage, candidates = context.config.text, context.config.text.stage, context.candidates
    assert stage.count == 1 or not candidates, "stages of a pipeline hand on whole logits"
    inputs = [spec for spec in _fed_text(context, key) if _used(text, spec.name)]
    b, t, _ = next(spec.shape for spec in inputs if spec.name == "rope_cos")
    if not stage.first:
        inputs.insert(0, _floats("hidden", b, t, text.hidden_size))
    if key.images:
        inputs += _images(context.cache, b, key.images)
    caches = _caches(context.cache, b)
    inputs += caches
    rows = t if key.kind == "verify" else b
    first = _floats("logits", rows, text.vocab_size) if stage.last else _floats("next_hidden", b, t, text.hidden_size)
    top_k = (_floats("top_logits", rows, candidates), _ints("top_ids", rows, candidates), _floats("mass", rows))
    module = TextGraph(text, context.quant, [spec.name for spec in inputs], key.images, context.ranks, candidates)
    outputs = (first, *(top_k if candidates else ()), *map(_updated, caches))
    return GraphDef(key, module, tuple(inputs), outputs, quant=context.quant)


def _used(text: TextConfig, name: str) -> bool:
    """Whether the stage of `text` takes this input of a whole text graph."""
    if name in ("token_ids", "row_index", "image_rows"):
        return text.stage.first
    if name.startswith("cross_"):
        return bool(text.stage_cross)
    return text.stage.last if name == "last_index" else True


def _caches(cache: CacheSpec, b: int) -> list[TensorSpec]:
    """Keys and values of text, [B, K, S, D], or all pages."""
    shape = cache.text_shape if cache.pages else (b, *cache.text_shape[1:])
    names = [f"{which}_cache.{i}" for i in range(cache.layers) for which in "kv"]
    return [TensorSpec(name=name, dtype=cache.dtype_of(name), shape=shape) for name in names]


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
    """A cache as output: bound to the memory of the input."""
    return TensorSpec(name=f"{cache.name}.out", dtype=cache.dtype, shape=cache.shape)


_traces: WeakKeyDictionary[nn.Module, dict[tuple[TensorSpec, ...], Trace]] = WeakKeyDictionary()


def trace(graph: GraphDef) -> Trace:
    """The ops of the graph: those of our vocabulary and a few of aten's.

    A module is traced once for given inputs, and its trace is kept as long as the module.
    """
    traces = _traces.setdefault(graph.module, {})
    if graph.inputs not in traces:
        traces[graph.inputs] = record(graph.module, [spec.name for spec in graph.inputs], example_inputs(graph))
    return traces[graph.inputs]


def example_inputs(graph: GraphDef) -> tuple[Tensor, ...]:
    """Tensors without data, of the graph's input shapes and dtypes."""
    return tuple(torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta") for s in graph.inputs)

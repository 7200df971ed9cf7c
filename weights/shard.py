"""How parameters are sharded over tensor-parallel ranks, which hold the model once between them.

- Column parallel: sharded by output features (axis 0), with their biases. These are q, k, v, gate and up of the decoder, of
  vision towers and of Qwen-VL's resampler, LLaVA's projector.up, keys and values of images, and the scales of a cache in 8
  bits. Heads stay whole and each shard is contiguous.
- Row parallel: sharded by input features (axis 1). These are o, down and LLaVA's projector.down. Their products are summed
  over ranks; their biases are replicated and added once, to the sum.
- Column parallel and gathered after the product: lm_head, Llama's and Qwen's projectors, and the resampler's kv. None of them
  has a second layer whose input could be sharded, as LLaVA's projector has: Llama's features go to every key and value of an
  image, the resampler's kv to a norm over its whole width, and Qwen's projector comes after one.
- Tables sharded by columns (axis 1), gathered after the look-up: the token embedding, and Llama's positions, whose table for
  every shape of an image is larger than some layers.

Replicated on every rank are small parameters (0.1 % of a published model at most): norms, gates, biases after a sum, class
embeddings, patch convolutions, the positions of CLIP, of Qwen's tower and of its resampler with its queries, and Llama's
vectors of tiles.

The ranks need not divide the vocabulary: each holds as many rows of lm_head, of which the last are zeros that stand for no
token. Where there are fewer key-value heads than ranks, neighbouring ranks hold the same head. All ranks have the same shapes,
so one graph and one layout of weight files serve them all.

Weights are sharded before they are quantised: blocks of 8-bit weights run along a row, and a shard may end within one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Literal

from ..model_defs.config import ModelConfig, ResampledConfig, TiledConfig
from .names.rule import Shape
from .tensors import WeightsError
from .weight_map import targets

_OUTPUT = re.compile(
    r"(?:text\.layers\.\d+\.(?:attn\.[qkv]|mlp\.(?:gate|up))"
    r"|vision\.(?:global_)?layers\.\d+\.(?:attn\.[qkv]|mlp\.up)"
    r"|cross\.\d+\.[kv]|pool\.attn\.[qkv]|pool\.kv|projector\.up|projector|text\.lm_head)\.(?:weight|bias)"
    r"|text\.layers\.\d+\.attn\.[kv]_scale"
)
_INPUT = re.compile(
    r"(?:(?:text\.|vision\.|vision\.global_)layers\.\d+\.(?:attn\.o|mlp\.down)|pool\.attn\.o|projector\.down|text\.embed)\.weight"
)
_HEAD = "text.lm_head.weight"
_POSITIONS = "vision.positions.weight"
_KEYS_VALUES = re.compile(r"(?:text\.layers\.\d+\.attn|cross\.\d+)\.[kv](?:\.(?:weight|bias)|_scale)")


def shard_axis(config: ModelConfig, name: str) -> Literal[0, 1] | None:
    """The axis along which parameter `name` is sharded; None: it is replicated."""
    assert not name.endswith((".qweight", ".scales", ".zeros")), f"{name}: shard before quantising"
    if _OUTPUT.fullmatch(name):
        return 0
    return 1 if _INPUT.fullmatch(name) or (name == _POSITIONS and isinstance(config.vision, TiledConfig)) else None


def bias_in_product(name: str, tp: int) -> bool:
    """Whether `name` is a bias that a rank of `tp` adds within a product: no norm's, and not one after a sum over ranks."""
    weight = f"{name.removesuffix('bias')}weight"
    return name.endswith(".bias") and not name.endswith("norm.bias") and not (tp > 1 and _INPUT.fullmatch(weight))


def check_tp(config: ModelConfig, tp: int) -> None:
    """Raise WeightsError, naming what does not divide and the possible numbers of ranks, unless the model can have `tp`."""
    if tp < 1:
        raise WeightsError(f"tensor parallelism {tp}; expected a number of ranks from 1 on")
    if fault := next(_faults(config, tp), None):
        possible = ", ".join(map(str, possible_tp(config)))
        raise WeightsError(f"{fault}; this model can be sharded over these numbers of ranks: {possible}")


def possible_tp(config: ModelConfig) -> tuple[int, ...]:
    """Every number of ranks that the model can be sharded over."""
    return tuple(tp for tp in range(1, config.text.heads + 1) if next(_faults(config, tp), None) is None)


def rank_span(config: ModelConfig, name: str, shape: Shape, tp: int, rank: int) -> tuple[int, int]:
    """The shard of parameter `name` that `rank` of `tp` holds along its `shard_axis`: first row or column, and after the last.

    Of lm_head the last ranks may hold fewer rows than `rank_shape` says, or none. Raises WeightsError as `check_tp`; `name`
    must have a `shard_axis`.
    """
    check_tp(config, tp)
    axis = shard_axis(config, name)
    assert axis is not None and 0 <= rank < tp, (name, rank)
    shards = min(tp, config.text.kv_heads) if _KEYS_VALUES.fullmatch(name) else tp
    length = shape[axis]
    assert length % shards == 0 or name == _HEAD, (name, shape, shards)
    size = -(-length // shards)
    first = rank // (tp // shards) * size
    return min(first, length), min(first + size, length)


def rank_shape(config: ModelConfig, name: str, shape: Shape, tp: int) -> Shape:
    """The shape of parameter `name` on each rank of `tp`. Raises WeightsError as `check_tp`."""
    axis = shard_axis(config, name)
    if axis is None:
        check_tp(config, tp)
        return shape
    first, stop = rank_span(config, name, shape, tp, 0)
    return (*shape[:axis], stop - first, *shape[axis + 1 :])


def rank_targets(config: ModelConfig, tp: int) -> dict[str, Shape]:
    """Our parameters and their shapes on each rank of `tp`, in the order in which they are stored. Raises as `check_tp`."""
    return {name: rank_shape(config, name, shape, tp) for name, shape in targets(config).items()}


def rank_parameters(config: ModelConfig, tp: int) -> int:
    """The number of parameters on each rank of `tp`. Raises WeightsError as `check_tp`."""
    return sum(map(math.prod, rank_targets(config, tp).values()))


def _faults(config: ModelConfig, tp: int) -> Iterator[str]:
    """Sizes that `tp` ranks do not divide, as parts of a sentence."""
    for name, size in _sizes(config):
        if size % tp:
            yield f"{size} {name} do not divide among {tp} ranks"
    kv_heads = config.text.kv_heads
    if kv_heads % tp and tp % kv_heads:
        yield f"{kv_heads} key-value heads neither divide among {tp} ranks nor the ranks among them"


def _sizes(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Sizes that ranks have to divide. They divide a tower's width where they divide its heads."""
    text, vision = config.text, config.vision
    yield "attention heads", text.heads
    yield "rows of the MLP", text.intermediate_size
    yield "columns of the embedding table", text.hidden_size
    yield "attention heads of the vision tower", vision.heads
    yield "rows of the vision tower's MLP", vision.intermediate_size
    if isinstance(vision, ResampledConfig):
        yield "attention heads of the resampler", vision.resampler_heads

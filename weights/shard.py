"""How our parameters are cut among the ranks of a tensor-parallel model, so that together they hold the model once.

- By output features (axis 0), with their biases: q, k, v, gate, up of the decoder, of vision towers and of Qwen-VL's
  resampler, LLaVA's projector.up, keys and values of images, scales of a cache in 8 bits. Heads stay together and each cut is
  contiguous.
- By input features (axis 1): o, down, LLaVA's projector.down. Their products are summed over ranks; their biases are whole on
  every rank and added once, to the sum.
- By output features that are joined again behind the product: lm_head, Llama's and Qwen's projectors, and the resampler's kv.
  None of them has a second layer whose input could be cut, as LLaVA's projector has: Llama's features go to every key and
  value of an image, the resampler's kv to a norm over its whole width, Qwen's projector comes behind one.
- By columns (axis 1), of which each rank looks up its own, joined behind it: the token embedding, and Llama's positions, whose
  table for every shape of an image is larger than some layers.

Whole on every rank, and small (0.1 % of a published model at most): norms, gates, biases behind a sum, class embeddings, patch
convolutions, the positions of CLIP, of Qwen's tower and of its resampler with its queries, and Llama's vectors of tiles.

A vocabulary need not divide: ranks hold equal numbers of rows of lm_head, of which the last are zeros that stand for no token.

Where there are fewer key-value heads than ranks, neighbouring ranks hold the same head. Every rank's shapes are the same, so
one graph and one layout of weight files serve all.

A cut is made before a weight is quantised: blocks of 8-bit weights run along a row, and a cut need not fall between two.
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
    """The axis along which parameter `name` is cut; None: every rank holds all of it."""
    assert not name.endswith((".qweight", ".scales", ".zeros")), f"{name}: cut before quantising"
    if _OUTPUT.fullmatch(name):
        return 0
    return 1 if _INPUT.fullmatch(name) or (name == _POSITIONS and isinstance(config.vision, TiledConfig)) else None


def check_tp(config: ModelConfig, tp: int) -> None:
    """Raise WeightsError, naming what does not divide and the numbers of ranks that do, unless `tp` equal parts can be cut."""
    if tp < 1:
        raise WeightsError(f"tensor parallelism {tp}; expected a number of ranks from 1 on")
    if fault := next(_faults(config, tp), None):
        possible = ", ".join(map(str, possible_tp(config)))
        raise WeightsError(f"{fault}; this model can be cut among these numbers of ranks: {possible}")


def possible_tp(config: ModelConfig) -> tuple[int, ...]:
    """Every number of ranks among which the model can be cut."""
    return tuple(tp for tp in range(1, config.text.heads + 1) if next(_faults(config, tp), None) is None)


def rank_span(config: ModelConfig, name: str, shape: Shape, tp: int, rank: int) -> tuple[int, int]:
    """What `rank` of `tp` holds of parameter `name` along its `shard_axis`: first row or column, and behind the last.

    Of lm_head the last ranks may hold fewer rows than `rank_shape` says, or none. Raises WeightsError as `check_tp`; `name`
    has to be cut.
    """
    check_tp(config, tp)
    axis = shard_axis(config, name)
    assert axis is not None and 0 <= rank < tp, (name, rank)
    parts = min(tp, config.text.kv_heads) if _KEYS_VALUES.fullmatch(name) else tp
    whole = shape[axis]
    assert whole % parts == 0 or name == _HEAD, (name, shape, parts)
    size = -(-whole // parts)
    first = rank // (tp // parts) * size
    return min(first, whole), min(first + size, whole)


def rank_shape(config: ModelConfig, name: str, shape: Shape, tp: int) -> Shape:
    """The shape of parameter `name` on one rank of `tp`; it is the same on all. Raises WeightsError as `check_tp`."""
    axis = shard_axis(config, name)
    if axis is None:
        check_tp(config, tp)
        return shape
    first, stop = rank_span(config, name, shape, tp, 0)
    return (*shape[:axis], stop - first, *shape[axis + 1 :])


def rank_targets(config: ModelConfig, tp: int) -> dict[str, Shape]:
    """Our parameters and their shapes on one rank of `tp`, in the order in which they are stored. Raises as `check_tp`."""
    return {name: rank_shape(config, name, shape, tp) for name, shape in targets(config).items()}


def rank_parameters(config: ModelConfig, tp: int) -> int:
    """Parameters that one rank of `tp` holds. Raises WeightsError as `check_tp`."""
    return sum(map(math.prod, rank_targets(config, tp).values()))


def _faults(config: ModelConfig, tp: int) -> Iterator[str]:
    """What cannot be cut into `tp` equal parts."""
    for name, size in _sizes(config):
        if size % tp:
            yield f"{size} {name} do not divide among {tp} ranks"
    kv_heads = config.text.kv_heads
    if kv_heads % tp and tp % kv_heads:
        yield f"{kv_heads} key-value heads neither divide among {tp} ranks nor the ranks among them"


def _sizes(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """What has to divide. A tower's width does where its heads do."""
    text, vision = config.text, config.vision
    yield "attention heads", text.heads
    yield "rows of the MLP", text.intermediate_size
    yield "columns of the embedding table", text.hidden_size
    yield "attention heads of the vision tower", vision.heads
    yield "rows of the vision tower's MLP", vision.intermediate_size
    if isinstance(vision, ResampledConfig):
        yield "attention heads of the resampler", vision.resampler_heads

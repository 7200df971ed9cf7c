"""How our parameters are cut among the ranks of a tensor-parallel model.

q, k, v, gate, up and lm_head are cut by output features (axis 0), with their biases; o and down by input features (axis 1),
so that their products are summed over ranks. Keys and values of pictures are cut like those of the text. Everything else,
the vision tower and the embedding table too, is whole on every rank. Heads stay together, and each cut is contiguous. Where
there are fewer key-value heads than ranks, neighbouring ranks hold the same head.

A cut is made before a weight is quantised: blocks of 8-bit weights run along a row, and a cut need not fall between two.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from ..model_defs.config import ModelConfig
from .names.rule import Shape
from .rules import targets
from .tensors import WeightsError

_OUTPUT = re.compile(
    r"text\.layers\.\d+\.(?:attn\.[qkv]\.(?:weight|bias)|mlp\.(?:gate|up)\.weight)|text\.lm_head\.weight|cross\.\d+\.[kv]\.weight"
)
_INPUT = re.compile(r"text\.layers\.\d+\.(?:attn\.o|mlp\.down)\.weight")
_KEYS_VALUES = re.compile(r"(?:text\.layers\.\d+\.attn|cross\.\d+)\.[kv]\.(?:weight|bias)")


def shard_axis(name: str) -> Literal[0, 1] | None:
    """The axis along which parameter `name` is cut; None: every rank holds all of it."""
    assert not name.endswith((".qweight", ".scales")), f"{name}: cut before quantising"
    if _OUTPUT.fullmatch(name):
        return 0
    return 1 if _INPUT.fullmatch(name) else None


def check_tp(config: ModelConfig, tp: int) -> None:
    """Raise WeightsError unless the decoder can be cut into `tp` equal parts."""
    text = config.text
    if tp < 1:
        raise WeightsError(f"tensor parallelism {tp}; expected a number of ranks from 1 on")
    for name, size in (
        ("attention heads", text.heads),
        ("rows of the MLP", text.intermediate_size),
        ("rows of lm_head", text.vocab_size),
    ):
        if size % tp:
            raise WeightsError(f"{size} {name} do not divide among {tp} ranks; choose a number of ranks that divides {size}")
    if text.kv_heads % tp and tp % text.kv_heads:
        raise WeightsError(
            f"{text.kv_heads} key-value heads neither divide among {tp} ranks nor the ranks among them; choose a number of "
            f"ranks that divides {text.kv_heads} or is a multiple of it"
        )


def rank_span(config: ModelConfig, name: str, shape: Shape, tp: int, rank: int) -> tuple[int, int]:
    """What `rank` of `tp` holds of parameter `name` along its `shard_axis`: first row or column, and behind the last.

    Raises WeightsError as `check_tp`; `name` has to be cut.
    """
    check_tp(config, tp)
    axis = shard_axis(name)
    assert axis is not None and 0 <= rank < tp, (name, rank)
    parts = min(tp, config.text.kv_heads) if _KEYS_VALUES.fullmatch(name) else tp
    size = shape[axis] // parts
    first = rank // (tp // parts) * size
    return first, first + size


def rank_shape(config: ModelConfig, name: str, shape: Shape, tp: int) -> Shape:
    """The shape of parameter `name` on one rank of `tp`; it is the same on all. Raises WeightsError as `check_tp`."""
    axis = shard_axis(name)
    if axis is None:
        check_tp(config, tp)
        return shape
    first, stop = rank_span(config, name, shape, tp, 0)
    return (*shape[:axis], stop - first, *shape[axis + 1 :])


def rank_parameters(config: ModelConfig, tp: int) -> int:
    """Parameters that one rank of `tp` holds. Raises WeightsError as `check_tp`."""
    return sum(math.prod(rank_shape(config, name, shape, tp)) for name, shape in targets(config).items())

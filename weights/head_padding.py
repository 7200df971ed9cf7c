"""Heads of vision towers and resamplers in artifacts for Ascend: widths that its attention takes, multiples of 16.

A head of another width is filled up with zeros, which change no score and no sum:

    attn.q, attn.k, attn.v   rows (out features) of zeros after those of each head, of weights and of biases
    attn.o                   columns (in features) of zeros, of weights

The scale of attention stays that of the true width. Weights are sharded and quantised before; the numbers and the scales of
added rows are 0. Heads of the decoder stay as they are, since a cache holds them (compiler/emit_ascend.py refuses others).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..model_defs.config import ModelConfig, ResampledConfig
from .names.rule import Shape

MULTIPLE = 16
_PART = re.compile(r"(pool|vision\.(?:global_)?layers\.\d+)\.attn\.([qkvo])\.(weight|bias|qweight|scales)")


def padded_width(width: int) -> int:
    """The width of a head of `width` elements after it is filled up."""
    return -(-width // MULTIPLE) * MULTIPLE


def head_width(config: ModelConfig, name: str) -> int:
    """The true width of the heads that the parameter, or stored part, `name` has rows or columns of; 0 if it has none."""
    match, vision = _PART.fullmatch(name), config.vision
    if match is None or head_axis(name) is None:
        return 0
    if match[1] != "pool":
        return vision.hidden_size // vision.heads
    assert isinstance(vision, ResampledConfig), name
    return vision.output_size // vision.resampler_heads


def head_axis(name: str) -> int | None:
    """The axis of a parameter, or stored part, along which heads follow one another; None: it has none.

    The numbers of whole-number products, the only quantised ones here, are stored transposed.
    """
    match = _PART.fullmatch(name)
    if match is None:
        return None
    transposed = match[3] == "qweight"
    if match[2] != "o":
        return int(transposed)
    return {"weight": 1, "qweight": 0}.get(match[3])


def padded_shape(name: str, shape: Shape, width: int) -> Shape:
    """The shape of a parameter, or stored part, after its heads of `width` are filled up; 0: it has none."""
    axis = head_axis(name)
    if axis is None or not width:
        return shape
    return (*shape[:axis], shape[axis] // width * padded_width(width), *shape[axis + 1 :])


def padded_shapes(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Parameters and their shapes after heads are filled up, in the order of `shapes`."""
    return {name: padded_shape(name, shape, head_width(config, name)) for name, shape in shapes.items()}

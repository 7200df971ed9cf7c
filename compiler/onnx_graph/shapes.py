"""Lowerings of norms, activations, gathers, masks, top-k, and of the aten ops that models use for reshaping and adding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto
from torch.fx import Node

from .emitter import CONTRIB, DTYPES, Emitter, lowers, shape_of, slice_along

TOP_BLOCK = 128  # of a row of logits, when its largest are looked for


@lowers("staticvl.rms_norm")
def _rms_norm(e: Emitter, node: Node, x: str, weight: str, eps: float) -> str:
    return e.node("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=eps)


@lowers("staticvl.layer_norm")
def _layer_norm(e: Emitter, node: Node, x: str, weight: str, bias: str, eps: float) -> str:
    return e.node("LayerNormalization", [x, weight, bias], axis=-1, epsilon=eps)


@lowers("staticvl.silu_mul")
def _silu_mul(e: Emitter, node: Node, gate: str, up: str) -> str:
    return e.node("Mul", [e.node("QuickGelu", [gate], domain=CONTRIB, alpha=1.0), up])


@lowers("staticvl.gelu")
def _gelu(e: Emitter, node: Node, x: str) -> str:
    return e.node("Gelu", [x])


@lowers("staticvl.quick_gelu")
def _quick_gelu(e: Emitter, node: Node, x: str) -> str:
    return e.node("QuickGelu", [x], domain=CONTRIB, alpha=1.702)


@lowers("staticvl.embed", upcasts=True)
def _embed(e: Emitter, node: Node, token_ids: str, table: str) -> str:
    if table not in e.narrow:
        return e.node("Gather", [table, token_ids], axis=0)
    return e.node("Cast", [e.node("Gather", [e.rows(table), token_ids], axis=0)], to=TensorProto.FLOAT)


@lowers("staticvl.merge_rows")
def _merge_rows(e: Emitter, node: Node, x: str, rows: str, index: str) -> str:
    zero = e.constant(0, "int32")
    from_image = e.node("Gather", [rows, e.node("Max", [index, zero])], axis=0)
    is_text = e.node("Unsqueeze", [e.node("Less", [index, zero]), e.constant([-1])])
    return e.node("Where", [is_text, x, from_image])


@lowers("staticvl.take_token")
def _take_token(e: Emitter, node: Node, x: str, index: str) -> str:
    b, t, c = shape_of(node.args[0])  # type: ignore[arg-type]
    flat = e.node("Reshape", [x, e.constant([b * t, c])])
    if b > 1:
        index = e.node("Add", [index, e.constant(np.arange(b) * t, "int32")])
    return e.node("Gather", [flat, index], axis=0)


@lowers("staticvl.top_tokens")
def _top_tokens(e: Emitter, node: Node, logits: str, inverse_temperature: str, count: int) -> tuple[str, str, str]:
    """In two steps, so that no long row is sorted: the blocks with the largest maxima, then the largest logits in them."""
    rows, vocab = shape_of(node.args[0])  # type: ignore[arg-type]
    if vocab <= 2 * count * TOP_BLOCK:
        values, ids = e.node("TopK", [logits, e.constant([count])], outputs=2)
    else:
        values, ids = _of_blocks(e, logits, rows, vocab, count)
    largest = slice_along(e, values, 1, 0, 1)
    factor = e.node("Reshape", [inverse_temperature, e.constant([-1, 1])])
    shares = e.node("Exp", [e.node("Mul", [e.node("Sub", [logits, largest]), factor])])
    return values, e.node("Cast", [ids], to=TensorProto.INT32), e.node("ReduceSum", [shares, e.constant([-1])], keepdims=0)


def _of_blocks(e: Emitter, logits: str, rows: int, vocab: int, count: int) -> tuple[str, str]:
    """The `count` largest of each row lie in the `count` blocks with the largest maxima, whichever of equals are taken."""
    blocks, missing, block = math.ceil(vocab / TOP_BLOCK), -vocab % TOP_BLOCK, e.constant(TOP_BLOCK)
    if missing:
        logits = e.node("Pad", [logits, e.constant([0, 0, 0, missing]), e.constant(-math.inf, "float32")])
    parts = e.node("Reshape", [logits, e.constant([rows * blocks, TOP_BLOCK])])
    maxima = e.node("Reshape", [e.node("ReduceMax", [parts, e.constant([-1])], keepdims=0), e.constant([rows, blocks])])
    _, chosen = e.node("TopK", [maxima, e.constant([count])], outputs=2, sorted=0)  # [R, count]
    place = e.node("Add", [chosen, e.constant(np.arange(rows)[:, None] * blocks)]) if rows > 1 else chosen
    values = e.node("Reshape", [e.node("Gather", [parts, place], axis=0), e.constant([rows, count * TOP_BLOCK])])
    values, place = e.node("TopK", [values, e.constant([count])], outputs=2)
    of = e.node("GatherElements", [chosen, e.node("Div", [place, block])], axis=1)
    return values, e.node("Add", [e.node("Mul", [of, block]), e.node("Mod", [place, block])])


@lowers("staticvl.mask_tiles")
def _mask_tiles(e: Emitter, node: Node, x: str, tile_count: str) -> str:
    shape = shape_of(node)
    used = e.node("Less", [e.constant(np.arange(shape[0]), "int32"), tile_count])
    factor = e.node("Cast", [e.node("Reshape", [used, e.constant([shape[0], *[1] * (len(shape) - 1)])])], to=TensorProto.FLOAT)
    return e.node("Mul", [x, factor])


@lowers("staticvl.tile_padding")
def _tile_padding(e: Emitter, node: Node, tile_count: str, tiles: int, rows: int, padded_rows: int) -> str:
    unused = e.node("GreaterOrEqual", [e.constant(np.arange(tiles)[:, None], "int32"), tile_count])  # [tiles, 1]
    past_end = e.constant((np.arange(padded_rows) >= rows)[None], "bool")
    padding = e.node("Cast", [e.node("Or", [unused, past_end])], to=TensorProto.FLOAT)
    return e.node("Reshape", [padding, e.constant(shape_of(node))])


@lowers("staticvl.pad_rows")
def _pad_rows(e: Emitter, node: Node, x: str, rows: int) -> str:
    return e.node("Pad", [x, e.constant([0, 0, 0, 0, rows - shape_of(node.args[0])[1], 0])])  # type: ignore[arg-type]


@lowers("aten.add.Tensor")
def _add(e: Emitter, node: Node, a: str, b: str) -> str:
    return e.node("Add", [a, b])


@lowers("aten.mul.Tensor")
def _mul(e: Emitter, node: Node, a: str, b: str) -> str:
    return e.node("Mul", [a, b])


@lowers("aten.reshape.default", "aten.view.default", "aten.flatten.using_ints", "aten.unsqueeze.default")
def _reshape(e: Emitter, node: Node, x: str, *_: Any) -> str:
    return e.node("Reshape", [x, e.constant(shape_of(node))])


@lowers("aten.expand.default")
def _expand(e: Emitter, node: Node, x: str, *_: Any) -> str:
    return e.node("Expand", [x, e.constant(shape_of(node))])


@lowers("aten.permute.default")
def _permute(e: Emitter, node: Node, x: str, dims: Sequence[int]) -> str:
    return e.node("Transpose", [x], perm=list(dims))


@lowers("aten.cat.default")
def _cat(e: Emitter, node: Node, parts: Sequence[str], dim: int = 0) -> str:
    return e.node("Concat", list(parts), axis=dim)


@lowers("aten.slice.Tensor")
def _slice_tensor(e: Emitter, node: Node, x: str, dim: int = 0, start: int | None = None, end: int | None = None) -> str:
    whole = shape_of(node.args[0])[dim]  # type: ignore[arg-type]
    start, end = start or 0, min(whole if end is None else end, whole)
    return x if (start, end) == (0, whole) else slice_along(e, x, dim, start, end)


@lowers("aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout")
def _to(e: Emitter, node: Node, x: str, *_: Any, **__: Any) -> str:
    return e.node("Cast", [x], to=DTYPES[str(node.meta["val"].dtype).removeprefix("torch.")])

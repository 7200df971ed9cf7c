"""Lowerings of attention: over the KV cache, within a vision tower, and across to images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch.fx import Node

from ...runtime.artifact import TensorSpec
from .emitter import CONTRIB, Emitter, lowers, shape_of, slice_along

# Squared and divided by the root of a head's width, it is far larger than any score, and its own products stay exact.
PADDING_FLAG = 1024.0


@lowers("staticvl.rope")
def _rope(e: Emitter, node: Node, x: str, cos: str, sin: str) -> str:
    d = shape_of(node.args[1])[-1]  # type: ignore[arg-type]
    heads = shape_of(node)[-1] // d
    half = [e.once(("half", table), lambda table=table: slice_along(e, table, -1, 0, d // 2)) for table in (cos, sin)]
    return e.node("RotaryEmbedding", [x, *half], num_heads=heads)


@lowers("staticvl.cached_attention")
def _cached_attention(
    e: Emitter, node: Node, q: str, k: str, v: str, k_cache: str, v_cache: str, lengths: str, heads: int
) -> tuple[str, ...]:
    return _group_query_attention(e, node, [q, k, v], [k_cache, v_cache], lengths, heads=heads)


@lowers("staticvl.int8_cached_attention")
def _int8_cached_attention(e: Emitter, node: Node, *values: Any) -> tuple[str, ...]:
    q, k, v, k_cache, v_cache, k_scale, v_scale, lengths, heads = values
    scales = ["", "", "", "", "", k_scale, v_scale]  # inputs between are left out
    quantised = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    return _group_query_attention(e, node, [q, k, v], [k_cache, v_cache], lengths, heads=heads, scales=scales, **quantised)


def _group_query_attention(
    e: Emitter,
    node: Node,
    rows: Sequence[str],
    caches: Sequence[str],
    lengths: str,
    *,
    heads: int,
    scales: Sequence[str] = (),
    **quantised: Any,
) -> tuple[str, ...]:
    """`rows`: q, k, v. `scales`, `quantised`: further inputs and attributes for caches in 8 bits."""
    t, shape = shape_of(node.args[0])[1], shape_of(node.args[3])  # type: ignore[arg-type]
    dtype = str(node.args[3].meta["val"].dtype).removeprefix("torch.")  # type: ignore[union-attr]
    step = e.kernels.attention_tokens or t
    edges = [*range(0, t, step), t]
    pieces = [_pieces(e, x, edges) for x in rows]
    own, out = caches, []
    for i, end in enumerate(edges[1:]):
        # The operator wants the index of the last key of each row, and the largest number of keys of any row.
        last = e.once(("last", lengths, end), lambda end=end: _last_key(e, lengths, end))
        total = e.once(("total", last), lambda last=last: _most_keys(e, last))
        attributes = {"num_heads": heads, "kv_num_heads": shape[1], **quantised}
        # Caches between pieces are outputs too, so that they can be bound to the memory of the caches.
        names = [f"{name}.out@{i}" for name in own] if end < t else []
        e.between += [TensorSpec(name=name, dtype=dtype, shape=shape) for name in names]
        inputs = [*(x[i] for x in pieces), *caches, last, total, *scales]
        part, *caches = e.node("GroupQueryAttention", inputs, domain=CONTRIB, outputs=3, names=names, **attributes)
        out.append(part)
    return (out[0] if len(out) == 1 else e.node("Concat", out, axis=1)), *caches


def _pieces(e: Emitter, x: str, edges: Sequence[int]) -> Sequence[str]:
    """x [B, T, C] cut along T."""
    sizes = [end - start for start, end in pairwise(edges)]
    return e.node("Split", [x, e.constant(sizes)], outputs=len(sizes), axis=1) if len(sizes) > 1 else [x]


def _last_key(e: Emitter, lengths: str, tokens: int) -> str:
    return e.node("Add", [lengths, e.constant(tokens - 1, "int32")]) if tokens > 1 else lengths


def _most_keys(e: Emitter, last: str) -> str:
    return e.node("Add", [e.node("ReduceMax", [last], keepdims=0), e.constant(1, "int32")])


@lowers("staticvl.attention")
def _attention(e: Emitter, node: Node, q: str, k: str, v: str, heads: int) -> str:
    return e.node("MultiHeadAttention", [q, k, v], domain=CONTRIB, num_heads=heads)


@lowers("staticvl.padded_attention")
def _padded_attention(e: Emitter, node: Node, q: str, k: str, v: str, padding: str, heads: int) -> str:
    """One more element per head, c in queries and -c in keys that are padding, lowers the score of padding for padding by c^2
    and leaves every other score as it is. So the kernel needs no mask of tokens x tokens, and may work block by block."""
    b, t, c = shape_of(node.args[0])  # type: ignore[arg-type]
    d = c // heads
    q, k = (_with_flag(e, x, padding, sign * PADDING_FLAG, (b, t, heads, d)) for x, sign in ((q, 1), (k, -1)))
    return e.node("MultiHeadAttention", [q, k, v], domain=CONTRIB, num_heads=heads, scale=d**-0.5)


def _with_flag(e: Emitter, x: str, padding: str, value: float, shape: tuple[int, ...]) -> str:
    b, t, heads, d = shape

    def flag() -> str:
        column = e.node("Mul", [e.node("Reshape", [padding, e.constant([b, t, 1, 1])]), e.constant(value, "float32")])
        return e.node("Expand", [column, e.constant([b, t, heads, 1])])

    parts = [e.node("Reshape", [x, e.constant(shape)]), e.once(("flag", padding, value), flag)]
    return e.node("Reshape", [e.node("Concat", parts, axis=-1), e.constant([b, t, heads * (d + 1)])])


@lowers("staticvl.cross_attention")
def _cross_attention(e: Emitter, node: Node, q: str, keys: Sequence[str], values: Sequence[str], mask: str, heads: int) -> str:
    """Image by image, so that keys are read in place: only scores are joined, under one softmax."""
    b, t, c = shape_of(node.args[0])  # type: ignore[arg-type]
    kv_heads, rows, d = shape_of(node.args[1][0])[1:]  # type: ignore[arg-type, index]
    tiles = shape_of(node.args[3])[-1] // len(keys)  # type: ignore[arg-type]
    group = heads // kv_heads
    queries = e.node("Reshape", [q, e.constant([b, t, kv_heads, group, d])])
    queries = e.node("Transpose", [queries], perm=[0, 2, 3, 1, 4])
    queries = e.node("Reshape", [queries, e.constant([b, kv_heads, group * t, d])])
    scores = []
    for j, key in enumerate(keys):
        score = e.node("FusedMatMul", [queries, key], domain=CONTRIB, transB=1, alpha=d**-0.5)
        score = e.node("Reshape", [score, e.constant([b, kv_heads, group, t, tiles, rows // tiles])])
        score = e.node("Add", [score, _tile_bias(e, mask, (b, t, tiles), j)])
        scores.append(e.node("Reshape", [score, e.constant([b, kv_heads, group * t, rows])]))
    weights = e.node("Softmax", [e.node("Concat", scores, axis=-1) if len(scores) > 1 else scores[0]], axis=-1)
    out = ""
    for j, value in enumerate(values):
        of_image = slice_along(e, weights, -1, j * rows, (j + 1) * rows) if len(values) > 1 else weights
        part = e.node("MatMul", [of_image, value])
        out = e.node("Add", [out, part]) if out else part
    out = e.node("Reshape", [out, e.constant([b, kv_heads, group, t, d])])
    return e.node("Reshape", [e.node("Transpose", [out], perm=[0, 3, 1, 2, 4]), e.constant([b, t, c])])


def _tile_bias(e: Emitter, mask: str, shape: tuple[int, int, int], image: int) -> str:
    """The part of the mask that is added to the scores of one image: [B, 1, 1, T, tiles, 1], the same for all layers."""
    b, t, tiles = shape

    def make() -> str:
        part = slice_along(e, mask, -1, image * tiles, (image + 1) * tiles)
        return e.node("Reshape", [part, e.constant([b, 1, 1, t, tiles, 1])])

    return e.once(("bias", mask, image), make)

"""Fused attention over a KV cache.

Sources: the operator definition in torchair's auto_generated_ge_raw_ops.py, its shape function in
torchair/ops/_npu_fused_infer_attention_score.py, and the public page of torch_npu.npu_fused_infer_attention_score.

Shapes: B rows, N query heads, K kv heads, Q queries, S keys, D head dim.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .pages import check_pages, gathered
from .reduce import upcast
from .registry import HALVES, NodeContext, UnsupportedError, ge_op, integers, same_dtypes

ALL_TOKENS = 2147483647  # pre_tokens and next_tokens that hide nothing
COMPRESSED = 2048  # rows and columns of the compressed mask, which stands for any causal one
MAX_INT8_QUERIES = 16  # of a row, over keys and values of int8
DEFAULT, ALL, LEFT_UP, RIGHT_DOWN, BAND = range(5)  # sparse_mode
LAYOUTS = ("BNSD", "BSND", "BSH")


@ge_op(
    "FusedInferAttentionScore",
    antiquant_mode=0,
    key_antiquant_mode=0,
    value_antiquant_mode=0,
    query_quant_mode=0,
    pse_type=0,
    out_dtype=0,
)
def fused_infer_attention_score(
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    num_heads: int,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    softmax_lse_flag: bool = False,
    block_size: int = 0,
    context: NodeContext,
) -> tuple[Tensor, Tensor]:
    """softmax(query key^T scale, hidden keys left out) value, and with softmax_lse_flag the logarithm of each softmax's sum.

    The input layout is BNSD, BSND or BSH (heads and head dim in one axis); `X_Y` gives the result of several queries in
    layout Y. Query head n attends with kv head n // (N / K). Row b has actual_seq_lengths[b] queries and
    actual_seq_lengths_kv[b] keys (one number stands for all rows; none, for as many as there are): queries after that give
    zeros, keys after it are never read.

    sparse_mode says which keys query t of q sees among s, besides atten_mask, where 1 hides:
        0  those that the mask leaves, or all without a mask
        1  as 0, the mask being required
        2  keys 0 .. t
        3  keys 0 .. t + s - q
        4  keys t + s - q - pre_tokens .. t + s - q + next_tokens
    Modes 2 to 4 want the mask of [2048, 2048] with ones above the diagonal. For one query per row the device takes another
    kernel, which knows no sparse_mode: modes 2 and 4, which mean something there, are refused.

    Keys and values may be int8 in the layout BNSD: they are multiplied by the scales of their channels (antiquant modes 0),
    which have query's type, and so dequantised to it, rounding once. One query per row takes scales [1, K, 1, D]; up to 16 take
    scales [K, 1, D], [K, D] or [K * D], in bfloat16 alone.

    With block_table keys and values lie in pages of block_size positions (see pages.py), whatever the layout.

    inner_precise (0 to 3) trades accuracy for speed and is the same here. A query that sees no key gives zeros, and an lse of
    inf, in all of its modes; a device promises that for 2 and 3 only.
    """
    layout, out_layout = _layouts(input_layout)
    _check_numbers(inner_precise, block_size, paged=block_table is not None)
    kv_heads, kv_layout = num_key_value_heads or num_heads, layout
    if block_table is not None:
        check_pages(query, layout, key, block_table, block_size, actual_seq_lengths_kv)
        key, value = ([gathered(pages, block_table, block_size, kv_heads, layout) for pages in each] for each in (key, value))
        kv_layout = "BNSD"
    if key_antiquant_scale is not None or value_antiquant_scale is not None:
        key = [_dequantised(query, key, key_antiquant_scale, "key")]
        value = [_dequantised(query, value, value_antiquant_scale, "value")]
    q, k, v = _operands(query, key, value, (layout, kv_layout), (num_heads, kv_heads), context)
    if out_layout and q.shape[2] == 1:
        raise UnsupportedError(
            f"attribute input_layout = {input_layout!r} with one query is not supported; expected {layout!r}"
        )
    queries = _lengths(actual_seq_lengths, "actual_seq_lengths", q.shape[0], q.shape[2])
    keys = _lengths(actual_seq_lengths_kv, "actual_seq_lengths_kv", q.shape[0], k.shape[2])
    _check_tokens(sparse_mode, pre_tokens, next_tokens)
    mask = _mask(atten_mask, sparse_mode, (q.shape[0], q.shape[2], k.shape[2]))
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = torch.full((*q.shape[:3], 1), torch.inf)
    for b, (count, length) in enumerate(zip(queries, keys, strict=True)):
        hidden = _hidden(sparse_mode, count, length, pre_tokens, next_tokens)
        if mask is not None:
            hidden = hidden | mask[b, :count, :length]
        rows = (q[b, :, :count], k[b, :, :length], v[b, :, :length])
        out[b, :, :count], lse[b, :, :count] = _attend(*rows, hidden, scale)
    return _to_layout(out, out_layout or layout), lse if softmax_lse_flag else torch.empty(context.node.outputs[1].shape or 0)


def _layouts(input_layout: str) -> tuple[str, str]:
    """The layout of query, and that of the result where it is another one; else ""."""
    layout, _, out_layout = input_layout.partition("_")
    if layout not in LAYOUTS or (out_layout or layout) not in LAYOUTS:
        raise UnsupportedError(f"attribute input_layout = {input_layout!r} is not supported; expected one of {LAYOUTS}")
    return layout, out_layout


def _check_numbers(inner_precise: int, block_size: int, *, paged: bool) -> None:
    if inner_precise not in (0, 1, 2, 3):
        raise UnsupportedError(f"attribute inner_precise = {inner_precise} is not supported; expected 0 to 3")
    if block_size and not paged:
        raise UnsupportedError(f"attribute block_size = {block_size} is not supported; only 0 is, without block_table")


def _dequantised(query: Tensor, tensors: list[Tensor], scale: Tensor | None, name: str) -> Tensor:
    """Keys or values [B, K, S, D] of int8, dequantised to query's type. Layouts other than BNSD are not simulated."""
    (numbers,) = tensors
    if numbers.dtype != torch.int8 or scale is None or scale.dtype != query.dtype:
        raise UnsupportedError(
            f"{name} is {numbers.dtype} with an antiquant scale of {'nothing' if scale is None else scale.dtype}; expected "
            f"torch.int8 and query's {query.dtype}"
        )
    if query.dim() != 4 or tuple(scale.shape) not in _channel_shapes(query.shape[2], numbers):
        raise UnsupportedError(
            f"antiquant scale {list(scale.shape)} of {name} {list(numbers.shape)} with query {list(query.shape)}; expected "
            f"BNSD, and [1, K, 1, D] for one query per row, or [K, 1, D], [K, D] or [K * D] for 2 to {MAX_INT8_QUERIES}"
        )
    if query.shape[2] > 1 and query.dtype == torch.float16:
        raise UnsupportedError(f"query {list(query.shape)} in float16; several queries over {name} in int8 take bfloat16 alone")
    return (numbers.float() * upcast(scale).reshape(numbers.shape[1], 1, numbers.shape[3])).to(query.dtype)


def _channel_shapes(queries: int, numbers: Tensor) -> list[tuple[int, ...]]:
    """Shapes that scales of the channels of numbers [B, K, S, D] may have."""
    heads, width = numbers.shape[1], numbers.shape[3]
    if queries == 1:
        return [(1, heads, 1, width)]
    return [(heads, 1, width), (heads, width), (heads * width,)] if queries <= MAX_INT8_QUERIES else []


def _operands(
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    layouts: tuple[str, str],
    head_counts: tuple[int, int],
    context: NodeContext,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, N, Q, D], key [B, K, S, D] and value of any layouts, one of query and one of key and value."""
    (layout, kv_layout), (heads, kv_heads) = layouts, head_counts
    if len(key) != 1 or len(value) != 1:
        raise UnsupportedError(f"{len(key)} keys and {len(value)} values are not supported; expected one tensor of each")
    same_dtypes(query=query, key=key[0], value=value[0])
    if not context.wide and query.dtype not in HALVES:
        raise UnsupportedError(f"query is {query.dtype}; the operator takes float16 and bfloat16")
    q, k, v = _to_bnsd(query, layout, heads), _to_bnsd(key[0], kv_layout, kv_heads), _to_bnsd(value[0], kv_layout, kv_heads)
    if heads % kv_heads or k.shape[:3] != v.shape[:3] or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise UnsupportedError(
            f"query {list(query.shape)} with {heads} heads does not fit key {list(key[0].shape)} and value "
            f"{list(value[0].shape)} with {kv_heads}"
        )
    return q, k, v


def _to_bnsd(x: Tensor, layout: str, heads: int) -> Tensor:
    """Any layout -> BNSD."""
    if x.dim() != len(layout):
        raise UnsupportedError(f"{list(x.shape)} does not have the layout {layout}")
    if layout == "BSH":
        if x.shape[2] % heads:
            raise UnsupportedError(f"{list(x.shape)} cannot be split into {heads} heads")
        x = x.unflatten(2, (heads, -1))
    x = x if layout == "BNSD" else x.transpose(1, 2)
    if x.shape[1] != heads:
        raise UnsupportedError(f"{list(x.shape)} (as BNSD) does not have {heads} heads")
    return x


def _to_layout(x: Tensor, layout: str) -> Tensor:
    """BNSD -> any layout."""
    if layout == "BNSD":
        return x
    x = x.transpose(1, 2).contiguous()
    return x.flatten(2) if layout == "BSH" else x


def _lengths(tensor: Tensor | None, name: str, rows: int, most: int) -> list[int]:
    """True lengths, one per row."""
    if tensor is None:
        return [most] * rows
    lengths = integers(tensor)
    lengths = lengths * rows if len(lengths) == 1 else lengths
    if tensor.dtype != torch.int64:
        raise UnsupportedError(f"input {name} is {tensor.dtype}; the operator takes int64")
    if len(lengths) != rows or any(not 0 <= length <= most for length in lengths):
        raise UnsupportedError(f"input {name} = {lengths}; expected {rows} numbers from 0 to {most}")
    return lengths


def _check_tokens(mode: int, before: int, after: int) -> None:
    """Raise UnsupportedError for limits of tokens in modes 0 and 1. Modes 2 and 3 ignore them, as documented."""
    if mode in (DEFAULT, ALL) and (before, after) != (ALL_TOKENS, ALL_TOKENS):
        raise UnsupportedError(f"attributes pre_tokens = {before}, next_tokens = {after} are supported in sparse_mode 4 only")


def _mask(mask: Tensor | None, mode: int, sizes: tuple[int, int, int]) -> Tensor | None:
    """The mask as bool [B, Q, S]; None where there is none to apply."""
    rows, queries, keys = sizes
    if mode not in (DEFAULT, ALL, LEFT_UP, RIGHT_DOWN, BAND):
        raise UnsupportedError(f"attribute sparse_mode = {mode} is not supported; expected 0 to 4")
    if mask is None:
        if mode != DEFAULT:
            raise UnsupportedError(f"attribute sparse_mode = {mode} needs input atten_mask")
        return None
    if mask.dtype not in (torch.bool, torch.int8, torch.uint8):
        raise UnsupportedError(f"input atten_mask is {mask.dtype}; expected bool, int8 or uint8")
    if mode not in (DEFAULT, ALL):
        _check_compressed(mask, mode, queries)
        return None
    return _expanded_mask(mask.bool(), rows, queries, keys)


def _expanded_mask(mask: Tensor, rows: int, queries: int, keys: int) -> Tensor:
    """A mask of any allowed shape -> [B, Q, S]."""
    shape = tuple(mask.shape)
    whole = (queries, keys)
    allowed = [whole, (1, *whole), (rows, *whole), (1, 1, *whole), (rows, 1, *whole)]
    if shape in allowed:
        return mask.reshape(-1, *whole).expand(rows, *whole)
    if queries == 1 and shape == (rows, keys):
        return mask[:, None]
    raise UnsupportedError(f"input atten_mask has the shape {list(shape)}; expected one of {', '.join(map(str, allowed))}")


def _check_compressed(mask: Tensor, mode: int, queries: int) -> None:
    if tuple(mask.shape) not in (_SQUARE, (1, *_SQUARE), (1, 1, *_SQUARE)):
        raise UnsupportedError(f"input atten_mask has the shape {list(mask.shape)}; sparse_mode {mode} takes {list(_SQUARE)}")
    if not _is_upper_triangle(mask):
        raise UnsupportedError(f"input atten_mask: sparse_mode {mode} takes ones above the diagonal and zeros elsewhere")
    if queries == 1 and mode != RIGHT_DOWN:
        raise UnsupportedError(f"attribute sparse_mode = {mode} has no effect on a device where there is one query")


_SQUARE = (COMPRESSED, COMPRESSED)
# Masks with the right values, at their versions: all layers take the same one, and four million values take milliseconds.
_compressed_masks = WeakIdKeyDictionary()


def _is_upper_triangle(mask: Tensor) -> bool:
    version = None if mask.is_inference() else mask._version  # inference tensors have none
    if version is not None and _compressed_masks.get(mask) == version:
        return True
    right = torch.equal(mask.reshape(_SQUARE).bool(), _upper_triangle())
    if right and version is not None:
        _compressed_masks[mask] = version
    return right


@functools.cache
def _upper_triangle() -> Tensor:
    return torch.ones(_SQUARE, dtype=torch.bool).triu(1)


def _hidden(mode: int, queries: int, keys: int, before: int, after: int) -> Tensor:
    """The keys that the mode hides from each query: bool [Q, S]."""
    own = torch.arange(queries)[:, None] + (0 if mode == LEFT_UP else keys - queries)  # the key of each query's position
    place = torch.arange(keys)
    if mode in (DEFAULT, ALL):
        return torch.zeros((queries, keys), dtype=torch.bool)
    if mode == BAND:
        return (place < own - before) | (place > own + after)
    return place > own


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [N, Q, D], k and v [K, S, D], hidden [Q, S] -> the result [N, Q, D] and the logarithms [N, Q, 1]."""
    kv_heads = k.shape[0]
    grouped = upcast(q).unflatten(0, (kv_heads, -1))  # [K, N / K, Q, D]
    scores = (grouped @ upcast(k)[:, None].transpose(-1, -2)) * scale
    scores = scores.masked_fill(hidden, -torch.inf)
    all_hidden = hidden.all(-1, keepdim=True)  # all of no keys, too
    weights = scores.softmax(-1).masked_fill(all_hidden, 0)
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(all_hidden, torch.inf)
    return (weights @ upcast(v)[:, None]).flatten(0, 1).to(q.dtype), lse.flatten(0, 1)

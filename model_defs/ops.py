"""The op vocabulary: everything a model may do beyond reshaping, adding and multiplying.

Each op is registered with torch under `staticvl::` and written here once in plain PyTorch; that is its definition and the
numerical reference. A backend lowers the op by name and never sees how it is defined. Ops are functional: the cached
attention returns the updated caches, and a backend is free to write them in place. Two ops are the collectives
of sharded models; a model of one rank has none of them.

Shapes: B rows, T tokens, S cache rows, H query heads, K kv heads, D head dim, C hidden size, N out features; Z pages of P
tokens each, and W pages of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .group import group_of
from .whole_products import whole_product

NAMESPACE = "staticvl"
COLLECTIVES = ("all_reduce", "all_gather")
ROWS_AT_ONCE = 256


DEFINITIONS: dict[str, Callable[..., Any]] = {}  # op name -> the function below


def _op(name: str):
    def register(function: Callable[..., Any]):
        DEFINITIONS[name] = function
        return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())(function)

    return register


@_op("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C] times weight [N, C] transposed, plus bias [N]. A weight of a narrower type is upcast."""
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_op("linear_w8")
def linear_w8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """As `linear`, the weight stored in 8 bits: w = (qweight - 128) * scales, qweight [N, blocks, block], scales [N, blocks].

    `zeros` [N, blocks] uint8: the numbers in place of 128, one for each block. Only the weights are rounded. A kernel may round
    the activations too; a graph's certificate has the error of that.
    """
    return _grouped_linear(x, qweight, scales, bias, middle=128 if zeros is None else zeros, unpack=torch.Tensor.copy_)


@linear_w8.register_fake
def _(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


@_op("linear_w4")
def linear_w4(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """As `linear_w8`, the weight in 4 bits: w = (q - 8) * scales, two q in each of qweight [N, blocks, block / 2], the first in
    the low bits; `zeros` [N, ceil(blocks / 2)] likewise."""
    middle = 8 if zeros is None else _halves(zeros, zeros.new_empty((len(zeros), 2 * zeros.shape[1])))[:, : scales.shape[1]]
    return _grouped_linear(x, qweight, scales, bias, middle=middle, unpack=lambda wide, part: _halves(part, wide), packed=2)


def _halves(packed: Tensor, wide: Tensor) -> Tensor:
    """packed [..., n] uint8 -> both numbers of 4 bits of each, the low bits first, in `wide` [..., 2 * n]."""
    wide[..., 0::2].copy_(packed & 15)
    wide[..., 1::2].copy_(packed >> 4)
    return wide


@linear_w4.register_fake
def _(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _grouped_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    *,
    middle: Tensor | int,
    unpack: Callable[[Tensor, Tensor], Tensor],
    packed: int = 1,
) -> Tensor:
    """A weight with a scale for each block of a row, its numbers around `middle` (a tensor: [N, blocks]): `unpack` fills a
    tensor of floats with stored rows, and `packed` is how many numbers an element of qweight holds."""
    n, blocks, width = qweight.shape
    columns, out = x.shape[-1], x.new_empty((*x.shape[:-1], n))
    # Some rows at a time, in one buffer that stays in the cache: fresh memory for whole weights takes ten times as long.
    buffer = x.new_empty((min(n, ROWS_AT_ONCE), blocks, width * packed))
    for start in range(0, n, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part = qweight[rows]
        zero = middle if isinstance(middle, int) else middle[rows, :, None]
        weight = unpack(buffer[: len(part)], part).sub_(zero).mul_(scales[rows, :, None])
        out[..., start : start + len(part)] = torch.nn.functional.linear(x, weight.flatten(1)[:, :columns])
    return out if bias is None else out + bias


@_op("linear_w8a8")
def linear_w8a8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, rounded: bool) -> Tensor:
    """x [..., K] in 8 bits, each row by its own scale, times qweight [K, N] int8, times both scales, those of columns being
    scales [N] float32; plus bias [N].

    A row's scale is max|x| / 127, and x / scale is rounded to the nearest, halves to even. Integer sums are exact (in
    int32: K is far below 2^31 / 127^2). Without `rounded` x is left as it is and everything is computed in floats.
    """
    if not rounded:
        y = _upcast_product(x, qweight) * scales
    else:
        rows = x.reshape(-1, x.shape[-1]).float()
        row_scales = rows.abs().amax(-1, keepdim=True) / 127
        steps = rows / row_scales.where(row_scales > 0, 1.0)
        total = whole_product(steps.round().to(torch.int8), qweight)
        y = (total.float() * scales * row_scales).view(*x.shape[:-1], -1)
    return (y if bias is None else y + bias).to(x.dtype)


@linear_w8a8.register_fake
def _(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, rounded: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[1]))


def _upcast_product(x: Tensor, qweight: Tensor) -> Tensor:
    """x [..., K] times qweight [K, N], some rows of it at a time."""
    y = x.new_zeros((*x.shape[:-1], qweight.shape[1]))
    for start in range(0, len(qweight), ROWS_AT_ONCE):
        y += x[..., start : start + ROWS_AT_ONCE] @ qweight[start : start + ROWS_AT_ONCE].to(x.dtype)
    return y


@_op("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in float32 (Zhang and Sennrich 2019)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@_op("layer_norm")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the last axis."""
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@_op("silu_mul")
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up."""
    return torch.nn.functional.silu(gate) * up


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@_op("gelu")
def gelu(x: Tensor) -> Tensor:
    """The exact (erf) form."""
    return torch.nn.functional.gelu(x)


@gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_op("quick_gelu")
def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


@quick_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_op("embed")
def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows of table [V, C] for token_ids [B, T] -> [B, T, C]."""
    return torch.nn.functional.embedding(token_ids, table)


@embed.register_fake
def _(token_ids: Tensor, table: Tensor) -> Tensor:
    return table.new_empty((*token_ids.shape, table.shape[1]))


@_op("merge_rows")
def merge_rows(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """x [B, T, C] with position (b, t) replaced by rows[index[b, t]] wherever index [B, T] is not negative."""
    return torch.where((index < 0)[..., None], x, rows[index.clamp(min=0)])


@merge_rows.register_fake
def _(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(x)


@_op("take_token")
def take_token(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, C], index [B] -> [B, C]: one token of each row."""
    return x[torch.arange(x.shape[0], device=x.device), index]


@take_token.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]))


@_op("top_tokens")
def top_tokens(logits: Tensor, inverse_temperature: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k tokens of logits [R, V], from which a token can be drawn without the whole row: the `count` largest, falling, and
    their ids (int32), both [R, count], and the sum of exp((x - largest) * inverse_temperature) over the row, [R] float32.

    inverse_temperature is [R] float32, or [1] for all rows. The order of equals depends on the device, and so
    does the choice among those that equal the smallest.
    """
    wide = logits.float()
    values, ids = wide.topk(count)
    below = (wide - values[:, :1]) * inverse_temperature[:, None]
    return values, ids.int(), below.exp().sum(-1)


@top_tokens.register_fake
def _(logits: Tensor, inverse_temperature: Tensor, count: int):
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    rows = len(logits)
    return empty(rows, count), empty(rows, count, dtype=torch.int32), empty(rows)


@_op("rope")
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-rotation form (Su et al. 2021): x [B, T, H*D], cos and sin [B, T, D] with equal halves."""
    b, t, d = cos.shape
    heads = x.view(b, t, -1, d)
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (heads * cos[:, :, None] + turned * sin[:, :, None]).view(x.shape)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


def _like_query_and_caches(
    q: Tensor, _k: Tensor, _v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of what attention over caches returns."""
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


@_op("cached_attention")
def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Append k, v [B, T, K*D] to the caches [B, K, S, D] at row `lengths` [B] and attend causally with q [B, T, H*D].

    Token t of row b sees cache rows 0 .. lengths[b] + t. Returns (out [B, T, H*D], k_cache, v_cache).
    """
    at = _places(q, lengths)
    k_cache, v_cache = _appended(k_cache, k, at), _appended(v_cache, v, at)
    return _attended(q, k_cache, v_cache, at, heads), k_cache, v_cache


def _places(q: Tensor, lengths: Tensor) -> Tensor:
    """[B, T]: the cache row of each token."""
    return lengths[:, None].long() + torch.arange(q.shape[1], device=q.device)


def _appended(cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """The cache [B, K, S, D] with new [B, T, K*D] in rows `at` [B, T]."""
    b, t = at.shape
    cache = cache.clone()
    cache[torch.arange(b, device=at.device)[:, None], :, at] = new.view(b, t, cache.shape[1], -1).to(cache.dtype)
    return cache


def _attended(q: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor, heads: int) -> Tensor:
    """Causal attention with q [B, T, H*D], whose tokens lie in rows `at` [B, T] of the caches [B, K, S, D]: [B, T, H*D]."""
    b, t, _ = q.shape
    kv_heads, s, d = k_cache.shape[1:]
    visible = torch.arange(s, device=q.device) <= at[..., None]  # [B, T, S]
    queries = q.view(b, t, kv_heads, heads // kv_heads, d)
    scores = torch.einsum("btkgd,bksd->bkgts", queries, k_cache).float() / d**0.5
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1).to(q.dtype)
    # Rows beyond what a token sees may hold anything, and 0 times infinity is not 0.
    values = torch.where((torch.arange(s, device=q.device) <= at.amax(1)[:, None])[:, None, :, None], v_cache, 0)
    return torch.einsum("bkgts,bksd->btkgd", weights, values).reshape(b, t, heads * d)


cached_attention.register_fake(_like_query_and_caches)


@_op("int8_cached_attention")
def int8_cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cached_attention` over caches of int8, whose numbers stand for as many steps of a channel's scale [K, 1, D].

    New keys and values are rounded to the nearest step, halves to even. Values beyond -128 or 127 steps are clipped.
    """
    at = _places(q, lengths)
    k_cache, v_cache = (
        _appended(cache, _steps(new, scale).round(), at) for cache, new, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale))
    )
    return _attended(q, _unscaled(k_cache, k_scale, q), _unscaled(v_cache, v_scale, q), at, heads), k_cache, v_cache


int8_cached_attention.register_fake(_like_query_and_caches)


def attention_over_stored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`int8_cached_attention` without its rounding, for checking it closely; no op of any graph.

    The caches, in float, hold the roundings of k and v already, as a compiled graph has made them; those that are returned hold
    k and v in steps that are not rounded, so that both can be compared.
    """
    at = _places(q, lengths)
    out = _attended(q, _unscaled(k_cache, k_scale, q), _unscaled(v_cache, v_scale, q), at, heads)
    return out, _appended(k_cache, _steps(k, k_scale), at), _appended(v_cache, _steps(v, v_scale), at)


@_op("paged_attention")
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cached_attention` over caches in pages [Z, P, K, D].

    Token t of row b is written at place slot_mapping[b, t] % P of page slot_mapping[b, t] // P. It sees positions 0 ..
    lengths[b] + t of its row, where position p lies at place p % P of page block_table[b, p // P] (block_table [B, W]). A token
    sees itself where the two name the same place; padding may be written elsewhere, several tokens to one place.
    Returns (out [B, T, H*D], k_cache, v_cache).
    """
    k_cache, v_cache = _written(k_cache, k, slot_mapping), _written(v_cache, v, slot_mapping)
    keys, values = _gathered(k_cache, block_table), _gathered(v_cache, block_table)
    return _attended(q, keys, values, _places(q, lengths), heads), k_cache, v_cache


def _written(pages: Tensor, new: Tensor, slot_mapping: Tensor) -> Tensor:
    """The pages [Z, P, K, D] with new [B, T, K*D] at the places `slot_mapping` [B, T]."""
    rows = pages.flatten(0, 1).clone()
    rows[slot_mapping.flatten().long()] = new.reshape(-1, *rows.shape[1:]).to(rows.dtype)
    return rows.view(pages.shape)


def _gathered(pages: Tensor, block_table: Tensor) -> Tensor:
    """The pages [Z, P, K, D] of each row of block_table [B, W], joined as a cache [B, K, W*P, D]."""
    return pages[block_table.long()].flatten(1, 2).transpose(1, 2)


paged_attention.register_fake(_like_query_and_caches)


@_op("int8_paged_attention")
def int8_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `paged_attention` over pages of int8, which are as the caches of `int8_cached_attention`."""
    k_cache, v_cache = (
        _written(cache, _steps(new, scale).round(), slot_mapping)
        for cache, new, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale))
    )
    keys, values = _gathered(k_cache, block_table), _gathered(v_cache, block_table)
    out = _attended(q, _unscaled(keys, k_scale, q), _unscaled(values, v_scale, q), _places(q, lengths), heads)
    return out, k_cache, v_cache


int8_paged_attention.register_fake(_like_query_and_caches)


def attention_over_stored_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`int8_paged_attention` without its rounding, as `attention_over_stored`."""
    keys, values = _gathered(k_cache, block_table), _gathered(v_cache, block_table)
    out = _attended(q, _unscaled(keys, k_scale, q), _unscaled(values, v_scale, q), _places(q, lengths), heads)
    return out, _written(k_cache, _steps(k, k_scale), slot_mapping), _written(v_cache, _steps(v, v_scale), slot_mapping)


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, K*D] in steps of its channels' scales [K, 1, D], as far as 8 bits reach."""
    # Kernels multiply by the reciprocal; dividing would round otherwise now and then.
    return (x.float() * scale.float().reciprocal().flatten()).clamp(-128, 127)


def _unscaled(cache: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """The values of a cache [B, K, S, D] in 8 bits, in the type of `like`."""
    return cache.to(like.dtype) * scale


@_op("attention")
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of all queries to all keys: q [B, T, H*D], k and v [B, S, H*D] -> [B, T, H*D]."""
    q, k, v = (_split_heads(x, heads) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q)


@_op("padded_attention")
def padded_attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, heads: int) -> Tensor:
    """As `attention` of T tokens to themselves, but padding (1 in padding [B, T], else 0) does not attend to padding.

    Real tokens do attend to padding, and padding to real tokens (transformers, _prepare_aspect_ratio_attention_mask).
    """
    q, k, v = (_split_heads(x, heads) for x in (q, k, v))
    mask = padding[:, None, :, None] * padding[:, None, None, :] * torch.finfo(q.dtype).min  # [B, 1, T, T]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@padded_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q)


@_op("cross_attention")
def cross_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor, heads: int) -> Tensor:
    """Attention to the keys of n images: q [B, T, H*D], keys and values each [B, K, X, D], mask [B, T, n * t] -> [B, T, H*D].

    The X keys of an image are those of t tiles, in order; the mask of a tile is added to the scores of its keys.
    """
    b, t, _ = q.shape
    kv_heads, x, d = keys[0].shape[1:]
    each = x * len(keys) // mask.shape[-1]  # keys of one tile
    queries = q.view(b, t, kv_heads, heads // kv_heads, d)
    scores = torch.einsum("btkgd,bkxd->bkgtx", queries, torch.cat(list(keys), dim=2)).float() / d**0.5
    scores = scores + mask.repeat_interleave(each, dim=-1)[:, None, None]
    weights = scores.softmax(-1).to(q.dtype)
    return torch.einsum("bkgtx,bkxd->btkgd", weights, torch.cat(list(values), dim=2)).reshape(q.shape)


@cross_attention.register_fake
def _(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q)


@_op("mask_tiles")
def mask_tiles(x: Tensor, tile_count: Tensor) -> Tensor:
    """x [tiles, ...] with zeros in every tile from tile_count [1] on."""
    used = torch.arange(x.shape[0], device=x.device) < tile_count
    return x * used.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


@mask_tiles.register_fake
def _(x: Tensor, tile_count: Tensor) -> Tensor:
    return torch.empty_like(x)


@_op("tile_padding")
def tile_padding(tile_count: Tensor, tiles: int, rows: int, padded_rows: int) -> Tensor:
    """The tokens of an image that are padding: [1, tiles * padded_rows], 1 in tiles from tile_count [1] on and from row `rows`
    on of every tile, else 0."""
    place = torch.arange(tiles * padded_rows, device=tile_count.device)
    unused = (place // padded_rows >= tile_count) | (place % padded_rows >= rows)
    return unused.float()[None]


@tile_padding.register_fake
def _(tile_count: Tensor, tiles: int, rows: int, padded_rows: int) -> Tensor:
    return tile_count.new_empty((1, tiles * padded_rows), dtype=torch.float32)


@_op("pad_rows")
def pad_rows(x: Tensor, rows: int) -> Tensor:
    """x [B, T, C] with zeros after its T rows, `rows` in all."""
    return torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[1]))


@pad_rows.register_fake
def _(x: Tensor, rows: int) -> Tensor:
    return x.new_empty((x.shape[0], rows, x.shape[2]))


@_op("all_reduce")
def all_reduce(x: Tensor, ranks: int) -> Tensor:
    """The sum of the x [..., C] of all ranks, on every rank. Raises ValueError in a group of another size (see group.py)."""
    return group_of(ranks).all_reduce(x)


@all_reduce.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty(x.shape)


@_op("all_gather")
def all_gather(x: Tensor, ranks: int) -> Tensor:
    """The x [..., C] of all ranks joined along the last axis, rank 0 first: [..., ranks * C]. Raises as `all_reduce`."""
    return group_of(ranks).all_gather(x)


@all_gather.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], ranks * x.shape[-1]))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H*D] -> [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

"""The op vocabulary in terms of what torchair converts: aten, `npu` and torchair's own `air` operators.

One small function per op of model_defs/ops.py, with the same arguments. torchair is given the table while it traces a
graph, and every op has become its lowering before the first GE node is made. A lowering works on meta tensors alone, and
nothing it makes depends on a length, a position or a slot: those are graph inputs.

B rows, T tokens, S cache rows, H query heads, K kv heads, D head dim, C hidden size, N out features, X keys of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..model_defs.ops import NAMESPACE
from ..runtime.backends.ascend import torchair_host
from ..runtime.backends.ascend.process_groups import group_of_all

# The fused attention takes heads whose width is a multiple of this, in 16-bit types (CANN, FusedInferAttentionScore).
HEAD_ALIGNMENT = 16
INT8_HEAD_ALIGNMENT = 32  # where keys or values are int8
MOST_INT8_QUERIES = 16  # of a row, with keys and values of int8 and scales of channels; more than one only in bfloat16
# The side of the triangle that stands for a causal mask of any size (CANN, FusedInferAttentionScore, sparse_mode 2 to 4).
CAUSAL_SIDE = 2048
RIGHT_DOWN_CAUSAL = 3  # sparse_mode: the last query sees the last key, at the true lengths
# What is added to a score is 0 or far below this; see CROSS_HIDDEN in runtime/artifact.py.
HIDDEN_BELOW = -1e4
TYPE_NUMBERS = {torch.float16: 5, torch.bfloat16: 15}  # torch's own numbers of dtypes (c10::ScalarType)
# So many out features are the most that CANN's WeightQuantBatchMatmulV2 takes.
MOST_W8_FEATURES = 65535
# Of a row of logits, when its largest are looked for: so few that the second search is short, and a whole number of vectors.
TOP_BLOCK = 64

npu, air, aten, c10d = torch.ops.npu, torch.ops.air, torch.ops.aten, torch.ops._c10d_functional


def lowerings() -> dict[OpOverload, Callable[..., Any]]:
    """Every op of the vocabulary with its lowering, for torchair's `custom_decompositions`.

    Loads torchair first, since the operators named here exist from then on; raises ArtifactError where it is missing.
    """
    torchair_host.load()
    vocabulary = getattr(torch.ops, NAMESPACE)
    return {getattr(vocabulary, function.__name__).default: function for function in LOWERINGS}


# ---- matrix products


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """MatMul of flattened rows that takes the weight [N, C] as transposed: it is read as it is stored, never copied.

    x is brought to the weight's type here: normalised pixels come in float32.
    """
    rows = x.to(weight.dtype).reshape(-1, x.shape[-1])
    return npu.npu_linear.default(rows, weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def linear_w8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """WeightQuantBatchmatmul over groups of a block. `qweight` comes as int8 around zero, `zeros` as offsets (to_signed and
    to_offsets in runtime/backends/ascend/weights.py)."""
    return _grouped(x, qweight, scales, bias, zeros, qweight.shape[2])


def linear_w4(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """The same, eight numbers of 4 bits in an int32; a transposed one is packed along the input features."""
    return _grouped(x, qweight, scales, bias, zeros, 8 * qweight.shape[2])


def _grouped(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, offsets: Tensor | None, block: int) -> Tensor:
    """qweight [N, blocks, ..] as it lies, scales and offsets [N, blocks].

    Transposing weight, scales and offsets [N, ..] is left to the operator, which reads both either way, so no weight is copied;
    only a head of more than 65535 features is cut into pieces, which may cost a copy. A last block that is not full is
    zeros in the weight, so x is filled up with zeros.
    """
    n, blocks, _ = qweight.shape
    rows = x.reshape(-1, x.shape[-1])
    rows = aten.constant_pad_nd.default(rows, [0, blocks * block - x.shape[-1]]) if blocks * block > x.shape[-1] else rows
    weight = qweight.flatten(1)
    bias = None if bias is None else bias.float() if x.dtype == torch.bfloat16 else bias
    size = math.ceil(n / math.ceil(n / MOST_W8_FEATURES))
    pieces = [
        npu.npu_weight_quant_batchmatmul.default(
            rows,
            weight[start : start + size].t(),
            scales[start : start + size].t(),
            antiquant_offset=None if offsets is None else offsets[start : start + size].t(),
            bias=None if bias is None else bias[start : start + size],
            antiquant_group_size=block if blocks > 1 else 0,  # one block a row is what the operator calls per channel
        )
        for start in range(0, n, size)
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)).reshape(*x.shape[:-1], n)


def linear_w8a8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, rounded: bool) -> Tensor:
    """DynamicQuant, once for all products of one input, and QuantBatchMatmul. Activations are rounded in any case; the
    simulator's wide mode does not (ge_ops/quant.py)."""
    rows, row_scales = npu.npu_dynamic_quant.default(x.reshape(-1, x.shape[-1]))
    number = TYPE_NUMBERS[x.dtype]
    y = npu.npu_quant_matmul.default(rows, qweight, scales, pertoken_scale=row_scales, bias=bias, output_dtype=number)
    return y.reshape(*x.shape[:-1], qweight.shape[1])


# ---- norms and activations


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RmsNorm; its second output, the reciprocal roots, is for training."""
    return npu.npu_rms_norm.default(x, weight, eps)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNormV4."""
    return aten.native_layer_norm.default(x, [x.shape[-1]], weight, bias, eps)[0]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGlu, which takes both halves in one tensor."""
    return npu.npu_swiglu.default(torch.cat((gate, up), dim=-1), -1)


def gelu(x: Tensor) -> Tensor:
    """GeluV2 in its exact form; aten's own gelu becomes Gelu, which approximates with tanh."""
    return npu.npu_gelu.default(x, approximate="none")


def quick_gelu(x: Tensor) -> Tensor:
    """FastGelu: x / (1 + exp(-1.702 x)) in CANN's definition, which is x sigmoid(1.702 x)."""
    return npu.npu_fast_gelu.default(x)


# ---- rows in and out


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """GatherV2."""
    return aten.embedding.default(table, token_ids)


def merge_rows(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Gather a row for every position, then select."""
    from_image = rows.index_select(0, index.clamp(min=0).flatten()).view(x.shape)
    return torch.where((index < 0)[..., None], x, from_image)


def take_token(x: Tensor, index: Tensor) -> Tensor:
    """GatherV2 of flattened rows."""
    b, t, _ = x.shape
    if b > 1:
        index = index + torch.arange(b, dtype=index.dtype, device=x.device) * t
    return x.flatten(0, 1).index_select(0, index)


def mask_tiles(x: Tensor, tile_count: Tensor) -> Tensor:
    """Times 1 or 0."""
    used = torch.arange(x.shape[0], dtype=tile_count.dtype, device=x.device) < tile_count
    return x * used.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def tile_padding(tile_count: Tensor, tiles: int, rows: int, padded_rows: int) -> Tensor:
    """Tile and row compared on their own, then joined."""
    device, dtype = tile_count.device, tile_count.dtype
    unused = torch.arange(tiles, dtype=dtype, device=device) >= tile_count  # [tiles]
    past_end = torch.arange(padded_rows, dtype=dtype, device=device) >= rows  # [padded_rows]
    return (unused[:, None] | past_end[None]).float().reshape(1, tiles * padded_rows)


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """PadV3."""
    return aten.constant_pad_nd.default(x, [0, 0, 0, rows - x.shape[1]])


def top_tokens(logits: Tensor, inverse_temperature: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """In two steps, so that no long row is sorted: the blocks with the largest maxima, then the largest of what is in them.

    Everything in float32: the sum needs it, and all of these operators take it.
    """
    logits = logits.float()
    short = logits.shape[-1] <= 2 * count * TOP_BLOCK
    values, ids = aten.topk.default(logits, count) if short else _of_blocks(logits, count)
    below = (logits - values[:, :1]) * inverse_temperature[:, None]
    return values, ids.int(), below.exp().sum(-1)


def _of_blocks(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row lie in the `count` blocks with the largest maxima, whichever of equals are taken."""
    rows, vocab = logits.shape
    blocks, missing = math.ceil(vocab / TOP_BLOCK), -vocab % TOP_BLOCK
    if missing:
        logits = aten.constant_pad_nd.default(logits, [0, missing], -math.inf)
    parts = logits.reshape(rows * blocks, TOP_BLOCK)
    maxima = aten.max.dim(parts, -1)[0].reshape(rows, blocks)  # amax has no converter
    _, best = aten.topk.default(maxima, count)  # [R, count]
    best = best.int()
    first = torch.arange(rows, dtype=torch.int32, device=logits.device)[:, None] * blocks
    entries = parts.index_select(0, (best + first).flatten()).reshape(rows, count * TOP_BLOCK)
    within = torch.arange(TOP_BLOCK, dtype=torch.int32, device=logits.device)
    ids = (best[..., None] * TOP_BLOCK + within).reshape(rows, count * TOP_BLOCK)
    values, place = aten.topk.default(entries, count)
    return values, ids.gather(1, place)


# ---- rotary embedding and attention


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RotaryMul, in its layout BSND."""
    b, t, d = cos.shape
    cos, sin = (each.to(x.dtype)[:, :, None] for each in (cos, sin))  # [B, T, 1, D]
    return npu.npu_rotary_mul.default(x.view(b, t, -1, d), cos, sin).view(x.shape)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scatter the new rows after the old ones, then fused attention over the whole caches up to their true lengths.

    Lengths go in as a tensor. A chunk counts as whole, its padding included: its last token sees the last row written,
    which is what the operator calls right-down causal at the lengths T and lengths + T.
    """
    k_cache = _append(k_cache, k, lengths)
    v_cache = _append(v_cache, v, lengths)
    return _over_caches(q, k_cache, v_cache, lengths, heads), k_cache, v_cache


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
    """The same over caches of int8, scales being [K, 1, D].

    The operator takes scales of channels for one token of each row in both 16-bit types, and for up to MOST_INT8_QUERIES in
    bfloat16 (constraints of torch_npu.npu_fused_infer_attention_score: query bfloat16, scales [K, D], [K, 1, D] or [K * D]).
    Elsewhere what this layer reads of its caches is dequantised first, a copy that lives as long as the layer.
    """
    k_cache = _append(k_cache, _rounded(k, k_scale), lengths)
    v_cache = _append(v_cache, _rounded(v, v_scale), lengths)
    if q.shape[1] == 1:
        scales = {"key_antiquant_scale": k_scale[None], "value_antiquant_scale": v_scale[None]}  # [1, K, 1, D]
        return _over_caches(q, k_cache, v_cache, lengths, heads, **scales), k_cache, v_cache
    if q.dtype == torch.bfloat16 and q.shape[1] <= MOST_INT8_QUERIES:
        scales = {"key_antiquant_scale": k_scale, "value_antiquant_scale": v_scale}
        return _over_caches(q, k_cache, v_cache, lengths, heads, **scales), k_cache, v_cache
    keys, values = k_cache.to(q.dtype) * k_scale, v_cache.to(q.dtype) * v_scale
    return _over_caches(q, keys, values, lengths, heads), k_cache, v_cache


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, K*D] in whole steps of its channels' scales [K, 1, D], int8; computed in float32."""
    steps = x.float() * aten.reciprocal.default(scale.float()).flatten()
    return aten.round.default(steps.clamp(-128, 127)).to(torch.int8)


def _over_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, heads: int, **scales: Tensor) -> Tensor:
    """Fused attention of q [B, T, H*D] to all rows up to its own, those at `lengths` and on."""
    t = q.shape[1]
    kv_heads, _, d = k_cache.shape[1:]
    mask: dict[str, Any] = {}
    if t > 1:
        mask = {"atten_mask": _causal_triangle(q.device), "sparse_mode": RIGHT_DOWN_CAUSAL}
    out = _fused(
        _heads_first(q, heads),
        k_cache,
        v_cache,
        heads,
        d,
        input_layout="BNSD",
        actual_seq_lengths_kv=(lengths + t).long(),
        num_key_value_heads=kv_heads,
        **mask,
        **scales,
    )
    return _heads_last(out)


def _append(cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """new [B, T, K*D] as rows `lengths` and on of cache [B, K, S, D]."""
    return npu.scatter_update.default(cache, lengths, _heads_first(new, cache.shape[1]), 2)


def _causal_triangle(device: torch.device) -> Tensor:
    """True above the diagonal. Made by comparing in the graph: as a constant it would be 4 MB of every graph file."""
    place = torch.arange(CAUSAL_SIDE, dtype=torch.int32, device=device)
    return place[:, None] < place[None]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Fused attention on rows as they are (BSH)."""
    return _whole_attention(q, k, v, heads)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, heads: int) -> Tensor:
    """The same with a mask: padding does not see padding."""
    padded = padding > 0  # [B, T]
    return _whole_attention(q, k, v, heads, atten_mask=(padded[:, :, None] & padded[:, None])[:, None])


def _whole_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **mask: Tensor) -> Tensor:
    d = q.shape[-1] // heads
    q, k, v = (_repeated_heads(each, heads) for each in (q, k, v))
    out = _fused(q, k, v, heads, d, input_layout="BSH", num_key_value_heads=heads, **mask)
    if out.shape[-1] == heads * d:
        return out
    return out.unflatten(-1, (heads, -1))[..., :d].flatten(2)


def _repeated_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H*D] with every head filled up with zeros to a width that the operator takes: they add nothing to a score."""
    d = x.shape[-1] // heads
    missing = -d % HEAD_ALIGNMENT
    return aten.constant_pad_nd.default(x.unflatten(-1, (heads, d)), [0, missing]).flatten(2) if missing else x


def cross_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor, heads: int) -> Tensor:
    """Fused attention to the keys of all images, joined, with a mask of what a token does not see.

    A token that sees nothing attends evenly to everything, as by the definition: it has a query of zeros and no mask.
    """
    kv_heads, x, d = keys[0].shape[1:]
    hidden = mask < HIDDEN_BELOW  # [B, T, n * t]
    sees = (~hidden).to(q.dtype).sum(-1, keepdim=True) > 0  # [B, T, 1]
    q = q * sees.to(q.dtype)
    out = _fused(
        _heads_first(q, heads),
        keys[0] if len(keys) == 1 else torch.cat(list(keys), dim=2),
        values[0] if len(values) == 1 else torch.cat(list(values), dim=2),
        heads,
        d,
        input_layout="BNSD",
        num_key_value_heads=kv_heads,
        atten_mask=_by_key(hidden & sees, x * len(keys)),
    )
    return _heads_last(out)


def _by_key(hidden: Tensor, keys: int) -> Tensor:
    """[B, T, tiles] -> [B, 1, T, keys]: the value of a tile for each of its keys."""
    b, t, tiles = hidden.shape
    return hidden[..., None].expand(b, t, tiles, keys // tiles).reshape(b, 1, t, keys)


def _fused(q: Tensor, k: Tensor, v: Tensor, heads: int, d: int, **arguments: Any) -> Tensor:
    """torchair's form of the operator, whose lengths are tensors; the scale is that of the true head width `d`."""
    return air.npu_fused_infer_attention_score.default(q, k, v, num_heads=heads, scale=d**-0.5, **arguments)[0]


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, T, H*D] -> [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _heads_last(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H*D]."""
    return x.transpose(1, 2).flatten(2)


# ---- collectives


def all_reduce(x: Tensor, ranks: int) -> Tensor:
    """HcomAllReduce."""
    return c10d.wait_tensor.default(c10d.all_reduce.default(x, "sum", group_of_all(ranks)))


def all_gather(x: Tensor, ranks: int) -> Tensor:
    """HcomAllGather, which joins along the first axis: one transposition after it brings the parts of a row together.

    A single row needs none.
    """
    rows = x.reshape(-1, x.shape[-1])  # [M, C]
    joined = c10d.wait_tensor.default(c10d.all_gather_into_tensor.default(rows, ranks, group_of_all(ranks)))  # [ranks * M, C]
    if len(rows) > 1:
        joined = joined.unflatten(0, (ranks, -1)).transpose(0, 1)  # [M, ranks, C]
    return joined.reshape(*x.shape[:-1], ranks * x.shape[-1])


LOWERINGS: tuple[Callable[..., Any], ...] = (
    linear, linear_w8, linear_w4, linear_w8a8, rms_norm, layer_norm, silu_mul, gelu, quick_gelu, embed, merge_rows,
    take_token, top_tokens, mask_tiles, tile_padding, pad_rows, rope, cached_attention, int8_cached_attention, attention,
    padded_attention, cross_attention, all_reduce, all_gather,
)  # fmt: skip

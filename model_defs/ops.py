"""The op vocabulary: everything a model may do beyond reshaping, adding and multiplying.

Each op is registered with torch under `staticvl::` and written here once in plain PyTorch; that is its definition and the
numerical reference. A backend lowers the op by name and never sees how it is defined. Ops are functional: the cached
attention returns the updated caches, and a backend is free to write them in place.

Shapes: B rows, T tokens, S cache rows, H query heads, K kv heads, D head dim, C hidden size, N out features.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "staticvl"


def _op(name: str):
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())


@_op("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C] times weight [N, C] transposed, plus bias [N]."""
    return torch.nn.functional.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_op("linear_w8")
def linear_w8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear`, the weight stored in 8 bits: w = (qweight - 128) * scales, qweight [N, blocks, block], scales [N, blocks].

    Only the weights are rounded. A kernel may round the activations too; a graph's certificate says how far that carries.
    """
    weight = (qweight.to(scales.dtype) - 128) * scales[..., None]
    return torch.nn.functional.linear(x, weight.flatten(1)[:, : x.shape[-1]], bias)


@linear_w8.register_fake
def _(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


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


@_op("cached_attention")
def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Append k, v [B, T, K*D] to the caches [B, K, S, D] at row `lengths` [B] and attend causally with q [B, T, H*D].

    Token t of row b sees cache rows 0 .. lengths[b] + t. Returns (out [B, T, H*D], k_cache, v_cache).
    """
    b, t, _ = q.shape
    kv_heads, s, d = k_cache.shape[1:]
    at = lengths[:, None].long() + torch.arange(t, device=q.device)  # [B, T]
    row = torch.arange(b, device=q.device)[:, None]
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[row, :, at] = k.view(b, t, kv_heads, d)
    v_cache[row, :, at] = v.view(b, t, kv_heads, d)
    visible = torch.arange(s, device=q.device) <= at[..., None]  # [B, T, S]
    queries = q.view(b, t, kv_heads, heads // kv_heads, d)
    scores = torch.einsum("btkgd,bksd->bkgts", queries, k_cache).float() / d**0.5
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1).to(q.dtype)
    # Rows beyond what a token sees may hold anything, and 0 times infinity is not 0.
    values = torch.where((torch.arange(s, device=q.device) <= at.amax(1)[:, None])[:, None, :, None], v_cache, 0)
    out = torch.einsum("bkgts,bksd->btkgd", weights, values)
    return out.reshape(b, t, heads * d), k_cache, v_cache


@cached_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, heads: int):
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


@_op("attention")
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of all tokens to all tokens: q, k, v [B, T, H*D] -> [B, T, H*D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q)

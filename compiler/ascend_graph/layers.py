"""Norms, activations, embedding, rows of images, masks of tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import aten, npu


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

"""Qwen-VL's vision path (Bai et al. 2023): a ViT, and learned queries that resample its patches to a fixed number of rows.

N images, P patches, W the ViT's width, Q queries, C the language model's width.
"""

from __future__ import annotations

from torch import Tensor, nn

from . import ops
from .config import ModelConfig, ResampledConfig
from .layers import GatheredColumnLinear, LayerNorm, Linear, RowParallelLinear, Table, empty_parameter, shard_size
from .vit import Block, PatchEmbed, Pixels


class Tower(nn.Module):
    """Normalised pixels [N, size, size, 3] -> [N, P, W]. No class token, no norm after the last layer."""

    def __init__(self, config: ResampledConfig, ranks: int = 1, quant: str = "none") -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.patch = PatchEmbed(width, config.patch_size)
        self.positions = Table(config.patches, width)
        self.pre_norm = LayerNorm(width, eps)
        self.layers = nn.ModuleList(
            Block(width, config.heads, config.intermediate_size, eps=eps, ranks=ranks, quant=quant)
            for _ in range(config.layers)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pre_norm(self.patch(pixels) + self.positions.weight)
        for layer in self.layers:
            x = layer(x)
        return x


class PoolAttention(nn.Module):
    """The queries attend to the patches; positions are added to queries and keys, not to values."""

    def __init__(self, width: int, heads: int, ranks: int) -> None:
        super().__init__()
        self.heads = shard_size(heads, ranks)
        self.q, self.k, self.v = (Linear(width, shard_size(width, ranks), bias=True) for _ in range(3))
        self.o = RowParallelLinear(width, width, bias=True, ranks=ranks)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.o(ops.attention(self.q(queries), self.k(keys), self.v(values), self.heads))


class Resampler(nn.Module):
    """[N, P, W] -> [N, Q, C]."""

    def __init__(self, config: ResampledConfig, ranks: int = 1) -> None:
        super().__init__()
        width, eps = config.output_size, config.layer_norm_eps
        apart = config.hidden_size != width
        self.kv = GatheredColumnLinear(config.hidden_size, width, bias=False, ranks=ranks) if apart else None
        self.kv_norm = LayerNorm(width, eps)
        self.query = empty_parameter(config.queries, width)
        self.query_norm = LayerNorm(width, eps)
        self.positions = Table(config.queries, width)
        self.key_positions = Table(config.patches, width)
        self.attn = PoolAttention(width, config.resampler_heads, ranks)
        self.norm = LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.kv_norm(x if self.kv is None else self.kv(x))
        queries = self.query_norm(self.query) + self.positions.weight
        queries = queries.expand(x.shape[0], *queries.shape)
        return self.norm(self.attn(queries, x + self.key_positions.weight, x))


class VisionGraph(nn.Module):
    """pixels [images, size, size, 3] uint8 -> image_rows [images, Q, C], the graph of one of `ranks`."""

    def __init__(self, config: ModelConfig, ranks: int = 1, quant: str = "none") -> None:
        super().__init__()
        assert isinstance(config.vision, ResampledConfig)
        width = config.vision.output_size
        self.pixels = Pixels()
        self.vision = Tower(config.vision, ranks, quant)
        self.pool = Resampler(config.vision, ranks)
        self.projector = GatheredColumnLinear(width, width, bias=False, ranks=ranks)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projector(self.pool(self.vision(self.pixels(pixels))))

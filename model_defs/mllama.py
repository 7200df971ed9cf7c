"""Llama-3.2-Vision's vision path: a tower that sees all tiles of one image at once, and the keys and values that the
decoder's cross-attention layers read (Meta 2024; transformers' modeling_mllama).

t tiles (unused ones included: real tokens attend to them), N rows per tile (patches and class token), M = N rounded up to a
multiple of 8, W the tower's width, C the language model's, X = t * N keys, K kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .config import ModelConfig, TiledConfig
from .layers import GatheredColumnLinear, LayerNorm, Linear, RMSNorm, Table, empty_parameter
from .vit import Block, PatchEmbed, Pixels


class Tower(nn.Module):
    """Normalised pixels [t, size, size, 3] -> features [t, N, W * (1 + taps)]: the last state, then each tapped one.

    The tables are scaled by the checkpoint's gates; row `aspect_id` belongs to the image's shape.
    """

    def __init__(self, config: TiledConfig, ranks: int = 1, quant: str = "none") -> None:
        super().__init__()
        self.config = config
        width, eps, t = config.hidden_size, config.norm_eps, config.tiles
        shapes = len(config.ratios) + 1  # 0 stands for no image
        self.class_embedding = empty_parameter(width)
        self.patch = PatchEmbed(width, config.patch_size)
        self.pre_tile = Table(shapes, t * width)
        self.positions = Table(shapes, t * config.rows_per_tile * width, ranks=ranks)
        self.pre_norm = LayerNorm(width, eps)
        self.layers = nn.ModuleList(self._block(config, ranks, quant, gated=False) for _ in range(config.layers))
        self.post_norm = LayerNorm(width, eps)
        self.post_tile = Table(shapes, t * width)
        self.global_layers = nn.ModuleList(self._block(config, ranks, quant, gated=True) for _ in range(config.global_layers))

    @staticmethod
    def _block(config: TiledConfig, ranks: int, quant: str, *, gated: bool) -> Block:
        sizes = (config.hidden_size, config.heads, config.intermediate_size)
        return Block(*sizes, eps=config.norm_eps, attn_bias=False, gated=gated, ranks=ranks, quant=quant)

    def forward(self, pixels: Tensor, tile_count: Tensor, aspect_id: Tensor) -> Tensor:
        config = self.config
        t, m, width = config.tiles, config.padded_rows, config.hidden_size
        x = self._embed(pixels, tile_count, aspect_id)  # [1, t * M, W]
        padding = ops.tile_padding(tile_count, t, config.rows_per_tile, m)  # [1, t * M]
        tapped = []
        for i, layer in enumerate(self.layers):
            x = layer(x, padding)
            if i in config.taps:
                tapped.append(x)
        post_tile = self.post_tile(aspect_id).reshape(t, 1, width)
        x = (self.post_norm(x).reshape(t, m, width) + post_tile).reshape(1, t * m, width)
        for layer in self.global_layers:
            x = layer(x, padding)
        return torch.cat([each.reshape(t, m, width)[:, : config.rows_per_tile] for each in (x, *tapped)], dim=-1)

    def _embed(self, pixels: Tensor, tile_count: Tensor, aspect_id: Tensor) -> Tensor:
        config = self.config
        t, n, width = config.tiles, config.rows_per_tile, config.hidden_size
        # An empty tile is zero in the space of normalised pixels, and the patches have no bias: zero it after them.
        x = ops.mask_tiles(self.patch(pixels), tile_count)
        x = x + self.pre_tile(aspect_id).reshape(t, 1, width)
        x = torch.cat((self.class_embedding.expand(t, 1, width), x), dim=1)
        x = self.pre_norm(x + self.positions(aspect_id).reshape(t, n, width))
        return ops.pad_rows(x, config.padded_rows).reshape(1, t * config.padded_rows, width)


class CrossKeys(nn.Module):
    """Features of an image [1, X, C] -> keys and values of one cross-attention layer [1, K, X, D], of the rank's heads."""

    def __init__(self, config: ModelConfig, ranks: int) -> None:
        super().__init__()
        text = config.text
        self.heads, self.head_dim = text.rank_kv_heads(ranks), text.head_dim
        self.k = Linear(text.hidden_size, self.heads * self.head_dim, bias=False)
        self.v = Linear(text.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_norm = RMSNorm(self.head_dim, text.rms_norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, x.shape[1], self.heads, self.head_dim)
        keys, values = self.k_norm(self.k(x).reshape(shape)), self.v(x).reshape(shape)
        return keys.permute(0, 2, 1, 3), values.permute(0, 2, 1, 3)


class VisionGraph(nn.Module):
    """pixels [t, size, size, 3] uint8, tile_count [1], aspect_id [1] -> cross_k and cross_v of each cross layer in turn,
    the graph of one of `ranks`.

    In a pipeline every stage computes those of its own layers: the first passes on the features [1, X, C] as its first output;
    later stages take them as their only input, and pass them on.
    """

    def __init__(self, config: ModelConfig, ranks: int = 1, quant: str = "none") -> None:
        super().__init__()
        vision, text = config.vision, config.text
        assert isinstance(vision, TiledConfig)
        self.stage = text.stage
        if self.stage.first:
            self.pixels = Pixels()
            self.vision = Tower(vision, ranks, quant)
            self.projector = GatheredColumnLinear(vision.feature_size, text.hidden_size, bias=True, ranks=ranks)
        # A dictionary, so that a layer keeps its number where others are left out.
        self.cross = nn.ModuleDict({str(j): CrossKeys(config, ranks) for j in text.stage_cross})

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x = self._features(*inputs) if self.stage.first else inputs[0]
        keys = [each for layer in self.cross.values() for each in layer(x)]
        return tuple(keys) if self.stage.last else (x, *keys)

    def _features(self, pixels: Tensor, tile_count: Tensor, aspect_id: Tensor) -> Tensor:
        x = self.projector(self.vision(self.pixels(pixels), tile_count, aspect_id))  # [t, N, C]
        return x.flatten(0, 1)[None]

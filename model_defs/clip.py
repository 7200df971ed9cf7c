"""The CLIP vision tower (Radford et al. 2021), up to the layer whose output the language model reads.

N pictures, P patches, C hidden size, p patch side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .config import ClipConfig
from .layers import LayerNorm, Linear, Table, empty_parameter

ACTIVATIONS = {"quick_gelu": ops.quick_gelu, "gelu": ops.gelu}


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: a linear map of each patch."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.side = config.patch_size
        self.weight = empty_parameter(config.hidden_size, 3, self.side, self.side)

    def forward(self, pixels: Tensor) -> Tensor:
        n, size, _, _ = pixels.shape  # [N, size, size, 3]
        grid, p = size // self.side, self.side
        patches = pixels.reshape(n, grid, p, grid, p, 3).permute(0, 1, 3, 5, 2, 4)  # [N, grid, grid, 3, p, p]
        return ops.linear(patches.reshape(n, grid * grid, 3 * p * p), self.weight.flatten(1), None)


class Attention(nn.Module):
    """Every patch attends to every patch."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (Linear(config.hidden_size, config.hidden_size, bias=True) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(ops.attention(self.q(x), self.k(x), self.v(x), self.heads))


class Mlp(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One encoder layer, pre-norm."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ClipTower(nn.Module):
    """Normalised pixels [N, size, size, 3] -> hidden states of the selected layer [N, P (+1), C]."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.keep_class_token = config.keep_class_token
        self.class_embedding = empty_parameter(config.hidden_size)
        self.patch = PatchEmbed(config)
        self.positions = Table(config.patches + 1, config.hidden_size)
        self.pre_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.used_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch(pixels)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = self.pre_norm(torch.cat((first, patches), dim=1) + self.positions.weight)
        for layer in self.layers:
            x = layer(x)
        # The class token is dropped after the layers: the patches have attended to it.
        return x if self.keep_class_token else x[:, 1:]

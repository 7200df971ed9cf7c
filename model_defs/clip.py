"""The CLIP vision tower (Radford et al. 2021), up to the layer whose output the language model reads.

N images, P patches, C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import ClipConfig
from .layers import LayerNorm, Table, empty_parameter
from .vit import Block, PatchEmbed


class ClipTower(nn.Module):
    """Normalised pixels [N, size, size, 3] -> hidden states of the selected layer [N, P (+1), C]."""

    def __init__(self, config: ClipConfig, ranks: int = 1, quant: str = "none") -> None:
        super().__init__()
        width = config.hidden_size
        self.keep_class_token = config.keep_class_token
        self.class_embedding = empty_parameter(width)
        self.patch = PatchEmbed(width, config.patch_size)
        self.positions = Table(config.patches + 1, width)
        self.pre_norm = LayerNorm(width, config.layer_norm_eps)
        self.layers = nn.ModuleList(
            Block(
                width,
                config.heads,
                config.intermediate_size,
                eps=config.layer_norm_eps,
                activation=config.activation,
                ranks=ranks,
                quant=quant,
            )
            for _ in range(config.used_layers)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch(pixels)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = self.pre_norm(torch.cat((first, patches), dim=1) + self.positions.weight)
        for layer in self.layers:
            x = layer(x)
        # The class token is dropped after the layers: the patches have attended to it.
        return x if self.keep_class_token else x[:, 1:]

"""LLaVA-1.5 and 1.6: CLIP, then a two-layer projector into the language model's space (Liu et al. 2023).

1.6 cuts an image into tiles that pass through this graph one by one; where their rows go is decided on the host.
"""

from __future__ import annotations

from torch import Tensor, nn

from . import ops
from .clip import ClipTower
from .config import ClipConfig, ModelConfig
from .layers import Linear, RowParallelLinear, shard_size
from .vit import Pixels


class Projector(nn.Module):
    """down(gelu(up(x))), from the vision tower's width to the language model's."""

    def __init__(self, config: ModelConfig, ranks: int) -> None:
        super().__init__()
        width = config.text.hidden_size
        self.up = Linear(config.vision.hidden_size, shard_size(width, ranks), bias=config.projector_bias)
        self.down = RowParallelLinear(width, width, bias=config.projector_bias, ranks=ranks)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(x)))


class VisionGraph(nn.Module):
    """pixels [tiles, size, size, 3] uint8 -> image_rows [tiles, P, C], the graph of one of `ranks`."""

    def __init__(self, config: ModelConfig, ranks: int = 1, quant: str = "none") -> None:
        super().__init__()
        assert isinstance(config.vision, ClipConfig)
        self.pixels = Pixels()
        self.vision = ClipTower(config.vision, ranks, quant)
        self.projector = Projector(config, ranks)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projector(self.vision(self.pixels(pixels)))

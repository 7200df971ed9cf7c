"""LLaVA-1.5 and 1.6: CLIP, then a two-layer projector into the language model's space (Liu et al. 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from . import ops
from .clip import ClipTower
from .config import ModelConfig
from .layers import Linear, empty_parameter


class Projector(nn.Module):
    """down(gelu(up(x))), from the vision tower's width to the language model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.text.hidden_size
        self.up = Linear(config.vision.hidden_size, width, bias=config.projector_bias)
        self.down = Linear(width, width, bias=config.projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(x)))


class VisionGraph(nn.Module):
    """pixels [tiles, size, size, 3] uint8 -> image_rows [tiles, P, C].

    `pixel_scale` and `pixel_shift` [3] hold (x * rescale - mean) / std as one multiplication and one addition.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pixel_scale = empty_parameter(3)
        self.pixel_shift = empty_parameter(3)
        self.vision = ClipTower(config.vision)
        self.projector = Projector(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projector(self.vision(pixels.float() * self.pixel_scale + self.pixel_shift))

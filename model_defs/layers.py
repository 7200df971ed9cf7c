"""The few layers that every family is made of. A module's parameter names are the names in the artifact's weight table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .config import quant_block


def empty_parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A weight to be filled from the artifact; never trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """x [..., C] -> [..., N]; the weight in float, or in 8 bits with a scale for each block."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, quant: str = "none") -> None:
        super().__init__()
        self.quant = quant
        if quant == "none":
            self.weight = empty_parameter(out_features, in_features)
        else:
            block = quant_block(in_features)
            blocks = -(-in_features // block)
            self.qweight = empty_parameter(out_features, blocks, block, dtype=torch.uint8)
            self.scales = empty_parameter(out_features, blocks)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.quant == "none":
            return ops.linear(x, self.weight, self.bias)
        return ops.linear_w8(x, self.qweight, self.scales, self.bias)


class RMSNorm(nn.Module):
    """See ops.rms_norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = empty_parameter(width), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """See ops.layer_norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = empty_parameter(width), empty_parameter(width), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Table(nn.Module):
    """A lookup table [rows, C], e.g. token embeddings or learned positions."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = empty_parameter(rows, width)

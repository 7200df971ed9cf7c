"""The few layers that every family is made of. A module's parameter names are the names in the artifact's weight table.

A model may be sharded over ranks (tensor parallelism, Shoeybi et al. 2019; see weights/shard.py). Every module then holds the
shard of one rank. A column-parallel `Linear` is one with fewer output features; the layers whose results are combined with
those of other ranks are `RowParallelLinear`, `GatheredColumnLinear` and `Table`. The same module serves every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .config import ASYMMETRIC, quant_bits, quant_parts


def empty_parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A weight to be filled from the artifact; never trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def shard_size(size: int, ranks: int) -> int:
    """The part of `size` that one of `ranks` holds; weights/shard.py checks before that it divides."""
    assert size % ranks == 0, (size, ranks)
    return size // ranks


class Linear(nn.Module):
    """x [..., C] -> [..., N]; the weight in float, or in 8 or 4 bits with scales (config/quant.py).

    `rounds`: whether a quantisation that rounds activations does so; without, all other arithmetic can be compared closely.
    """

    weight: Tensor
    qweight: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool, quant: str = "none") -> None:
        super().__init__()
        self.quant, self.rounds = quant, True
        for name, part in quant_parts(quant, out_features, in_features).items():
            setattr(self, name, empty_parameter(*part.shape, dtype=getattr(torch, part.dtype or "float32")))
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.quant == "none":
            return ops.linear(x, self.weight, bias)
        if self.quant == "w8a8":
            return ops.linear_w8a8(x, self.qweight, self.scales, bias, self.rounds)
        op = ops.linear_w8 if quant_bits(self.quant) == 8 else ops.linear_w4
        return op(x, self.qweight, self.scales, bias, *([self.zeros] if self.quant.endswith(ASYMMETRIC) else []))


def without_rounding(module: nn.Module) -> None:
    """Let no layer of `module` round its activations."""
    for each in module.modules():
        if isinstance(each, Linear):
            each.rounds = False


class RowParallelLinear(Linear):
    """x [..., C / ranks] -> [..., N], sharded by input features: each rank's product is a part of a sum.

    The bias is whole on every rank and added once, to the sum.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, quant: str = "none", ranks: int) -> None:
        super().__init__(shard_size(in_features, ranks), out_features, bias=bias, quant=quant)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return self.product(x, self.bias)
        x = ops.all_reduce(self.product(x, None), self.ranks)
        return x if self.bias is None else x + self.bias


class GatheredColumnLinear(Linear):
    """x [..., C] -> [..., N], sharded by output features, which are then gathered.

    Where `ranks` do not divide N, features are padded, and the padding is removed from the result.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, quant: str = "none", ranks: int) -> None:
        super().__init__(in_features, -(-out_features // ranks), bias=bias, quant=quant)
        self.out_features, self.ranks = out_features, ranks

    def forward(self, x: Tensor) -> Tensor:
        x = _gathered(super().forward(x), self.ranks)
        return x if self.out_features % self.ranks == 0 else x[..., : self.out_features]


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
    """A lookup table [rows, C], e.g. token embeddings or learned positions; ids [B, T] -> [B, T, C].

    Sharded by columns: each rank looks up its own part of any row.
    """

    def __init__(self, rows: int, width: int, *, ranks: int = 1) -> None:
        super().__init__()
        self.weight, self.ranks = empty_parameter(rows, shard_size(width, ranks)), ranks

    def forward(self, ids: Tensor) -> Tensor:
        return _gathered(ops.embed(ids, self.weight), self.ranks)


def _gathered(x: Tensor, ranks: int) -> Tensor:
    return x if ranks == 1 else ops.all_gather(x, ranks)

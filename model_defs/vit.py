"""Parts of all vision transformers here. N images or tiles, T tokens, C hidden size, p patch side.

Where a model is sharded, a rank holds its shard of the heads and of the MLP.
"""

from __future__ import annotations

from torch import Tensor, nn

from . import ops
from .layers import LayerNorm, Linear, RowParallelLinear, empty_parameter, shard_size

ACTIVATIONS = {"quick_gelu": ops.quick_gelu, "gelu": ops.gelu}


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: a linear map of each patch. [N, size, size, 3] -> [N, patches, C]."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.side = patch_size
        self.weight = empty_parameter(width, 3, patch_size, patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        n, size, _, _ = pixels.shape
        grid, p = size // self.side, self.side
        patches = pixels.reshape(n, grid, p, grid, p, 3).permute(0, 1, 3, 5, 2, 4)  # [N, grid, grid, 3, p, p]
        return ops.linear(patches.reshape(n, grid * grid, 3 * p * p), self.weight.flatten(1), None)


class Pixels(nn.Module):
    """uint8 -> normalised float32: (x * rescale - mean) / std as one multiplication and one addition.

    `scale` and `shift` [3] are settings of the checkpoint's image processor, not weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = empty_parameter(3), empty_parameter(3)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float() * self.scale + self.shift


class Attention(nn.Module):
    """Every token attends to every token; with `padding` [N, T], padding and padding do not attend to each other."""

    def __init__(self, width: int, heads: int, *, bias: bool, ranks: int, quant: str) -> None:
        super().__init__()
        self.heads = shard_size(heads, ranks)
        self.q, self.k, self.v = (Linear(width, shard_size(width, ranks), bias=bias, quant=quant) for _ in range(3))
        self.o = RowParallelLinear(width, width, bias=bias, quant=quant, ranks=ranks)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if padding is None:
            return self.o(ops.attention(q, k, v, self.heads))
        return self.o(ops.padded_attention(q, k, v, padding, self.heads))


class Mlp(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, width: int, inner: int, activation: str, ranks: int, quant: str) -> None:
        super().__init__()
        self.up = Linear(width, shard_size(inner, ranks), bias=True, quant=quant)
        self.down = RowParallelLinear(inner, width, bias=True, quant=quant, ranks=ranks)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One encoder layer, pre-norm; a gated one scales its two residuals by learned numbers."""

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        *,
        eps: float,
        activation: str = "gelu",
        attn_bias: bool = True,
        gated: bool = False,
        ranks: int = 1,
        quant: str = "none",
    ) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(width, eps)
        self.attn = Attention(width, heads, bias=attn_bias, ranks=ranks, quant=quant)
        self.mlp_norm = LayerNorm(width, eps)
        self.mlp = Mlp(width, inner, activation, ranks, quant)
        self.attn_gate = empty_parameter(1) if gated else None
        self.mlp_gate = empty_parameter(1) if gated else None

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = x + _gated(self.attn(self.attn_norm(x), padding), self.attn_gate)
        return x + _gated(self.mlp(self.mlp_norm(x)), self.mlp_gate)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate

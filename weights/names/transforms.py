"""Functions that make our parameters from tensors of a checkpoint; arithmetic is in float32.

torch is imported where it runs: code that needs only names and shapes does not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .rule import Make


def moves(make: Make | None) -> bool:
    """Whether the result only moves numbers of the sources: then their dtype holds it without loss."""
    return make is None or getattr(make, "func", make) in (append_row, blockwise_taps, head_slices, transposed)


def append_row(sources: Sequence[Tensor]) -> Tensor:
    """A table [R, C] and a vector [C] -> [R + 1, C]."""
    import torch

    table, row = sources
    return torch.cat([table, row.unsqueeze(0)])


def tanh_gate(sources: Sequence[Tensor]) -> Tensor:
    """A gate as it is stored -> the factor that it stands for."""
    return sources[0].float().tanh_()


def gated_table(sources: Sequence[Tensor]) -> Tensor:
    """gate [1], table [R, C] -> [R, C] float32, scaled by the gate's tanh."""
    gate, table = sources
    return table.float() * gate.float().tanh()


def mixed_positions(sources: Sequence[Tensor]) -> Tensor:
    """gate [1], positions [N, C], tile table [A, t * N * C] -> [A, t * N * C] float32: both tables, weighed by the gate."""
    import torch

    gate, positions, tiles = sources
    factor = gate.float().tanh()
    mixed = tiles.to(torch.float32, copy=True).mul_(factor)  # the largest tensor that is made: no third copy of it
    mixed.view(len(tiles), -1, positions.numel()).add_((positions.float() * (1 - factor)).flatten())
    return mixed


def blockwise_taps(sources: Sequence[Tensor], taps: int) -> Tensor:
    """A weight [O, W * (1 + taps)] of which a block of columns belongs to each of the outputs that are joined.

    The first W columns are those of the tower's last output. Channel c of tap l is stored in column W + c * taps + l, and
    goes to column W + l * W + c.
    """
    import torch

    (weight,) = sources
    width = weight.shape[1] // (1 + taps)
    last, tapped = weight.split([width, width * taps], dim=1)
    return torch.cat([last, tapped.unflatten(1, (width, taps)).transpose(1, 2).flatten(1)], dim=1)


def head_slices(sources: Sequence[Tensor], which: int, heads: int) -> Tensor:
    """[heads * 3 * D, ...], where q, k and v alternate within each head -> one of them, [heads * D, ...]."""
    (fused,) = sources
    return fused.unflatten(0, (heads, 3, -1))[:, which].flatten(0, 1)


def transposed(sources: Sequence[Tensor]) -> Tensor:
    return sources[0].t().contiguous()


def resized_grid(sources: Sequence[Tensor], rows: int) -> Tensor:
    """A table of a square grid of positions [R, C] -> the same for a grid of `rows` positions [rows, C] float32, bicubic."""
    from torch.nn.functional import interpolate

    (table,) = sources
    old, new = round(len(table) ** 0.5), round(rows**0.5)
    if old == new:
        return table.float()
    grid = table.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(rows, -1)

"""Reading one rank's part of a tensor, and no more of it than has to be in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .names.rule import Shape

Rows = tuple[int, int]  # first, and behind the last
_PIECE = 1 << 23  # elements read at once of a tensor that is cut by columns


@dataclass(frozen=True, slots=True)
class Span:
    """Rows (axis 0) or columns (axis 1) of a tensor: the first, and behind the last."""

    axis: int
    first: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a whole tensor, contiguous; rows are a view."""
        return tensor.narrow(self.axis, self.first, self.stop - self.first).contiguous()


def read_span(read: Callable[[Rows], Tensor], shape: Shape, span: Span) -> Tensor:
    """`span` of a tensor of `shape`, of which `read` gives rows.

    Of rows only the wanted ones are read. Columns lie apart in a file, so all rows are read, a few at a time.
    """
    if span.axis == 0:
        return read((span.first, span.stop))
    rows, columns = shape
    step = max(1, _PIECE // columns)
    kept: Tensor | None = None
    for first in range(0, rows, step):
        piece = span.of(read((first, min(first + step, rows))))
        if kept is None:
            kept = torch.empty((rows, span.stop - span.first), dtype=piece.dtype)
        kept[first : first + len(piece)] = piece
    assert kept is not None, shape
    return kept

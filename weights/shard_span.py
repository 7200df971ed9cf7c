"""Reading one rank's shard of a tensor, with as little of the rest in memory as possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .names.rule import Shape

Rows = tuple[int, int]  # first, and after the last
_PIECE = 1 << 23  # elements read at once of a tensor that is sharded by columns


@dataclass(frozen=True, slots=True)
class Span:
    """Some rows (axis 0) or columns (axis 1) of a tensor: the first, and after the last."""

    axis: int
    first: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows (a view) or columns (a copy) of a whole tensor, contiguous."""
        return tensor.narrow(self.axis, self.first, self.stop - self.first).contiguous()


def read_span(read: Callable[[Rows], Tensor], shape: Shape, span: Span) -> Tensor:
    """The rows or columns `span` of a tensor of `shape`; `read` gives rows of it.

    Of a span of rows only these are read. Columns lie apart in a file, so all rows are read, a few at a time.
    """
    if span.axis == 0:
        return read((span.first, span.stop))
    rows, columns = shape
    step = max(1, _PIECE // columns)
    shard: Tensor | None = None
    for first in range(0, rows, step):
        piece = span.of(read((first, min(first + step, rows))))
        if shard is None:
            shard = torch.empty((rows, span.stop - span.first), dtype=piece.dtype)
        shard[first : first + len(piece)] = piece
    assert shard is not None, shape
    return shard

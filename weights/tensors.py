"""Descriptions of tensors in a checkpoint and in an artifact: names, dtypes and shapes, no contents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

# Tensors of a vision tower stored apart are listed with this before their own names, so that they never collide with
# the checkpoint's. No published checkpoint uses a slash in a tensor name.
TOWER = "tower/"

FLOATS = ("float32", "float16", "bfloat16")
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "uint8": 1, "int8": 1}


class WeightsError(ValueError):
    """Weights that cannot be read, matched or written as they stand; the message says what to do."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a checkpoint.

    `offset` is the position of its first element in `file`; None: the file has to be loaded whole (old .bin format).
    `stride` counts elements, as in torch. `stored` is its name in the file where that is another.
    """

    name: str
    dtype: str  # torch's name without "torch."
    shape: tuple[int, ...]
    file: Path
    offset: int | None
    stride: tuple[int, ...]
    stored: str = ""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Dtype and shape of one tensor of a weight file."""

    dtype: str  # float32 | float16 | bfloat16 | int32 | uint8 | int8
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _WIDTHS[self.dtype] * math.prod(self.shape)

"""Records of files and of the tensors in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

import msgspec

from .record import DTYPE_BYTES, Dtype, Record, Shape, Size

WEIGHTS = "weights"


class WeightSpec(Record, frozen=True, kw_only=True):
    """The place of one tensor: `nbytes` bytes from `offset` on in `file` (a safetensors file)."""

    file: str
    dtype: Dtype  # numpy name
    shape: Shape
    offset: Size
    nbytes: Size

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]


class FileSpec(Record, frozen=True, kw_only=True):
    """Size and digest of a file."""

    nbytes: Size
    sha256: str


class SourceFile(Record, frozen=True, kw_only=True):
    """One file of the checkpoint; a build reads it again only where `mtime_ns` or the size differs."""

    nbytes: int
    sha256: str
    mtime_ns: int


def rank_folder(ranks: int, rank: int) -> str:
    """The folder of the weight files of `rank` within the artifact, of all `ranks` of the model."""
    assert 0 <= rank < ranks, (rank, ranks)
    return WEIGHTS if ranks == 1 else f"{WEIGHTS}/rank-{rank}"


def rank_weights(weights: Mapping[str, WeightSpec], ranks: int, rank: int) -> dict[str, WeightSpec]:
    """The places of the weights of `rank`, from those of any rank of its stage: their files have the same layout."""
    folder = rank_folder(ranks, rank)
    return {name: msgspec.structs.replace(spec, file=f"{folder}/{PurePath(spec.file).name}") for name, spec in weights.items()}

"""lm_head in pieces of its rows: so artifacts for Ascend store a quantised one of more features than an operator takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from .names.rule import Shape

HEAD = "text.lm_head"
MOST_FEATURES = 65535  # of CANN's WeightQuantBatchMatmulV2
MULTIPLE = 64  # of features in each piece but the last: the operator's fast kernels take multiples of 32, or of 64
_PIECE = re.compile(rf"{re.escape(HEAD)}\.(\d+)\.(\w+)")


def piece_rows(rows: int) -> tuple[int, ...]:
    """The rows of each piece of a quantised lm_head of `rows`, in order; one piece stands for a head that is not cut."""
    if rows <= MOST_FEATURES:
        return (rows,)
    count = math.ceil(rows / (MOST_FEATURES - MOST_FEATURES % MULTIPLE))
    size = math.ceil(rows / count / MULTIPLE) * MULTIPLE
    return tuple(min(size, rows - first) for first in range(0, rows, size))


def piece_name(name: str, place: int) -> str:
    """The parameter, or stored part, of the piece number `place` of `name`, one of lm_head."""
    return f"{HEAD}.{place}.{name.removeprefix(f'{HEAD}.')}"


def piece_of(name: str) -> tuple[str, int]:
    """The parameter, or stored part, of lm_head that `name` is a piece of, and the piece's number; ("", 0) if it is none."""
    match = _PIECE.fullmatch(name)
    return (f"{HEAD}.{match[2]}", int(match[1])) if match else ("", 0)


def cut_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Parameters and their shapes with the pieces of lm_head in its place, in the order of `shapes`."""
    cut: dict[str, Shape] = {}
    for name, (*rows, columns) in shapes.items():
        pieces = piece_rows(rows[0]) if name == f"{HEAD}.weight" else ()
        if len(pieces) > 1:
            cut |= {piece_name(name, place): (size, columns) for place, size in enumerate(pieces)}
        else:
            cut[name] = (*rows, columns)
    return cut

"""Explanations of a wrong tensor, in the words of those who convert and train models.

N rows (output features), K columns (input features); a: the reference's tensor, b: the candidate's, float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model_defs.config import ModelConfig

_QK = re.compile(r"text\.layers\.\d+\.attn\.[qk]\.(?:weight|bias)")
_HEADS = re.compile(
    r"(?:(?:text\.|vision\.|vision\.global_)layers\.\d+\.attn|cross\.\d+|pool\.attn)\.([qkvo])\.(?:weight|bias)"
)
_PATCHES = re.compile(r"vision\.(?:patch\w*|embed\w*)\.weight")
FEW = 64  # the largest rank that a difference is tested for
LEAST_SIDE = 16  # of a matrix whose rank says something


@dataclass(frozen=True, slots=True)
class TensorPair:
    """Both sides' numbers of one parameter. `near`: the relative error up to which two tensors count as equal."""

    name: str
    a: Tensor
    b: Tensor
    near: float
    config: ModelConfig


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest magnitude of `a`; infinite where `b` holds numbers that are not finite."""
    if not a.numel():
        return 0.0
    if not torch.isfinite(b).all():
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


def own_reasons(pair: TensorPair) -> Iterator[str]:
    """Clauses that explain `b` by `a` alone, the most exact first."""
    for rule in (_rounded, _multiple, _rotary, _heads, _channels, _transposed, _newline, _low_rank):
        if clause := rule(pair):
            yield clause


def not_finite(b: Tensor) -> str:
    """A clause about numbers that are not finite; "" where all are."""
    bad = ~torch.isfinite(b)
    if not bad.any():
        return ""
    nan, at = int(torch.isnan(b).sum()), torch.nonzero(bad)[0].tolist()
    kinds = [f"{count} {noun}" for count, noun in ((nan, "NaN"), (int(bad.sum()) - nan, "infinite")) if count]
    return f"holds {' and '.join(kinds)} of {b.numel()} numbers, first at {at}"


def _rounded(pair: TensorPair) -> str:
    """Only the right dtype gives back every number."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(pair.a.to(dtype).float(), pair.b):
            return f"rounded to {str(dtype).removeprefix('torch.')}"
    return ""


def _multiple(pair: TensorPair) -> str:
    factor = float((pair.a * pair.b).sum() / pair.a.square().sum().clamp_min(1e-30))
    if abs(factor) > 1e-3 and relative(pair.a * factor, pair.b) <= pair.near:
        return f"it is {factor:.4g} times the reference's"
    return ""


def _rotary(pair: TensorPair) -> str:
    if not _QK.fullmatch(pair.name) or len(pair.a) % pair.config.text.head_dim:
        return ""
    heads = pair.a.unflatten(0, (-1, pair.config.text.head_dim))  # [H, D, ...]
    rest = heads.shape[2:]
    interleaved = heads.unflatten(1, (2, -1)).transpose(1, 2).reshape(len(heads), -1, *rest)
    halves = heads.unflatten(1, (-1, 2)).transpose(1, 2).reshape(len(heads), -1, *rest)
    for rows, layout in ((interleaved, "interleaved"), (halves, "half and half")):
        if relative(rows.flatten(0, 1), pair.b) <= pair.near:
            return f"rows of q and k are a permutation: rotary order of the other layout ({layout})"
    return ""


def _heads(pair: TensorPair) -> str:
    """Heads in another order."""
    match = _HEADS.fullmatch(pair.name)
    if not match:
        return ""
    axis = 1 if match[1] == "o" else 0
    size = pair.config.text.head_dim if pair.name.startswith(("text.", "cross.")) else _tower_head(pair)
    if pair.a.dim() <= axis or not size or pair.a.shape[axis] % size or pair.a.shape[axis] == size:
        return ""
    a, b = (each.movedim(axis, 0).unflatten(0, (-1, size)).flatten(1) for each in (pair.a, pair.b))
    scale = float(pair.a.abs().max().clamp_min(1e-30))
    order = [next((i for i, mine in enumerate(a) if float((mine - head).abs().max()) <= pair.near * scale), None) for head in b]
    if None in order or order == [*range(len(a))]:
        return ""
    moved = [i for i, source in enumerate(order) if source != i]
    if len(moved) == 2:
        return f"heads {moved[0]} and {moved[1]} are swapped"
    return f"its heads are in the order {', '.join(map(str, order[:16]))}"


def _tower_head(pair: TensorPair) -> int:
    vision = pair.config.vision
    if pair.name.startswith("pool."):
        return getattr(vision, "resampler_head_dim", 0)
    return vision.hidden_size // vision.heads


def _channels(pair: TensorPair) -> str:
    """Patches, [N, 3, p, p] or flat with channels first or last, whose red and blue are exchanged."""
    if not _PATCHES.fullmatch(pair.name) or pair.a[0].numel() % 3:
        return ""
    flat = pair.a.flatten(1)
    for view in (flat.unflatten(1, (3, -1)).flip(1), flat.unflatten(1, (-1, 3)).flip(2)):
        if relative(view.reshape(pair.a.shape), pair.b) <= pair.near:
            return "the channel order of its patches is reversed (BGR in place of RGB)"
    return ""


def _transposed(pair: TensorPair) -> str:
    square = pair.a.dim() == 2 and pair.a.shape[0] == pair.a.shape[1]
    return "it is transposed" if square and relative(pair.a.T, pair.b) <= pair.near else ""


def _newline(pair: TensorPair) -> str:
    """The last row of LLaVA-1.6's table ends a row of patches."""
    if pair.name != "text.embed.weight" or not pair.config.text.newline:
        return ""
    wrong = relative(pair.a[-1:], pair.b[-1:]) > pair.near and relative(pair.a[:-1], pair.b[:-1]) <= pair.near
    return "only the image newline, which ends a row of patches, is wrong" if wrong else ""


def _low_rank(pair: TensorPair) -> str:
    """A difference of few directions over many rows and columns, as an adapter makes it."""
    if pair.a.dim() != 2 or min(pair.a.shape) < LEAST_SIDE:
        return ""
    difference = pair.b - pair.a
    if float((difference.abs().amax(1) > 0).float().mean()) < 0.5:
        return ""
    most = min(FEW, min(pair.a.shape) // 2)
    rank = _rank(difference, most, pair.near * float(pair.a.abs().max()))
    if not rank or rank >= most:
        return ""
    return f"the difference has rank {rank}: looks like a LoRA of rank {rank}"


def _rank(difference: Tensor, most: int, noise: float) -> int:
    """The rank of a matrix up to `most`, by a projection of fixed directions; 0 where more remains than noise."""
    rows, columns = difference.shape
    generator = torch.Generator().manual_seed(0)
    sketch = difference @ torch.randn(columns, min(most + 8, columns), generator=generator)
    basis = torch.linalg.qr(sketch)[0]
    left = float((difference - basis @ (basis.T @ difference)).abs().max())
    size = float(difference.abs().max())
    if left > max(2e-3 * size, noise):
        return 0
    values = torch.linalg.svdvals(basis.T @ difference)
    return int((values > max(1e-3 * float(values[0]), 2 * noise * (rows * columns) ** 0.25)).sum())


def moved_rows(pair: TensorPair, whole: Tensor, axis: int | None) -> Iterator[str]:
    """Clauses for rows or columns in the wrong place of the reference's `whole` tensor, which is sharded along `axis`."""
    for direction, noun in ((0, "rows"), (1, "columns")):
        if axis is not None and axis != direction and whole.shape != pair.b.shape:
            continue
        source, actual, expected = (each if direction == 0 else each.T for each in (whole, pair.b, pair.a))
        if source.shape[1] != actual.shape[1]:
            continue
        middle = len(actual) // 2
        actual_row, expected_row = (_row_at(source, each[middle], pair.near) for each in (actual, expected))
        if actual_row is None or expected_row is None or actual_row == expected_row:
            continue
        moved = torch.roll(source, expected_row - actual_row, 0)[expected_row - middle :][: len(actual)]
        distance = abs(actual_row - expected_row)
        inside = slice(distance, len(actual) - distance)
        if moved.shape == actual.shape and len(moved[inside]) and relative(moved[inside], actual[inside]) <= pair.near:
            yield f"its {noun} lie {distance} too {'early' if actual_row > expected_row else 'late'}"


def _row_at(source: Tensor, row: Tensor, near: float) -> int | None:
    distance = (source - row).abs().amax(1)
    at = int(distance.argmin())
    return at if float(distance[at]) <= near * float(source.abs().max()) and float(row.abs().max()) > 0 else None


def wrong_rows(pair: TensorPair, limit: float) -> str:
    """A clause where only some rows, or only some columns, are wrong."""
    off = (pair.a - pair.b).abs() > limit * pair.a.abs().max()
    off = off.flatten(1) if off.dim() > 1 else off[:, None]
    rows, columns = (torch.nonzero(off.any(axis)).flatten() for axis in (1, 0))
    if 0 < len(rows) < len(off):
        return f"only {len(rows)} of {len(off)} rows, from row {int(rows[0])} on"
    if 0 < len(columns) < off.shape[1]:
        return f"only {len(columns)} of {off.shape[1]} columns, from column {int(columns[0])} on"
    return ""

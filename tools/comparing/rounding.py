"""The judgement of quantised weights by what their rounding allows: a number is off by at most half a step.

A weight w that is rounded to the nearest is stored as q * s with |w - q * s| <= s / 2; at the ends of the range of q it may lie
beyond, since the steps of 4 bits are chosen for the least squared error. Calibrated weights of 4 bits (GPTQ) are not rounded to
the nearest, so there the step of a block is judged by a regression of the block on the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rank_weights import ENDS, StoredNumbers

BEYOND = 2.35  # steps by which a number of 4 bits may lie beyond the range: 8 / 0.86 - 7, see weights/quantize.py
SLACK = 2e-3  # steps: float32 in another order
FIT = 0.3  # steps more for numbers whose step was estimated
# What calibrated numbers may be off by: the median step of a tensor, the step of one block (its logarithm), its zero point.
# GPTQ moves errors to later columns, so that a block has to stand out among those of the other rows. Healthy tensors were seen
# with a median step of 1.055.
TENSOR, BLOCK, ZERO_POINT = 0.08, 0.16, 0.6
SPREADS = 7
GAP = 1.15  # between the distances of wrong blocks and those of all others
ROWS = 1024  # judged at once


@dataclass(frozen=True, slots=True)
class RoundingFault:
    """Numbers that no rounding explains: a clause about them, and the worst distance in steps."""

    text: str
    steps: float


def rounding_fault(expected: Tensor, stored: StoredNumbers, *, nearest: bool = True) -> RoundingFault | None:
    """The fault of a weight [N, K] stored as `stored`, or None. `nearest`: it was rounded to the nearest."""
    if not nearest:
        return _calibrated_fault(expected, stored)
    parts = [slice(first, first + ROWS) for first in range(0, len(expected), ROWS)]
    if all(float(_excess(expected[rows], stored.rows(rows)).max()) <= _slack(stored) for rows in parts):
        factors = torch.cat([_factors(expected[rows], stored.rows(rows)) for rows in parts])
        tolerance = (0.02 if stored.bits == 4 else 0.003) + stored.rounding
        middle = float(factors[torch.isfinite(factors)].median()) if torch.isfinite(factors).any() else 1.0
        if abs(middle - 1) <= tolerance:
            return None
        return RoundingFault(f"all its scales are {middle:.4g} times what its numbers need", 0.5)
    excess = _excess(expected, stored)
    wrong = excess > _slack(stored)
    return RoundingFault(_reason(expected, stored, wrong), float(excess.max()) + 0.5)


def difference(expected: Tensor, stored: StoredNumbers, limit: float) -> str:
    """A clause about numbers that should be equal and are not; `limit`: relative to the largest magnitude."""
    wrong = (expected - stored.value).abs() > limit * expected.abs().max()
    return _reason(expected, stored, wrong)


def _slack(stored: StoredNumbers) -> float:
    return SLACK + stored.rounding * ENDS[stored.bits][1]


def _excess(expected: Tensor, stored: StoredNumbers) -> Tensor:
    """Steps by which each number is farther from the expected one than rounding allows; negative: it is nearer."""
    low, high = ENDS[stored.bits]
    steps = _steps(expected, stored.step) - stored.whole
    beyond = BEYOND if stored.bits == 4 else 0.0
    above = steps - 0.5 - beyond * (stored.whole >= high)
    below = -steps - 0.5 - beyond * (stored.whole <= low)
    return torch.maximum(above, below)


def _steps(expected: Tensor, step: Tensor) -> Tensor:
    """Expected numbers in steps; a step of zero stands for zeros alone."""
    return torch.where(step == 0, torch.where(expected == 0, 0.0, 1e9), expected / torch.where(step == 0, 1.0, step))


def _blocks(values: Tensor, block: int) -> Tensor:
    """[N, K] -> [N, B, block], filled up with zeros."""
    block = block or values.shape[1]
    return torch.nn.functional.pad(values, (0, -values.shape[1] % block)).unflatten(1, (-1, block))


def _factors(expected: Tensor, stored: StoredNumbers) -> Tensor:
    """[N, B]: the stored step over the one that fits the numbers best, by least squares; NaN for blocks of zeros.

    Numbers at the ends of the range do not count, since they may lie beyond it.
    """
    low, high = ENDS[stored.bits]
    inner = (stored.whole > low) & (stored.whole < high)
    whole, steps = stored.whole * inner, _steps(expected, stored.step) * inner
    products, squares = (_blocks(each, stored.block).sum(-1) for each in (whole * steps, whole * whole))
    return torch.where(squares > 0, squares / torch.where(products == 0, 1e-9, products), torch.nan)


def _scaled(stored: StoredNumbers, factors: Tensor) -> StoredNumbers:
    """The numbers with the steps of blocks divided by factors [N, B]."""
    block = stored.block or stored.step.shape[1]
    spread = factors.nan_to_num(1.0).repeat_interleave(block, dim=1)[:, : stored.step.shape[1]]
    return replace(stored, step=stored.step / spread)


def _reason(expected: Tensor, stored: StoredNumbers, wrong: Tensor) -> str:
    """A clause about numbers that are `wrong`, bool [N, K]: scales, zero points, order of nibbles, or where they lie."""
    blocks = _blocks(wrong, stored.block).any(-1)  # [N, B]
    total, count = blocks.numel(), int(blocks.sum())
    row, block = (int(i) for i in torch.nonzero(blocks)[0])
    where = f"row {row}, block {block}" if count == 1 else f"{count} of {total} blocks, from row {row}, block {block} on"
    if not stored.step[wrong].any():
        return f"the scale of {where} is 0"
    factors = _factors(expected, stored)
    if _fit(expected, _scaled(stored, factors), blocks):
        values = factors[blocks]
        factor = float(values.nanmedian())
        alike = bool(((values / factor - 1).abs() < 0.1).float().mean() > 0.9)
        if alike and count > 0.5 * total:
            return f"all its scales are {float(factors.nanmedian()):.4g} times what its numbers need"
        return f"the scale of {where} is {factor:.4g} times what its numbers need" + ("" if alike else " (the median)")
    if (points := _zero_points(expected, stored, blocks)) is not None:
        off = float(points[blocks].median())
        return f"the zero point of {where} is off by {off:+.0f}"
    if stored.bits == 4 and _fit(expected, replace(stored, whole=_swapped(stored.whole)), blocks):
        return f"the two numbers of each byte are swapped (order of nibbles), in {where}"
    at = torch.nonzero(wrong)[0].tolist()
    return f"{int(wrong.sum())} of {wrong.numel()} numbers are off by more than half a step, first row {at[0]}, column {at[1]}"


def _fit(expected: Tensor, stored: StoredNumbers, blocks: Tensor) -> bool:
    """Whether the numbers of these blocks, bool [N, B], are right within half a step and what estimates allow."""
    excess = _blocks(_excess(expected, stored), stored.block)
    return bool((excess[blocks] <= _slack(stored) + FIT).float().mean() > 0.98)


def _zero_points(expected: Tensor, stored: StoredNumbers, blocks: Tensor) -> Tensor | None:
    """[N, B]: whole numbers by which zero points are off, where that explains all of these blocks."""
    off = _blocks(stored.whole - _steps(expected, stored.step), stored.block)
    points = off.median(-1).values.round()
    block = stored.block or stored.whole.shape[1]
    spread = points.repeat_interleave(block, dim=1)[:, : stored.whole.shape[1]]
    right = bool(points[blocks].abs().min() >= 1) and _fit(expected, replace(stored, whole=stored.whole - spread), blocks)
    return points if right else None


def _swapped(whole: Tensor) -> Tensor:
    """Neighbouring columns exchanged."""
    pairs = torch.nn.functional.pad(whole, (0, whole.shape[1] % 2)).unflatten(1, (-1, 2))
    return pairs.flip(-1).flatten(1)[:, : whole.shape[1]]


def _calibrated_fault(expected: Tensor, stored: StoredNumbers) -> RoundingFault | None:
    factors = _factors(expected, stored)
    for clause in _calibrated_clauses(expected, stored, factors):
        steps = (_steps(expected, stored.step) - stored.whole).abs()
        return RoundingFault(clause, float(steps.max()))
    return None


def _calibrated_clauses(expected: Tensor, stored: StoredNumbers, factors: Tensor) -> Iterator[str]:
    middle = float(factors.nanmedian())
    known = torch.isfinite(factors)
    if stored.bits == 4 and _correlation(expected, _swapped(stored.whole) * stored.step) > 0.9 > _correlation(
        expected, stored.value
    ):
        yield "the two numbers of each byte are swapped (order of nibbles)"
    if abs(middle - 1) > TENSOR:
        yield f"all its scales are {middle:.4g} times what the reference needs"
    off = _blocks(stored.whole - _steps(expected, stored.step), stored.block).mean(-1)
    logs = (factors / middle).abs().log()
    for values, limit, noun in ((off, ZERO_POINT, "zero point"), (logs, BLOCK, "scale")):
        distance, spread = _distances(values)
        wrong = known & ((distance > torch.clamp(SPREADS * spread, min=limit)) | ((factors < 0) if noun == "scale" else False))
        if wrong.any() and _apart(distance, wrong, known):
            row, block = (int(i) for i in torch.nonzero(wrong)[0])
            value = float(off[row, block]) if noun == "zero point" else float(factors[row, block])
            more = f"{int(wrong.sum())} blocks, first " if int(wrong.sum()) > 1 else ""
            clause = f"off by {value:+.1f}" if noun == "zero point" else f"{value:.4g} times what the reference needs"
            yield f"the {noun} of {more}row {row}, block {block} is {clause}"


def _apart(distance: Tensor, wrong: Tensor, known: Tensor) -> bool:
    """Whether wrong blocks stand apart from all others, and are not the end of a long tail, as few prompts leave it."""
    return float(distance[wrong].min()) > GAP * float(distance[known & ~wrong].max()) if (known & ~wrong).any() else True


def _distances(values: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [N, B] from the median of the same block of all rows, and the spread of these [1, B]."""
    distance = (values - values.nanmedian(0, keepdim=True).values).abs()
    return distance, 1.4826 * distance.nanmedian(0, keepdim=True).values


def _correlation(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))

"""4-bit weights by GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after another, and the
later columns compensate, as far as possible, for the change in the layer's output.

For inputs x the squared error of an output is d H d', d being what rounding changed in a row of weights and H the second
moment of x. With H^-1 = U'U, U upper triangular, the error e of rounding column j is best compensated by adding
-e / U[j, j] * U[j, k] to every column k > j. The stored layout is that of quantize_w4; blocks get their scales when their first
column is reached.

N rows (output features), K columns (input features).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..model_defs.config import quant_block
from .quantize import best_scale_w4, packed_w4, whole_w4

# Part of the moment's mean diagonal that is added to all of it, as in the paper: other prompts may have other
# inputs. It also bounds the condition number by 100 K, with which float32 is enough.
DAMPING = 0.01
_TOGETHER = 4  # blocks whose later columns are updated at once, for less memory traffic


def gptq_w4(
    weight: Tensor, moment: Tensor, spans: Sequence[tuple[int, int]] | None = None, kind: str = "w4a16"
) -> list[tuple[Tensor, Tensor]]:
    """weight [N, K], moment [K, K] of its inputs -> (q [N, B, block / 2] uint8, scales [N, B] float32) of each span.

    `spans` are the equally many columns of each rank's shard, first and after the last (None: one shard). Blocks are counted
    from the first column of each, and the weight of a row-parallel layer is rounded as a whole. Without any inputs (moment 0)
    every column is rounded to the nearest.
    """
    columns = weight.shape[1]
    spans = spans or [(0, columns)]
    assert [first for first, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == columns, spans
    block = quant_block(spans[0][1], kind)
    factor = _inverse_factor(moment)
    remainder = weight.float().T.contiguous()  # [K, N]: columns still to be rounded, errors of earlier ones added
    blocks = [(start, min(start + block, stop)) for first, stop in spans for start in range(first, stop, block)]
    parts: list[tuple[Tensor, Tensor]] = []
    for at in range(0, len(blocks), _TOGETHER):
        parts += _round_blocks(remainder, factor, blocks[at : at + _TOGETHER])
    shards = []
    for first, stop in spans:
        own = [part for part, (start, _) in zip(parts, blocks, strict=True) if first <= start < stop]
        whole = torch.stack([pad(part.T, (0, block - len(part))) for part, _ in own], dim=1)
        shards.append((packed_w4(whole), torch.stack([scale for _, scale in own], dim=1)))
    return shards


def _round_blocks(remainder: Tensor, factor: Tensor, blocks: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Round adjoining blocks of columns and add their errors to all after them; (integers [block, N], scale [N])."""
    first, last = blocks[0][0], blocks[-1][1]
    inner = factor[first:last, first:last]
    columns, errors = remainder[first:last], torch.empty_like(remainder[first:last])
    rounded = []
    for start, stop in blocks:
        rows = columns[start - first : stop - first]
        scale, whole = best_scale_w4(rows.T.contiguous()), torch.empty_like(rows)
        for i in range(len(rows)):
            j = start - first + i
            whole[i] = whole_w4(columns[j], scale)
            errors[j] = (columns[j] - whole[i] * scale) / inner[j, j]
            columns[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        rounded.append((whole, scale))
    remainder[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return rounded


def _inverse_factor(moment: Tensor) -> Tensor:
    """U [K, K], upper triangular, with U'U the inverse of the damped moment.

    H = R R' with R upper triangular, which is the Cholesky factor of H with rows and columns in reverse; then U = R^-1.
    """
    moment = moment.float()
    level = moment.diagonal().mean()
    damped = moment + torch.eye(len(moment)) * (DAMPING * level if level > 0 else 1.0)
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    del damped
    return torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(moment)), upper=True)

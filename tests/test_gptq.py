"""GPTQ against the definition of what it does: each column is rounded, and the columns after it take the place that leaves
the least error of the output, solved anew each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from staticvl.weights.gptq import DAMPING, gptq_w4
from staticvl.weights.quantize import best_scale_w4, dequantize_w4, quantize_w4, whole_w4

Spans = list[tuple[int, int]]


def correlated(tokens: int, columns: int, seed: int) -> Tensor:
    """Inputs whose features go together, few directions being large."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    return torch.randn(tokens, columns, generator=generator) * torch.logspace(1, -2, columns) @ directions


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_least_squares(weight: Tensor, moment: Tensor, spans: Spans) -> Tensor:
    """The rounded weight [N, K], in float64: no factor of an inverse, every step solves for what is left."""
    wanted = weight.double().numpy()
    metric = moment.double().numpy()
    metric = metric + DAMPING * metric.diagonal().mean() * np.eye(len(metric))
    starts = [(start, min(start + 32, stop)) for first, stop in spans for start in range(first, stop, 32)]
    now, columns = wanted.copy(), wanted.shape[1]
    for start, stop in starts:
        scale = best_scale_w4(torch.tensor(now[:, start:stop]).float())
        for j in range(start, stop):
            now[:, j] = (whole_w4(torch.tensor(now[:, j]).float(), scale) * scale).double()
            if j + 1 < columns:
                done, left = slice(0, j + 1), slice(j + 1, columns)
                off = (now - wanted)[:, done]
                now[:, left] = wanted[:, left] - np.linalg.solve(metric[left, left], metric[left, done] @ off.T).T
    return torch.tensor(now).float()


def rounded(weight: Tensor, moment: Tensor, spans: Spans | None = None) -> Tensor:
    parts = gptq_w4(weight, moment, spans)
    widths = [stop - first for first, stop in spans or [(0, weight.shape[1])]]
    return torch.cat([dequantize_w4(*part, width) for part, width in zip(parts, widths, strict=True)], dim=1)


@pytest.mark.parametrize(
    ("columns", "spans"),
    [(64, [(0, 64)]), (176, [(0, 176)]), (56, [(0, 56)]), (160, [(0, 80), (80, 160)])],
    ids=["two blocks", "several at once", "a part of a block", "two ranks"],
)
def test_rounds_as_solving_for_the_rest_each_time(columns: int, spans: Spans) -> None:
    weight, x = random_weight(5, columns), correlated(300, columns, seed=columns)
    moment = x.T @ x
    torch.testing.assert_close(rounded(weight, moment, spans), by_least_squares(weight, moment, spans), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_leaves_less_error_than_rounding_to_the_nearest(seed: int) -> None:
    weight, x = random_weight(48, 160, seed), correlated(400, 160, seed)

    def error(near: Tensor) -> float:
        return float((x @ (near - weight).T).norm() / (x @ weight.T).norm())

    nearest = error(dequantize_w4(*quantize_w4(weight, 32), 160))
    assert error(rounded(weight, x.T @ x)) < 0.6 * nearest
    other = correlated(400, 160, seed)[torch.randperm(400, generator=torch.Generator().manual_seed(9))]
    assert torch.equal(rounded(weight, x.T @ x), rounded(weight, x.T @ x)), "the same inputs give the same weights"
    assert error(rounded(weight, other.T @ other)) < 0.6 * nearest


def test_blocks_begin_anew_with_each_rank() -> None:
    """A rank's part is laid out like a weight of its own, padded with zeros."""
    x = correlated(200, 112, seed=1)
    parts = gptq_w4(random_weight(6, 112), x.T @ x, [(0, 56), (56, 112)])
    assert [(tuple(q.shape), tuple(scales.shape)) for q, scales in parts] == [((6, 2, 16), (6, 2))] * 2
    for q, scales in parts:
        assert q.dtype == torch.uint8 and scales.dtype == torch.float32
        assert (dequantize_w4(q, scales, 64)[:, 56:] == 0).all()


def test_knowing_nothing_it_rounds_to_the_nearest() -> None:
    """No token came, e.g. to layers that see images when there were none."""
    weight = random_weight(7, 112)
    ((q, scales),) = gptq_w4(weight, torch.zeros(112, 112))
    expected = quantize_w4(weight, 32)
    assert torch.equal(q, expected[0]) and torch.equal(scales, expected[1])


def test_features_that_never_occur_and_tokens_that_are_few() -> None:
    """The moment is singular: three tokens, and features that are always zero."""
    weight, x = random_weight(6, 96), correlated(3, 96, seed=2)
    x[:, 10:40] = 0
    near = rounded(weight, x.T @ x)
    assert near.isfinite().all()
    plain = dequantize_w4(*quantize_w4(weight, 32), 96)
    assert (x @ (near - weight).T).norm() < 0.5 * (x @ (plain - weight).T).norm()
    assert (near - weight).norm() < 1.5 * (plain - weight).norm(), "what did not occur is still kept near"

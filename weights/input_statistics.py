"""Statistics of a linear layer's inputs during a calibration: magnitudes, the second moment, and a sample of tokens.

K input features, n sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SAMPLED = 256  # tokens kept at least, where there are so many; at most twice as many. Errors of outputs are measured on them


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """Statistics of a layer's inputs over all tokens of a calibration, in float32. Without any token they are zeros."""

    tokens: int
    largest: Tensor  # [K], largest |x|
    mean: Tensor  # [K], mean |x|
    moment: Tensor | None  # [K, K], weighted sum of x'x; None: not collected
    rows: Tensor  # [n, K], a sample of the tokens, evenly spaced

    def divided(self, scales: Tensor) -> InputStatistics:
        """The statistics of the inputs divided by `scales` [K], feature by feature."""
        moment = self.moment
        return replace(
            self,
            largest=self.largest / scales,
            mean=self.mean / scales,
            moment=None if moment is None else moment / scales[:, None] / scales,
            rows=self.rows / scales,
        )


class StatisticsCollector:
    """Collects the statistics of a layer's inputs batch by batch; one token in `every` is kept."""

    def __init__(self, features: int, *, moment: bool) -> None:
        self.tokens, self.every = 0, 1
        self.largest, self.total = torch.zeros(features), torch.zeros(features)
        self.moment = torch.zeros(features, features) if moment else None
        self.rows = torch.zeros(0, features)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the inputs x [..., K]; `weights` [tokens] of the second moment (None: 1 each)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        size = rows.abs()
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.total += size.sum(0)
        if self.moment is not None:
            self.moment.addmm_(rows.T if weights is None else rows.T * weights, rows)
        self.rows = torch.cat((self.rows, rows[-self.tokens % self.every :: self.every]))
        self.tokens += len(rows)
        while len(self.rows) > 2 * SAMPLED:
            self.rows, self.every = self.rows[::2].clone(), 2 * self.every

    def statistics(self) -> InputStatistics:
        return InputStatistics(self.tokens, self.largest, self.total / max(self.tokens, 1), self.moment, self.rows)

"""What is known of a linear layer's inputs from a calibration: how large they are, how they go together, and some of them.

K input features, n sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SAMPLED = 256  # tokens at least, if so many came, that errors of outputs are measured on; twice as many at most


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Statistics over all tokens of a calibration; all float32. Without any token they are zeros."""

    tokens: int
    largest: Tensor  # [K], largest |x|
    mean: Tensor  # [K], mean |x|
    moment: Tensor | None  # [K, K], weighted sum of x'x; None: not asked for
    rows: Tensor  # [n, K], tokens taken evenly from all of them

    def divided(self, scales: Tensor) -> Inputs:
        """The same inputs, each feature divided by its scale [K]."""
        moment = self.moment
        return replace(
            self,
            largest=self.largest / scales,
            mean=self.mean / scales,
            moment=None if moment is None else moment / scales[:, None] / scales,
            rows=self.rows / scales,
        )


class Gathering:
    """Takes a layer's inputs as they come, and keeps one token of so many."""

    def __init__(self, features: int, *, moment: bool) -> None:
        self.seen, self.every = 0, 1
        self.largest, self.total = torch.zeros(features), torch.zeros(features)
        self.moment = torch.zeros(features, features) if moment else None
        self.rows = torch.zeros(0, features)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """x [..., K]; `weights` [tokens], what each counts for in the second moment (None: 1)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        size = rows.abs()
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.total += size.sum(0)
        if self.moment is not None:
            self.moment.addmm_(rows.T if weights is None else rows.T * weights, rows)
        self.rows = torch.cat((self.rows, rows[-self.seen % self.every :: self.every]))
        self.seen += len(rows)
        while len(self.rows) > 2 * SAMPLED:
            self.rows, self.every = self.rows[::2].clone(), 2 * self.every

    def found(self) -> Inputs:
        return Inputs(self.seen, self.largest, self.total / max(self.seen, 1), self.moment, self.rows)

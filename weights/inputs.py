"""What is known of a linear layer's inputs from a calibration: how large they are, how they go together, and some of them.

K input features, n sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SAMPLED = 256  # tokens that errors of outputs are measured on


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Statistics over all tokens of a calibration; all float32. Without any token they are zeros."""

    tokens: int
    largest: Tensor  # [K], largest |x|
    mean: Tensor  # [K], mean |x|
    moment: Tensor | None  # [K, K], sum of x'x; None: not asked for
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
    """Takes a layer's inputs as they come; how many tokens will come is known before."""

    def __init__(self, features: int, tokens: int, *, moment: bool) -> None:
        self.expected, self.seen = tokens, 0
        self.largest, self.total = torch.zeros(features), torch.zeros(features)
        self.moment = torch.zeros(features, features) if moment else None
        count = min(tokens, SAMPLED)
        self.wanted = torch.arange(count) * tokens // max(count, 1)  # [n], rising
        self.rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """x [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        size = rows.abs()
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.total += size.sum(0)
        if self.moment is not None:
            self.moment.addmm_(rows.T, rows)
        here = self.wanted[(self.wanted >= self.seen) & (self.wanted < self.seen + len(rows))] - self.seen
        self.rows.append(rows[here])
        self.seen += len(rows)

    def found(self) -> Inputs:
        assert self.seen == self.expected, (self.seen, self.expected)
        features = len(self.largest)
        rows = torch.cat(self.rows) if self.rows else torch.zeros(0, features)
        return Inputs(self.seen, self.largest, self.total / max(self.seen, 1), self.moment, rows)

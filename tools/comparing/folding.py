"""Scales that a calibration folds into neighbouring layers, recovered from the weights of both sides.

SmoothQuant and AWQ divide a producer's channels by powers of two and multiply the columns of the layers after it by them
(weights/smoothing.py). A norm says its scales exactly; those of rows are the nearest power of two of a regression.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...model_defs.config import ModelConfig
from ...weights.calibrated_layers import decoder_folds, layer_of, tower_folds

Read = Callable[[str], tuple[Tensor, Tensor]]  # a parameter's name -> the reference's and the candidate's, float32
ROWS = 0.02  # relative: how near a ratio of norms has to be to a power of two


class Folding:
    """The factors of calibrated layers' weights. `read` reads whole parameters."""

    def __init__(self, config: ModelConfig, quant: str, read: Read) -> None:
        self.config, self.quant, self.read = config, quant, read

    def calibrated(self, name: str) -> bool:
        """Whether a calibration may have changed this parameter."""
        return bool(layer_of(name, self.quant))

    def expected(self, name: str, reference: Tensor) -> Tensor:
        """The reference's weight or bias as the scales of the candidate make it."""
        stem = layer_of(name, self.quant)
        own = name.removeprefix(f"{stem}.")
        value = reference
        for first, fold in self._folds(stem).items():
            if own in fold.consumers:
                value = value * fold.spread(self._scales(stem, first))
            if own in fold.producers and not self._is_norm(own):
                scales = self._scales(stem, first)
                value = value / scales.view(-1, *[1] * (value.dim() - 1))
        return value

    def producer_fault(self, name: str, a: Tensor, b: Tensor) -> str | None:
        """For a norm into which scales are folded: a clause where a ratio is no power of two, else ""; None for another one."""
        stem = layer_of(name, self.quant)
        own = name.removeprefix(f"{stem}.")
        if not self._is_norm(own) or not any(own in fold.producers for fold in self._folds(stem).values()):
            return None
        ratio = torch.where(b == 0, 1.0, a / torch.where(b == 0, 1.0, b))
        off = (ratio / _power_of_two(ratio) - 1).abs()
        wrong = torch.nonzero(off > ROWS).flatten()
        return f"channel {int(wrong[0])} is no power of two of the reference's" if len(wrong) else ""

    def _folds(self, stem: str):
        if stem.startswith("text."):
            return decoder_folds(self.config.text, int(stem.rpartition(".")[2]))
        return tower_folds()

    @staticmethod
    def _is_norm(own: str) -> bool:
        return "norm" in own

    def _scales(self, stem: str, first: str) -> Tensor:
        """The scales [P] of one fold: from its norm, or from the rows of the layer that makes its channels."""
        fold = self._folds(stem)[first]
        producer = fold.producers[0]
        a, b = self.read(f"{stem}.{producer}")
        if self._is_norm(producer):
            return _power_of_two(torch.where(b == 0, 1.0, a / torch.where(b == 0, 1.0, b)))
        before = next(name for name, each in self._folds(stem).items() if producer in each.consumers)
        a = a * self._folds(stem)[before].spread(self._scales(stem, before))
        return _power_of_two((a * a).sum(1) / (a * b).sum(1).clamp_min(1e-30))


def _power_of_two(values: Tensor) -> Tensor:
    return torch.where(values > 0, values.clamp_min(1e-12).log2().round().exp2(), 1.0)

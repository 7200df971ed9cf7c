"""Scales that make a linear layer easier to quantise: its inputs are divided by them, its weight's columns multiplied.

The division is folded into the producer of the inputs, a norm's weight or the rows of the layer before, so the graph stays as
it is and computes the same function. Large input channels then dominate a token's scale less (SmoothQuant, Xiao et al.
2022, arXiv 2211.10438), and columns that matter get finer steps (AWQ, Lin et al. 2023, arXiv 2306.00978). Scales are powers of
two: dividing and multiplying by them is exact in every float type.

P channels of the producer, K input features, N output features, n tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .input_statistics import InputStatistics
from .quantize import dequantize, quantize

# Exponents of the inputs' magnitude that are tried; the weight's magnitude has 1 minus this one where both count.
EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
OUTPUTS = 512  # of each weight, evenly spread, by which scales are judged: all of 11,008 take twenty times as long
GAIN = 0.8  # scales must reduce the squared error to less than this share; a smaller gain is chance


@dataclass(frozen=True, slots=True)
class Fold:
    """One place in a layer where scales can be folded in, between producers and consumers of the same channels.

    Names are those of parameters in the layer. `repeats`: where one key-value head serves several query heads, each run of
    `run` channels of the producer appears so many times among the input features.
    """

    producers: tuple[str, ...]  # parameters whose entry or row p makes channel p
    consumers: tuple[str, ...]  # weights [N, K] that take it
    repeats: int = 1
    run: int = 1

    def spread(self, scales: Tensor) -> Tensor:
        """Scales [P] of channels -> [K] of input features."""
        return scales.view(-1, 1, self.run).expand(-1, self.repeats, -1).reshape(-1)

    def joined(self, sizes: Tensor) -> Tensor:
        """Sizes [K] of input features -> [P], the largest of each channel."""
        return sizes.view(-1, self.repeats, self.run).amax(1).flatten()

    def apply(self, tensors: Mapping[str, Tensor], scales: Tensor) -> dict[str, Tensor]:
        """`tensors` of a layer, float32, with scales [P] folded in; they compute the same function."""
        folded = dict(tensors)
        for name in self.producers:
            if name in tensors:  # a bias may be none
                tensor = tensors[name]
                folded[name] = tensor / scales.view(-1, *[1] * (tensor.dim() - 1))
        for name in self.consumers:
            folded[name] = tensors[name] * self.spread(scales)
        return folded


def best_scales(fold: Fold, tensors: Mapping[str, Tensor], inputs: InputStatistics, quant: str) -> Tensor:
    """The scales [P] with which rounding changes the consumers' outputs least; ones where none of them helps (GAIN)."""
    ones, *others = _scales_to_try(fold, tensors, inputs, quant)
    consumers = [_Consumer.of(tensors[name], inputs.rows) for name in fold.consumers]

    def error(scales: Tensor) -> float:
        by_feature = fold.spread(scales)
        x = inputs.rows / by_feature
        x = _rounded(x) if quant == "w8a8" else x
        return sum(each.error(x, by_feature, quant) for each in consumers)

    best, least = ones, GAIN * error(ones)
    for scales in others:
        if (rounding := error(scales)) < least:
            best, least = scales, rounding
    return best


@dataclass(frozen=True, slots=True, eq=False)
class _Consumer:
    """Some rows [R, K] of a weight, evenly spread, and their outputs [n, R]."""

    weight: Tensor
    exact: Tensor

    @classmethod
    def of(cls, weight: Tensor, rows: Tensor) -> _Consumer:
        some = weight[:: max(1, len(weight) // OUTPUTS)]
        return cls(some, rows @ some.T)

    def error(self, x: Tensor, by_feature: Tensor, quant: str) -> float:
        """The squared error of the outputs of x [n, K] by rounding, relative to the outputs squared."""
        rounded = dequantize(quant, quantize(quant, self.weight * by_feature), self.weight.shape[1])
        return float((x @ rounded.T - self.exact).square().sum() / self.exact.square().sum().clamp_min(1e-30))


def _scales_to_try(fold: Fold, tensors: Mapping[str, Tensor], inputs: InputStatistics, quant: str) -> Iterator[Tensor]:
    """Scales [P] for each of EXPONENTS, after ones."""
    rounds_inputs = quant == "w8a8"
    size = fold.joined(inputs.largest if rounds_inputs else inputs.mean)
    weight = fold.joined(torch.stack([tensors[name].abs().amax(0) for name in fold.consumers]).amax(0))
    yield torch.ones_like(size)
    nonzero = (size > 0) & (weight > 0)
    if not nonzero.any():
        return
    for exponent in EXPONENTS:
        scales = size**exponent / (weight ** (1 - exponent) if rounds_inputs else 1.0)
        scales = torch.where(nonzero, scales, scales[nonzero].log().mean().exp()).log2()
        yield (scales - scales.mean()).round().clamp(-12, 12).exp2()


def _rounded(x: Tensor) -> Tensor:
    """As ops.linear_w8a8 rounds its input: [n, K], a scale for each row."""
    scales = x.abs().amax(-1, keepdim=True) / 127
    return (x / scales.where(scales > 0, 1.0)).round() * scales

"""How far a sum of products in float32 may lie from the exact one, whatever order a processor adds in."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**-24  # half the distance of 1 from the next float32
SURE = 4  # roundings of k terms add up to more than SURE * sqrt(k) of the largest in fewer than one of a thousand sums


def check_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """found [..., N] in float32 has to be x [..., K] times weight [N, K], plus bias [N].

    Each of K roundings is at most UNIT of a partial sum, which is at most sum |x w|, and they go either way. So the limit grows
    with sqrt(K) and with the magnitudes, not with the result, which may cancel out.
    """
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    limit = SURE * weight.shape[1] ** 0.5 * UNIT * magnitude
    worst = ((found.double() - exact).abs() / limit.clamp_min(torch.finfo(torch.float32).tiny)).max()
    assert worst <= 1, f"{float(worst):.3g} times as far off as float32 sums of {weight.shape[1]} products are"

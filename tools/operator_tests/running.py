"""A lowered case on a device: what it computes, and how far that is from the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...runtime.backends.ascend.backend import Device
from ...runtime.backends.ascend.kernel import Kernel
from .case import Operands, Setting
from .lowering import as_fed
from .outcome import DIFFERS, PASSED, REFUSED, CaseInfo, Outcome, first_line
from .tolerances import OPERATOR


def run_case(
    info: CaseInfo, operands: Operands, kernel: Kernel, weights: Sequence[str], setting: Setting, device: Device
) -> Outcome:
    """Run a lowered case; an error of the device is an outcome too. `weights`: their names in the kernel's order."""
    tolerance = OPERATOR[setting.dtype]
    try:
        computed = _computed(operands, kernel, weights, setting, device)
    except Exception as error:  # libraries of a card raise exceptions of any type
        return Outcome(info, REFUSED, tolerance, error=first_line(error))
    distances = {name: distance(computed[name], each.value) for name, each in operands.expected.items()}
    broken = [name for name, far in distances.items() if far > (0 if operands.expected[name].exact else tolerance)]
    worst = max(broken or distances, key=distances.__getitem__)
    return Outcome(info, DIFFERS if broken else PASSED, tolerance, distances[worst], worst)


def _computed(
    operands: Operands, kernel: Kernel, weights: Sequence[str], setting: Setting, device: Device
) -> Mapping[str, Tensor]:
    """Every output of a case, on the host."""
    fed = {name: x.clone().to(device.name) for name, x in as_fed(operands.inputs, setting).items()}
    taken = [device.placed(operands.weights[name].contiguous()) for name in weights]
    with device.context(None), torch.no_grad():
        made = kernel([*taken, *fed.values()])
    returned = [name for name in operands.expected if name.removesuffix(".out") not in fed]
    made = made if isinstance(made, (tuple, list)) else (made,)
    outputs = dict(zip(returned, made, strict=True))
    outputs |= {name: fed[name.removesuffix(".out")] for name in operands.expected if name not in outputs}
    return {name: x.cpu() for name, x in outputs.items()}


def distance(computed: Tensor, expected: Tensor) -> float:
    """The length of the difference over the length of the reference, in the worst row of the last axis.

    Rows of the reference that are nearly nothing count as a thousandth of the others' length; inf where anything is not finite.
    """
    x, y = computed.double().reshape(expected.shape), expected.double()
    if not bool(torch.isfinite(x).all()):
        return math.inf
    lengths = y.norm(dim=-1)
    least = max(1e-3 * float(lengths.square().mean().sqrt()), 1e-30)
    return float(((x - y).norm(dim=-1) / lengths.clamp(min=least)).max())

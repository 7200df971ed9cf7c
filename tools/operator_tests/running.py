"""A lowered case on a device: what comes out, how far it is from the reference, and what that means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.backends.ascend.backend import Device
from ...runtime.backends.ascend.kernel import Kernel
from .case import Case, Operands, Setting
from .lowering import as_fed
from .tolerances import OPERATOR

PASSED, DIFFERS, REFUSED = "passed", "differs", "refused"
SHOWN = 200  # characters of an error


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case. `distance` is None where the device refused it with `error`; inf: numbers that are none."""

    name: str
    operators: tuple[str, ...]
    watches: tuple[str, ...]
    status: str
    tolerance: float
    distance: float | None = None
    output: str = ""  # the one that is furthest away
    error: str = ""


def run_case(case: Case, operands: Operands, kernel: Kernel, weights: Sequence[str], on: tuple[Device, Setting]) -> Outcome:
    """Run a case; an error of the device is an outcome too. `weights`: their names in the kernel's order."""
    device, setting = on
    tolerance = OPERATOR[setting.dtype]
    about: dict[str, Any] = {"name": case.name, "operators": case.operators, "watches": case.watches, "tolerance": tolerance}
    try:
        computed = _computed(operands, kernel, weights, on)
    except Exception as error:  # libraries of a card raise exceptions of any type
        return Outcome(**about, status=REFUSED, error=first_line(error))
    distances = {name: distance(computed[name], each.value) for name, each in operands.expected.items()}
    broken = [name for name, far in distances.items() if far > (0 if operands.expected[name].exact else tolerance)]
    worst = max(broken or distances, key=distances.__getitem__)
    return Outcome(**about, status=DIFFERS if broken else PASSED, distance=distances[worst], output=worst)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _computed(
    operands: Operands, kernel: Kernel, weights: Sequence[str], on: tuple[Device, Setting]
) -> Mapping[str, Tensor]:
    """Every output of a case, on the host."""
    device, setting = on
    fed = {name: x.clone().to(device.name) for name, x in as_fed(operands.inputs, setting).items()}
    taken = [operands.weights[name].contiguous().to(device.name) for name in weights]
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

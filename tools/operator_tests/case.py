"""One test of an operator: a small module of the op vocabulary, operands, and what the module has to give for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .forms import Form


@dataclass(frozen=True, slots=True)
class Expected:
    """An output. `exact`: to the bit, where numbers are only moved."""

    value: Tensor
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Operands:
    """`weights` as a kernel takes them, `inputs` as a graph does: floats in float32, caches in the graph's dtype. Their values
    are numbers of the graph's dtype. `expected` by the names of outputs; that of a cache is its input's with ".out"."""

    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Expected]
    weights: Mapping[str, Tensor] = field(default_factory=dict)


class Numbers:
    """Random numbers of a dtype, the same for the same seed; on the meta device without `data`, for the sizes alone."""

    def __init__(self, dtype: torch.dtype, *, data: bool = True, seed: int = 0) -> None:
        self.dtype, self.data = dtype, data
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Normal numbers in float32, each a number of the dtype."""
        x = torch.randn(shape, generator=self.generator) if self.data else torch.empty(shape, device="meta")
        return self.stored(x.mul_(scale).add_(shift))

    def uniform(self, *shape: int) -> Tensor:
        """From 0 to 1, float32."""
        return torch.rand(shape, generator=self.generator) if self.data else torch.empty(shape, device="meta")

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from low to high, int64."""
        if not self.data:
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def stored(self, x: Tensor) -> Tensor:
        """x rounded to the dtype, in float32."""
        return x.to(self.dtype).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """In what graphs compute: `dtype` float16 or bfloat16, `quant` the artifact's quantisation."""

    dtype: str
    quant: str = "none"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`module` makes the definition, without data; `operands` draws numbers, the same in every process.
    `operators`: types that the compiled graph has to hold, or the case tests something else. `watches`: known faults
    (ge_simulator/card_rules) that the case would show.
    """

    name: str
    form: Form
    operators: tuple[str, ...]
    module: Callable[[], nn.Module]
    operands: Callable[[Numbers], Operands]
    watches: tuple[str, ...] = ()


Builder = Callable[[Form, Setting], Iterator[Case]]  # the cases of a form


def sizes_of(case: Case, setting: Setting) -> Operands:
    """A case's operands without data."""
    with torch.device("meta"):
        return case.operands(Numbers(setting.torch_dtype, data=False))


class Calls(nn.Module):
    """A function of parameters and inputs as a module: call(module, *inputs)."""

    def __init__(self, call: Callable[..., Any], **parameters: tuple[int, ...] | nn.Module) -> None:
        """`parameters`: layers, or shapes of parameters in floats."""
        super().__init__()
        self.call = call
        for name, each in parameters.items():
            setattr(self, name, each if isinstance(each, nn.Module) else _empty(each))

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self, *inputs)


def _empty(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)

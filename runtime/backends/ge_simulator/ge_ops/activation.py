"""Activations, computed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .reduce import upcast
from .registry import UnsupportedError, ge_op


@ge_op("Relu")
def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return x.relu()


@ge_op("Swish")
def swish(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """x * sigmoid(scale * x)."""
    return _swish(x, scale)


@ge_op("SwiGlu")
def swi_glu(x: Tensor, *, dim: int = -1) -> Tensor:
    """silu(a) * b of the halves a and b of x along an axis (Shazeer 2020)."""
    gate, up = upcast(x).chunk(2, dim)
    return (functional.silu(gate) * up).to(x.dtype)


@ge_op("Gelu")
def gelu(x: Tensor) -> Tensor:
    """The tanh form: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    The definition of this operator names x * Phi(x), and its kernels compute that by the tanh form. torchair lowers aten.gelu
    to it whatever `approximate` says; the erf form is GeluV2.
    """
    return functional.gelu(upcast(x), approximate="tanh").to(x.dtype)


@ge_op("GeluV2")
def gelu_v2(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The erf form for "none", the tanh form for "tanh"."""
    if approximate not in ("none", "tanh"):
        raise UnsupportedError(f"attribute approximate = {approximate!r} is not supported; expected 'none' or 'tanh'")
    y = upcast(x)
    if approximate == "tanh":
        return functional.gelu(y, approximate=approximate).to(x.dtype)
    # torch's own, where it computes several values at a time, has 0 times infinity in it.
    return (y * 0.5 * torch.special.erfc(y * -(0.5**0.5))).to(x.dtype)


@ge_op("FastGelu")
def fast_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the kernel's exp(0.851 (x - |x|)) x / (1 + exp(-1.702 |x|)) is that, made safe from overflow."""
    return _swish(x, 1.702)


def _swish(x: Tensor, scale: float) -> Tensor:
    y = upcast(x)
    return (y * (y * scale).sigmoid()).to(x.dtype)


@ge_op("LogSoftmaxV2")
def log_softmax_v2(logits: Tensor, *, axes: Sequence[int] = (-1,)) -> Tensor:
    """The logarithm of the softmax over one axis."""
    return upcast(logits).log_softmax(_one_axis(axes)).to(logits.dtype)


@ge_op("SoftmaxV2")
def softmax_v2(x: Tensor, *, axes: Sequence[int] = (-1,), half_to_float: bool = False) -> Tensor:
    """Softmax over one axis; half_to_float leaves a half's result in float32."""
    y = upcast(x).softmax(_one_axis(axes))
    return y if half_to_float else y.to(x.dtype)


def _one_axis(axes: Sequence[int]) -> int:
    if len(axes) != 1:
        raise UnsupportedError(f"attribute axes = {axes} is not supported; expected one axis")
    return axes[0]

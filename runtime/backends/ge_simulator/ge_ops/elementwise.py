"""Arithmetic, comparisons and choices, element by element; operands broadcast.

torch computes a 16-bit float in float32 and rounds once, as a device does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .registry import NodeContext, UnsupportedError, ge_op, number, same_dtypes

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Log": torch.log,
    "LogicalNot": torch.logical_not,
    "Neg": torch.neg,
    "OnesLike": torch.ones_like,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Rsqrt": torch.rsqrt,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
    "Square": torch.square,
    "Tanh": torch.tanh,
    "ZerosLike": torch.zeros_like,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Equal": torch.eq,
    "FloorDiv": torch.floor_divide,
    "FloorMod": torch.remainder,
    "Greater": torch.gt,
    "GreaterEqual": torch.ge,
    "Less": torch.lt,
    "LessEqual": torch.le,
    "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Mul": torch.mul,
    "NotEqual": torch.ne,
    "Pow": torch.pow,
    "Sub": torch.sub,
}

# Operators whose definitions list no bool.
_NUMBERS_ONLY = frozenset(
    "Abs Add Div FloorDiv FloorMod Maximum Minimum Neg Pow RealDiv Reciprocal Sign Square Sub TruncateDiv".split()
)
_QUOTIENTS = ("FloorDiv", "FloorMod")

_NATURAL = {"base": -1.0, "scale": 1.0, "shift": 0.0}  # base e, of x itself


def _register_unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    @ge_op(name, **(_NATURAL if name in ("Exp", "Log") else {}))
    def _(x: Tensor) -> Tensor:
        _check_numbers(name, x)
        return function(x)


def _register_binary(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    @ge_op(name)
    def _(x1: Tensor, x2: Tensor) -> Tensor:
        same_dtypes(x1=x1, x2=x2)
        _check_numbers(name, x1)
        if name in _QUOTIENTS:
            _check_divisor(x2)
        return function(x1, x2)


def _check_numbers(name: str, x: Tensor) -> None:
    if x.dtype == torch.bool and name in _NUMBERS_ONLY:
        raise UnsupportedError("operands are bool; the operator takes numbers")


def _check_divisor(x2: Tensor) -> None:
    """Raise UnsupportedError for an integer divisor with a 0, whose result on a device is not defined."""
    if not x2.is_floating_point() and bool((x2 == 0).any()):
        raise UnsupportedError("input x2 holds 0; an integer cannot be divided by it")


for _name, _function in _UNARY.items():
    _register_unary(_name, _function)
for _name, _function in _BINARY.items():
    _register_binary(_name, _function)


@ge_op("RealDiv", "Div")
def divide(x1: Tensor, x2: Tensor) -> Tensor:
    """The quotient; of integers, rounded towards zero."""
    same_dtypes(x1=x1, x2=x2)
    _check_numbers("RealDiv", x1)
    _check_divisor(x2)
    return x1 / x2 if x1.is_floating_point() else torch.div(x1, x2, rounding_mode="trunc")


@ge_op("TruncateDiv")
def truncate_div(x1: Tensor, x2: Tensor) -> Tensor:
    """The quotient rounded towards zero."""
    same_dtypes(x1=x1, x2=x2)
    _check_numbers("TruncateDiv", x1)
    _check_divisor(x2)
    return torch.div(x1, x2, rounding_mode="trunc")


@ge_op("Muls")
def muls(x: Tensor, *, value: float) -> Tensor:
    """x times a number."""
    return (x * value).to(x.dtype)


@ge_op("Adds")
def adds(x: Tensor, *, value: float) -> Tensor:
    """x plus a number."""
    return (x + value).to(x.dtype)


@ge_op("AxpyV2")
def axpy(x1: Tensor, x2: Tensor, alpha: Tensor) -> Tensor:
    """x1 + alpha * x2, rounded once."""
    same_dtypes(x1=x1, x2=x2)
    return torch.add(x1, x2, alpha=number(alpha, "alpha"))


@ge_op("ClipByValueV2")
def clip_by_value_v2(x: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    """x clipped to two bounds; the upper one where it is below the lower one."""
    same_dtypes(x=x, clip_value_min=clip_value_min, clip_value_max=clip_value_max)
    return torch.clamp(x, clip_value_min, clip_value_max)


@ge_op("ClipByValue")
def clip_by_value(x: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    """x clipped to two bounds; the lower one where it is above the upper one, as in TensorFlow's operator of this name."""
    same_dtypes(x=x, clip_value_min=clip_value_min, clip_value_max=clip_value_max)
    return torch.maximum(torch.minimum(x, clip_value_max), clip_value_min)


@ge_op("SelectV2")
def select_v2(condition: Tensor, then: Tensor, else_: Tensor) -> Tensor:
    """`then` where condition holds, else `else`; the three broadcast."""
    same_dtypes(then=then, else_=else_)
    return torch.where(condition, then, else_)


@ge_op("Select")
def select(condition: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """x1 where condition holds, else x2, all of one shape; a condition [N] chooses whole rows of x1 and x2 [N, ...]."""
    same_dtypes(x1=x1, x2=x2)
    if condition.dim() == 1 and x1.dim() > 1:
        condition = condition.reshape(-1, *[1] * (x1.dim() - 1))
    elif condition.shape != x1.shape or x1.shape != x2.shape:
        raise UnsupportedError(f"shapes {list(condition.shape)}, {list(x1.shape)}, {list(x2.shape)}; expected one shape")
    return torch.where(condition, x1, x2)


@ge_op("MaskedFill")
def masked_fill(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """x with a number wherever mask holds."""
    same_dtypes(x=x, value=value)
    return x.masked_fill(mask, number(value, "value"))


@ge_op("Cast")
def cast(x: Tensor, *, dst_type: int, context: NodeContext) -> Tensor:
    """x in another dtype; floats become integers towards zero."""
    return x.to(context.dtype(dst_type))

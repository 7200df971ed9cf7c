"""Normalisations: statistics and result in float32, the result rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from .reduce import upcast
from .registry import NodeContext, UnsupportedError, ge_op, integers, same_dtypes


@ge_op("RmsNorm")
def rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * gamma over the last axes, those of gamma; and 1 / sqrt(...) in float32, those axes 1."""
    if tuple(x.shape[x.dim() - gamma.dim() :]) != tuple(gamma.shape):
        raise UnsupportedError(f"gamma {list(gamma.shape)} does not fit the last axes of x {list(x.shape)}")
    y = upcast(x)
    rstd = torch.rsqrt(y.square().mean(tuple(range(-gamma.dim(), 0)), keepdim=True) + epsilon)
    return (y * rstd * upcast(gamma)).to(x.dtype), rstd


@ge_op("AddRmsNorm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """RmsNorm of x1 + x2, which is rounded first and the third output."""
    same_dtypes(x1=x1, x2=x2)
    x = x1 + x2
    y, rstd = rms_norm(x, gamma, epsilon=epsilon)
    return y, rstd, x


@ge_op("LayerNormV4")
def layer_norm_v4(
    x: Tensor,
    normalized_shape: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    context: NodeContext,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation over the last axes (Ba et al. 2016), the mean and 1 / sqrt(variance + epsilon), those axes 1."""
    shape = integers(normalized_shape)
    if list(x.shape[x.dim() - len(shape) :]) != shape:
        raise UnsupportedError(f"normalized_shape {shape} does not fit the last axes of x {list(x.shape)}")
    return _layer_norm(x, gamma, beta, epsilon, x.dim() - len(shape), context)


@ge_op("LayerNorm", "LayerNormV3")
def layer_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    begin_norm_axis: int = 0,
    begin_params_axis: int = 0,
    epsilon: float,
    context: NodeContext,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation over the axes from begin_norm_axis on; LayerNormV3's third output is 1 / sqrt(variance + epsilon)."""
    first = begin_norm_axis % x.dim()
    if begin_params_axis % x.dim() != first:
        raise UnsupportedError(f"attribute begin_params_axis = {begin_params_axis}; expected that of begin_norm_axis")
    y, mean, rstd = _layer_norm(x, gamma, beta, epsilon, first, context)
    if context.node.type == "LayerNormV3":
        return y, mean, rstd
    variance = upcast(x).var(tuple(range(first, x.dim())), keepdim=True, correction=0)
    return y, mean, variance.to(mean.dtype)


def _layer_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, epsilon: float, first: int, context: NodeContext
) -> tuple[Tensor, Tensor, Tensor]:
    axes = tuple(range(first, x.dim()))
    y = upcast(x)
    mean = y.mean(axes, keepdim=True)
    rstd = torch.rsqrt(y.var(axes, keepdim=True, correction=0) + epsilon)
    y = (y - mean) * rstd
    y = y if gamma is None else y * upcast(gamma)
    y = y if beta is None else y + upcast(beta)
    # The definition leaves the statistics' dtype open; torchair knows it where the traced program does.
    return y.to(x.dtype), mean.to(context.output_dtype(1) or x.dtype), rstd.to(context.output_dtype(2) or x.dtype)

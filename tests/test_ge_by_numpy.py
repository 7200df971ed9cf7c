"""GE operators on the simulator against numpy, written from the public operator definitions, and operands they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraphError

from .ge_formulas import FLOATS, close, ints, rand
from .ge_graphs import compute
from .need_torchair import skip_without_torchair

skip_without_torchair()

Array = np.ndarray
Make = Callable[..., Any]
INF = math.inf


def const(ge: Any, values: Any) -> Any:
    from torchair.ge import DataType

    return ge.Const(values, dtype=DataType.DT_INT64)


def cumulated(x: Array, axis: int, *, exclusive: bool = False, reverse: bool = False) -> Array:
    """One place at a time."""
    moved, out = np.moveaxis(x, axis, 0), np.zeros_like(np.moveaxis(x, axis, 0))
    places = range(len(moved))
    for i in places:
        taken = [j for j in places if (j >= i if reverse else j <= i) and not (exclusive and j == i)]
        out[i] = moved[taken].sum(0)
    return np.moveaxis(out, 0, axis)


def scattered(data: Array, indices: Array, updates: Array, axis: int, reduction: str) -> Array:
    out = data.copy()
    for place in np.ndindex(indices.shape):
        target = list(place)
        target[axis] = indices[place]
        old, new = out[tuple(target)], updates[place]
        out[tuple(target)] = {"none": new, "add": old + new, "mul": old * new}[reduction]
    return out


def part(x: Array, diagonal: int, lower: bool) -> Array:
    rows, columns = np.indices(x.shape[-2:])
    return np.where(columns - rows <= diagonal if lower else columns - rows >= diagonal, x, 0)


def log_softmax(x: Array, axis: int) -> Array:
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def phi_form(x: Array) -> Array:
    """x Phi(x)."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


PLACES = ints(2, 0, 1, 1, 2, 0).reshape(2, 3)

# operator -> several of: how torchair's constructor is called, numpy's answer, floating-point operands
CASES: dict[str, list[tuple[Make, Callable[..., Array], tuple[Tensor, ...]]]] = {
    "Cumsum": [
        (lambda ge, x: ge.Cumsum(x, const(ge, 1)), lambda x: cumulated(x, 1), (rand(3, 5),)),
        (
            lambda ge, x: ge.Cumsum(x, const(ge, 0), exclusive=True),
            lambda x: cumulated(x, 0, exclusive=True),
            (rand(3, 5),),
        ),
        (
            lambda ge, x: ge.Cumsum(x, const(ge, -1), exclusive=True, reverse=True),
            lambda x: cumulated(x, -1, exclusive=True, reverse=True),
            (rand(2, 3, 4),),
        ),
    ],
    "CumsumD": [
        (lambda ge, x: ge.CumsumD(x, axis=0), lambda x: cumulated(x, 0), (rand(3, 5),)),
        (lambda ge, x: ge.CumsumD(x, axis=1, reverse=True), lambda x: cumulated(x, 1, reverse=True), (rand(3, 5),)),
    ],
    "ExpandDims": [
        (lambda ge, x: ge.ExpandDims(x, const(ge, 1)), lambda x: x[:, None], (rand(3, 5),)),
        (lambda ge, x: ge.ExpandDims(x, const(ge, -1)), lambda x: x[..., None], (rand(3, 5),)),
    ],
    "Tril": [
        (lambda ge, x: ge.Tril(x), lambda x: part(x, 0, True), (rand(4, 5),)),
        (lambda ge, x: ge.Tril(x, diagonal=-1), lambda x: part(x, -1, True), (rand(2, 4, 5),)),
    ],
    "Triu": [
        (lambda ge, x: ge.Triu(x), lambda x: part(x, 0, False), (rand(4, 5),)),
        (lambda ge, x: ge.Triu(x, diagonal=2), lambda x: part(x, 2, False), (rand(2, 4, 5),)),
    ],
    "LogSoftmaxV2": [
        (lambda ge, x: ge.LogSoftmaxV2(x), lambda x: log_softmax(x, -1), (rand(3, 50),)),
        (lambda ge, x: ge.LogSoftmaxV2(x, axes=[0]), lambda x: log_softmax(x, 0), (rand(3, 50),)),
    ],
    "ScatterElements": [
        (
            lambda ge, x, y, axis=axis, how=how, at=at: ge.ScatterElements(
                x, const(ge, at.tolist()), y, axis=axis, reduction=how
            ),
            lambda x, y, axis=axis, how=how, at=at: scattered(x, at.numpy(), y, axis, how),
            (rand(3, 4), rand(2, 3)),
        )
        for axis, how, at in ((1, "none", PLACES), (0, "none", PLACES), (1, "add", PLACES * 0), (0, "mul", PLACES * 0))
    ],
    "GatherV2": [
        (lambda ge, x: ge.GatherV2(x, const(ge, 2), [0]), lambda x: x[2], (rand(5),)),
        (lambda ge, x: ge.GatherV2(x, const(ge, 1), [1]), lambda x: x[:, 1], (rand(3, 5),)),
    ],
    "ClipByValue": [
        (
            lambda ge, x, low, high: ge.ClipByValue(x, low, high),
            lambda x, low, high: np.maximum(np.minimum(x, high), low),
            (rand(3, 5), torch.tensor(low), torch.tensor(high)),
        )
        for low, high in ((-0.5, 0.25), (0.5, -0.5))
    ],
    "ClipByValueV2": [
        (
            lambda ge, x, low, high: ge.ClipByValueV2(x, low, high),
            lambda x, low, high: np.minimum(np.maximum(x, low), high),
            (rand(3, 5), torch.tensor(low), torch.tensor(high)),
        )
        for low, high in ((-0.5, 0.25), (0.5, -0.5))
    ],
    "GeluV2": [
        (lambda ge, x: ge.GeluV2(x), phi_form, (torch.tensor([INF, 1.0, -1.0, 0.0] * 5),)),  # several at a time, and a rest
        (lambda ge, x: ge.GeluV2(x, approximate="tanh"), lambda x: np.where(x == INF, INF, 0), (torch.tensor([INF, 0.0] * 9),)),
    ],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def test_as_numpy_has_it(name: str, number: int) -> None:
    make, formula, operands = CASES[name][number]
    for dtype in FLOATS:
        given = [each.to(dtype) for each in operands]
        expected = torch.from_numpy(np.asarray(formula(*[each.double().numpy() for each in given])))
        for wide in (False, True):
            (found,) = compute(make, *given, wide=wide)
            assert found.shape == expected.shape
            close(found, expected, torch.float32 if wide else dtype)


@pytest.mark.parametrize("exclusive", [False, True])
def test_whole_numbers_add_up_in_their_own_type(exclusive: bool) -> None:
    x = ints(1, 2, 3, 4, dtype=torch.int32)
    (found,) = compute(lambda ge, x: ge.Cumsum(x, const(ge, 0), exclusive=exclusive), x)
    assert found.dtype == torch.int32 and found.tolist() == ([0, 1, 3, 6] if exclusive else [1, 3, 6, 10])


TRUE = torch.tensor([True, False])
REFUSED: dict[str, tuple[Make, tuple[Tensor, ...], str]] = {
    **{
        name: (
            lambda ge, a, b, name=name: getattr(ge, name)(a, b),
            (TRUE, TRUE),
            f"{name}: operands are bool; the operator takes",
        )
        for name in ("Sub", "RealDiv", "Div", "FloorDiv", "FloorMod", "TruncateDiv", "Maximum", "Pow")
    },
    "Neg": (lambda ge, a: ge.Neg(a), (TRUE,), "Neg: operands are bool"),
    "Abs": (lambda ge, a: ge.Abs(a), (TRUE,), "Abs: operands are bool"),
    **{
        f"{name} by 0": (
            lambda ge, a, b, name=name: getattr(ge, name)(a, b),
            (ints(1, 2), ints(1, 0)),
            f"{name}: input x2 holds 0; an integer cannot be divided by it",
        )
        for name in ("FloorDiv", "FloorMod", "RealDiv", "Div", "TruncateDiv")
    },
    "an index of no part": (lambda ge, x: ge.GatherV2(x, const(ge, 5), [0]), (rand(5),), "index 5 is out of range"),
    "a place twice": (
        lambda ge, x, y: ge.ScatterElements(x, const(ge, [[1, 1]]), y, axis=1),
        (rand(1, 4), rand(1, 2)),
        "names a place twice",
    ),
    "updates of another shape": (
        lambda ge, x, y: ge.ScatterElements(x, const(ge, [[1, 0]]), y, axis=1),
        (rand(1, 4), rand(1, 3)),
        r"updates \[1, 3\] do not fit",
    ),
    "another reduction": (
        lambda ge, x, y: ge.ScatterElements(x, const(ge, [[1]]), y, axis=1, reduction="max"),
        (rand(1, 4), rand(1, 1)),
        "reduction = 'max' is not supported; expected none, add or mul",
    ),
    "a torch error": (lambda ge, x: ge.Tril(x), (rand(5),), "Tril Tril: tril: input tensor must have at least 2 dimensions"),
    **{
        f"groups of {group}": (
            lambda ge, x, w, s, group=group: ge.WeightQuantBatchMatmulV2(
                x, w, s, None, None, None, None, antiquant_group_size=group
            ),
            (rand(1, 64).half(), torch.zeros(64, 4, dtype=torch.int8), rand(-(-64 // group), 4).half()),
            f"antiquant_group_size = {group} with 64 input features; expected 0, or a multiple of 32",
        )
        for group in (16, 48, 64, 96)
    },
    "rows in three axes": (
        lambda ge, x, w, s: ge.WeightQuantBatchMatmulV2(x, w, s, None, None, None, None),
        (rand(1, 2, 64).half(), torch.zeros(64, 4, dtype=torch.int8), rand(4).half()),
        r"input x has the shape \[1, 2, 64\]; expected two axes",
    ),
    "a scale in bfloat16 for float16": (
        lambda ge, x, w, s: ge.QuantBatchMatmulV3(x, w, s, None, None, None, dtype=1),
        (torch.zeros(1, 4, dtype=torch.int8), torch.zeros(4, 4, dtype=torch.int8), rand(4).bfloat16()),
        "input scale is torch.bfloat16; an output in float16 takes float32",
    ),
    "a bias in float16 for bfloat16": (
        lambda ge, x, w, s, b: ge.QuantBatchMatmulV3(x, w, s, None, b, None, dtype=27),
        (torch.zeros(1, 4, dtype=torch.int8), torch.zeros(4, 4, dtype=torch.int8), rand(4), rand(4).half()),
        "input bias is torch.float16; an output in torch.bfloat16 takes torch.bfloat16, float32 or int32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    make, operands, message = REFUSED[name]
    with pytest.raises(GeGraphError, match=message):
        compute(make, *operands)

"""GE operators on the simulator against plain torch formulas.

Every operator is built from torchair's own constructor and run three ways: in float32, in float16 and bfloat16 (one rounding
of the float32 answer), and with `wide` (the float32 answer of the rounded operands).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraphError, parse
from staticvl.runtime.backends.ge_simulator.ge_ops import OPS
from staticvl.runtime.backends.ge_simulator.simulator import Simulator

from .ge_formulas import (
    FLOATS,
    HALVES,
    close,
    convolved,
    ints,
    rand,
    rms,
    standard,
    turned,
)
from .ge_graphs import build, compute
from .need_torchair import skip_without_torchair
from .test_ge_by_numpy import CASES as BY_NUMPY

skip_without_torchair()

Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]


def const(ge: Any, values: Any) -> Any:
    from torchair.ge import DataType

    return ge.Const(values, dtype=DataType.DT_INT64)


# operator -> (how torchair's constructor is called, what it has to compute in float32, floating-point operands)
FLOAT_CASES: dict[str, Case] = {
    "Abs": (lambda ge, x: ge.Abs(x), lambda x: torch.where(x < 0, -x, x), (rand(3, 5),)),
    "Add": (lambda ge, a, b: ge.Add(a, b), lambda a, b: a - (-b), (rand(3, 5), rand(5))),
    "AddRmsNorm": (
        lambda ge, a, b, w: ge.AddRmsNorm(a, b, w, epsilon=0.5)[0],
        lambda a, b, w: rms((a + b), w, 0.5),
        (torch.tensor([[1.0, 2, -3, 0.5]]), torch.tensor([[0.5, 0.25, 1, 0]]), rand(4)),
    ),
    "Adds": (lambda ge, x: ge.Adds(x, value=0.75), lambda x: x + 0.75, (rand(3, 5),)),
    "ApplyRotaryPosEmb": (
        lambda ge, q, k, c, s: ge.ApplyRotaryPosEmb(q, k, c, s, layout=1, rotary_mode="half"),
        lambda q, k, c, s: (turned(q, c, s), turned(k, c, s)),
        (rand(2, 3, 4, 64), rand(2, 3, 2, 64), rand(2, 3, 1, 64), rand(2, 4, 1, 64)[:, :3].contiguous()),
    ),
    "AxpyV2": (lambda ge, a, b: ge.AxpyV2(a, b, 2.5), lambda a, b: a + 2.5 * b, (rand(3, 5), rand(3, 5) * 2)),
    "BatchMatMul": (
        lambda ge, a, b: ge.BatchMatMul(a, b, adj_x1=True),
        lambda a, b: torch.einsum("bkm,bkn->bmn", a, b),
        (rand(2, 64, 3), rand(2, 64, 5)),
    ),
    "BatchMatMulV2": (
        lambda ge, a, b, c: ge.BatchMatMulV2(a, b, c, None, adj_x2=True),
        lambda a, b, c: torch.einsum("bmk,bnk->bmn", a, b) + c,
        (rand(2, 3, 64), rand(2, 5, 64), rand(5)),
    ),
    "BroadcastTo": (lambda ge, x: ge.BroadcastTo(x, [2, 3, 5]), lambda x: torch.stack((x, x)), (rand(3, 5),)),
    "Ceil": (lambda ge, x: ge.Ceil(x), lambda x: -torch.floor(-x), (rand(3, 5),)),
    "ClipByValue": (
        lambda ge, x: ge.ClipByValue(x, -0.5, 0.5),
        lambda x: x.where(x > -0.5, -0.5).where(x < 0.5, 0.5),
        (rand(3, 5),),
    ),
    "ClipByValueV2": (
        lambda ge, x, a, b: ge.ClipByValueV2(x, a, b),
        lambda x, a, b: torch.maximum(torch.minimum(x, b), a),
        (rand(3, 5), torch.tensor(-0.5), torch.tensor(0.5)),
    ),
    "ConcatD": (
        lambda ge, a, b: ge.ConcatD([a, b], concat_dim=1, N=2),
        lambda a, b: torch.cat((a, b), 1),
        (rand(3, 2), rand(3, 4)),
    ),
    "ConcatV2": (lambda ge, a, b: ge.ConcatV2([a, b], -1, N=2), lambda a, b: torch.cat((a, b), 1), (rand(3, 2), rand(3, 4))),
    "Conv2D": (
        lambda ge, x, w, b: ge.Conv2D(x, w, b, None, strides=[1, 1, 2, 2], pads=[0, 0, 0, 0], data_format="NCHW"),
        lambda x, w, b: convolved(x, w, b, 2),
        (rand(2, 3, 8, 6), rand(4, 3, 2, 2), rand(4)),
    ),
    "Cos": (lambda ge, x: ge.Cos(x), lambda x: torch.sin(x + math.pi / 2), (rand(3, 5),)),
    "Div": (lambda ge, a, b: ge.Div(a, b), lambda a, b: a * (1 / b), (rand(3, 5), rand(3, 4, 5)[:, 0].contiguous())),
    "Erf": (lambda ge, x: ge.Erf(x), torch.special.erf, (rand(3, 5),)),
    "Exp": (lambda ge, x: ge.Exp(x), lambda x: math.e**x, (rand(3, 5),)),
    "Expand": (lambda ge, x: ge.Expand(x, [2, 1, 5]), lambda x: torch.stack((x, x)), (rand(3, 5),)),
    "FastGelu": (lambda ge, x: ge.FastGelu(x), lambda x: x / (1 + torch.exp(-1.702 * x)), (rand(3, 50),)),
    "FillD": (lambda ge, x: ge.FillD(x, dims=[2, 3]), lambda x: x * torch.ones(2, 3), (torch.tensor(0.75),)),
    "Floor": (lambda ge, x: ge.Floor(x), lambda x: -torch.ceil(-x), (rand(3, 5),)),
    "Gather": (lambda ge, x: ge.Gather(x, const(ge, [[2, 0]])), lambda x: torch.stack((x[2], x[0]))[None], (rand(3, 5),)),
    "GatherElements": (
        lambda ge, x: ge.GatherElements(x, const(ge, [[4], [0], [1]]), dim=1),
        lambda x: torch.stack((x[0, 4:], x[1, :1], x[2, 1:2])),
        (rand(3, 5),),
    ),
    "GatherV2": (
        lambda ge, x: ge.GatherV2(x, const(ge, [[2, 0]]), [1]),
        lambda x: torch.stack((x[:, 2], x[:, 0]), 1)[:, None],
        (rand(3, 5),),
    ),
    "Gelu": (
        lambda ge, x: ge.Gelu(x),
        lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        (rand(3, 50),),
    ),
    "GeluV2": (
        lambda ge, x: ge.GeluV2(x, approximate="none"),
        lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
        (rand(3, 50),),
    ),
    "Identity": (lambda ge, x: ge.Identity(x), lambda x: x, (rand(3, 5),)),
    "IndexByTensor": (
        lambda ge, x: ge.IndexByTensor(x, [const(ge, [2, -1])], indices_mask=[0, 1]),
        lambda x: torch.stack((x[:, 2], x[:, 4]), 1),
        (rand(3, 5),),
    ),
    "LayerNorm": (
        lambda ge, x, w, b: ge.LayerNorm(x, w, b, begin_norm_axis=1, begin_params_axis=1, epsilon=1e-5),
        lambda x, w, b: (standard(x, 1) * w + b, x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)),
        (rand(3, 16), rand(16), rand(16) * 2),
    ),
    "LayerNormV3": (
        lambda ge, x, w, b: ge.LayerNormV3(x, w, b, begin_norm_axis=-1, begin_params_axis=-1, epsilon=1e-5)[0],
        lambda x, w, b: standard(x, 1) * w + b,
        (rand(3, 16), rand(16), rand(16) * 2),
    ),
    "LayerNormV4": (
        lambda ge, x, w, b: ge.LayerNormV4(x, [4, 4], w, b, epsilon=1e-5)[0],
        lambda x, w, b: standard(x, 2) * w + b,
        (rand(3, 4, 4), rand(4, 4), rand(4, 4) * 2),
    ),
    "Log": (lambda ge, x: ge.Log(x), lambda x: torch.log2(x) * math.log(2), (rand(3, 5).abs() + 2,)),
    "MaskedFill": (
        lambda ge, x, y: ge.MaskedFill(x, ge.Greater(x, y), y),
        torch.minimum,
        (rand(3, 5), torch.tensor(0.25)),
    ),
    "MatMul": (
        lambda ge, a, b, c: ge.MatMul(a, b, c, transpose_x2=True),
        lambda a, b, c: torch.einsum("mk,nk->mn", a, b) + c,
        (rand(3, 64), rand(5, 64), rand(5)),
    ),
    "MatMulV2": (
        lambda ge, a, b: ge.MatMulV2(a, b, None, None, transpose_x1=True),
        lambda a, b: torch.einsum("km,kn->mn", a, b),
        (rand(64, 3), rand(64, 5)),
    ),
    "Maximum": (lambda ge, a, b: ge.Maximum(a, b), lambda a, b: a.where(a > b, b), (rand(3, 5), rand(5))),
    "Minimum": (lambda ge, a, b: ge.Minimum(a, b), lambda a, b: a.where(a < b, b), (rand(3, 5), rand(5))),
    "Mul": (lambda ge, a, b: ge.Mul(a, b), lambda a, b: a / (1 / b), (rand(3, 5), rand(5))),
    "Muls": (lambda ge, x: ge.Muls(x, value=-1.5), lambda x: x / -(2 / 3), (rand(3, 5),)),
    "Neg": (lambda ge, x: ge.Neg(x), lambda x: 0 - x, (rand(3, 5),)),
    "OnesLike": (lambda ge, x: ge.OnesLike(x), lambda x: x * 0 + 1, (rand(3, 5),)),
    "Pack": (
        lambda ge, a, b: ge.Pack([a, b], N=2, axis=1),
        lambda a, b: torch.cat((a[:, None], b[:, None]), 1),
        (rand(3, 5), rand(3, 5) + 1),
    ),
    "Pad": (
        lambda ge, x: ge.Pad(x, const(ge, [[1, 0], [0, 2]])),
        lambda x: torch.cat((torch.zeros(1, 7), torch.cat((x, torch.zeros(3, 2)), 1))),
        (rand(3, 5),),
    ),
    "PadV2": (
        lambda ge, x, y: ge.PadV2(x, const(ge, [[0, 0], [1, 0]]), y),
        lambda x, y: torch.cat((y.expand(3, 1), x), 1),
        (rand(3, 5), torch.tensor(2.0)),
    ),
    "PadV3": (
        lambda ge, x, y: ge.PadV3(x, const(ge, [0, 0, 1, 0]), y),
        lambda x, y: torch.cat((y.expand(3, 1), x), 1),
        (rand(3, 5), torch.tensor(2.0)),
    ),
    "Pow": (lambda ge, a, b: ge.Pow(a, b), lambda a, b: torch.exp(torch.log(a) * b), (rand(3, 5).abs() + 0.5, rand(3, 5))),
    "RealDiv": (lambda ge, a, b: ge.RealDiv(a, b), lambda a, b: a * (1 / b), (rand(3, 5), rand(3, 4, 5)[:, 0].contiguous())),
    "Reciprocal": (lambda ge, x: ge.Reciprocal(x), lambda x: x / (x * x), (rand(3, 5),)),
    "ReduceMax": (lambda ge, x: ge.ReduceMax(x, [1]), lambda x: x.sort(1).values[:, -1], (rand(3, 50),)),
    "ReduceMean": (
        lambda ge, x: ge.ReduceMean(x, [1], keep_dims=True),
        lambda x: x @ torch.full((50, 1), 0.02),
        (rand(3, 50) + 1,),
    ),
    "ReduceMeanD": (
        lambda ge, x: ge.ReduceMeanD(x, axes=[0], keep_dims=True, noop_with_empty_axes=True),
        lambda x: torch.full((1, 50), 0.02) @ x,
        (rand(50, 3) + 1,),
    ),
    "ReduceMin": (lambda ge, x: ge.ReduceMin(x, [1], keep_dims=True), lambda x: x.sort(1).values[:, :1], (rand(3, 50),)),
    "ReduceSum": (lambda ge, x: ge.ReduceSum(x, [0, 1]), lambda x: torch.ones(3) @ x @ torch.ones(50), (rand(3, 50) + 1,)),
    "ReduceSumD": (
        lambda ge, x: ge.ReduceSumD(x, axes=[1], keep_dims=True),
        lambda x: x @ torch.ones(50, 1),
        (rand(3, 50) + 1,),
    ),
    "Relu": (lambda ge, x: ge.Relu(x), lambda x: (x + x.abs()) / 2, (rand(3, 5),)),
    "Reshape": (lambda ge, x: ge.Reshape(x, const(ge, [5, -1])), lambda x: x.view(5, 3), (rand(3, 5),)),
    "RmsNorm": (
        lambda ge, x, w: ge.RmsNorm(x, w, epsilon=0.5)[0],
        lambda x, w: rms(x, w, 0.5),
        (rand(3, 64), rand(64)),
    ),
    "RotaryMul": (
        lambda ge, x, c, s: ge.RotaryMul(x, c, s),
        turned,
        (rand(2, 3, 4, 8), rand(2, 3, 1, 8), rand(2, 4, 1, 8)[:, :3].contiguous()),
    ),
    "Round": (lambda ge, x: ge.Round(x), lambda x: torch.floor(x + 0.5), (rand(3, 5),)),
    "Rsqrt": (lambda ge, x: ge.Rsqrt(x), lambda x: x**-0.5, (rand(3, 5).abs() + 0.1,)),
    "Select": (lambda ge, a, b: ge.Select(ge.Less(a, b), a, b), torch.minimum, (rand(3, 5), rand(3, 5) * 2)),
    "SelectV2": (lambda ge, a, b: ge.SelectV2(ge.Less(a, b), a, b), torch.minimum, (rand(3, 5), rand(5))),
    "Sigmoid": (lambda ge, x: ge.Sigmoid(x), lambda x: 1 / (1 + torch.exp(-x)), (rand(3, 5),)),
    "Sign": (lambda ge, x: ge.Sign(x), lambda x: x / x.abs(), (rand(3, 5),)),
    "Sin": (lambda ge, x: ge.Sin(x), lambda x: torch.cos(x - math.pi / 2), (rand(3, 5),)),
    "Slice": (lambda ge, x: ge.Slice(x, const(ge, [1, 2]), const(ge, [-1, 2])), lambda x: x[1:, 2:4], (rand(3, 5),)),
    "SoftmaxV2": (
        lambda ge, x: ge.SoftmaxV2(x, axes=[1]),
        lambda x: torch.exp(x) / torch.exp(x).sum(1, keepdim=True),
        (rand(3, 50, 2),),
    ),
    "Split": (lambda ge, x: ge.Split(ge.Const(1, dtype=3), x, num_split=2), lambda x: (x[:, :2], x[:, 2:]), (rand(3, 4),)),
    "SplitD": (lambda ge, x: ge.SplitD(x, split_dim=1, num_split=2), lambda x: (x[:, :2], x[:, 2:]), (rand(3, 4),)),
    "SplitV": (
        lambda ge, x: ge.SplitV(x, const(ge, [1, 3]), ge.Const(1, dtype=3), num_split=2),
        lambda x: (x[:, :1], x[:, 1:]),
        (rand(3, 4),),
    ),
    "SplitVD": (
        lambda ge, x: ge.SplitVD(x, size_splits=[1, -1], split_dim=1, num_split=2),
        lambda x: (x[:, :1], x[:, 1:]),
        (rand(3, 4),),
    ),
    "Sqrt": (lambda ge, x: ge.Sqrt(x), lambda x: x**0.5, (rand(3, 5).abs(),)),
    "Square": (lambda ge, x: ge.Square(x), lambda x: x**2, (rand(3, 5),)),
    "Squeeze": (lambda ge, x: ge.Squeeze(x, axis=[1]), lambda x: x[:, 0], (rand(3, 1, 5),)),
    "StridedSlice": (
        lambda ge, x: ge.StridedSlice(
            x, const(ge, [1, 1]), const(ge, [2, 0]), const(ge, [1, 2]), shrink_axis_mask=1, end_mask=2
        ),
        lambda x: x[1, 1::2],
        (rand(3, 5),),
    ),
    "StridedSliceV2": (
        lambda ge, x: ge.StridedSliceV2(
            x, const(ge, [1]), const(ge, [2147483647]), axes=const(ge, [-1]), strides=const(ge, [2])
        ),
        lambda x: x[:, 1::2],
        (rand(3, 5),),
    ),
    "Sub": (lambda ge, a, b: ge.Sub(a, b), lambda a, b: a + (-b), (rand(3, 5), rand(5))),
    "SwiGlu": (lambda ge, x: ge.SwiGlu(x, dim=-1), lambda x: x[:, :8] / (1 + torch.exp(-x[:, :8])) * x[:, 8:], (rand(3, 16),)),
    "Swish": (lambda ge, x: ge.Swish(x, scale=1.5), lambda x: x / (1 + torch.exp(-1.5 * x)), (rand(3, 16),)),
    "Tanh": (lambda ge, x: ge.Tanh(x), lambda x: 1 - 2 / (torch.exp(2 * x) + 1), (rand(3, 5),)),
    "TensorMove": (lambda ge, x: ge.TensorMove(x), lambda x: x, (rand(3, 5),)),
    "Tile": (lambda ge, x: ge.Tile(x, const(ge, [2, 1])), lambda x: torch.cat((x, x)), (rand(3, 5),)),
    "TileD": (lambda ge, x: ge.TileD(x, multiples=[1, 2]), lambda x: torch.cat((x, x), 1), (rand(3, 5),)),
    "Transpose": (lambda ge, x: ge.Transpose(x, const(ge, [1, 2, 0])), lambda x: torch.einsum("abc->bca", x), (rand(2, 3, 5),)),
    "Unpack": (lambda ge, x: ge.Unpack(x, num=2, axis=1), lambda x: (x[:, 0], x[:, 1]), (rand(3, 2, 5),)),
    "Unsqueeze": (lambda ge, x: ge.Unsqueeze(x, axes=[0, -1]), lambda x: x.view(1, 3, 5, 1), (rand(3, 5),)),
    "ZerosLike": (lambda ge, x: ge.ZerosLike(x), lambda x: x - x, (rand(3, 5),)),
    "FlattenV2": (lambda ge, x: ge.FlattenV2(x, axis=1, end_axis=2), lambda x: x.view(2, 15, 1), (rand(2, 3, 5, 1),)),
}


def listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_floating_point(name: str) -> None:
    make, formula, operands = FLOAT_CASES[name]
    for dtype in FLOATS:
        given = [each.to(dtype) for each in operands]
        expected = listed(formula(*[each.float() for each in given]))
        data = build(make, *given)
        assert name in parse(data).types()
        for found, wanted in zip(Simulator(data, card=None)(given), expected, strict=True):
            assert found.dtype == dtype
            close(found, wanted, dtype)
        for found, wanted in zip(Simulator(data, wide=True, card=None)(given), expected, strict=True):
            assert found.dtype == torch.float32
            close(found, wanted)


# As above, for operands and results that no rounding touches: operator -> (constructor, expected outputs, operands).
EXACT_CASES: dict[str, tuple[Callable[..., Any], list[Tensor], tuple[Tensor, ...]]] = {
    "ArgMaxV2": (lambda ge, x: ge.ArgMaxV2(x, 1), [ints(2, 0)], (torch.tensor([[1.0, 3, 4, 4], [2, 1, 2, 0]]),)),
    "ArgMaxWithValue": (
        lambda ge, x: ge.ArgMaxWithValue(x, dimension=1, keep_dims=True),
        [torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([[3.0], [2]])],
        (torch.tensor([[1.0, 3], [2, 1]]),),
    ),
    "Cast": (lambda ge, x: ge.Cast(x, dst_type=3), [ints(-1, 0, 2, dtype=torch.int32)], (torch.tensor([-1.9, 0.9, 2.0]),)),
    "Equal": (lambda ge, a, b: ge.Equal(a, b), [torch.tensor([False, True, False])], (ints(1, 2, 3), ints(2))),
    "Fill": (lambda ge, x: ge.Fill(const(ge, [2, 1]), x), [torch.tensor([[7], [7]])], (torch.tensor(7),)),
    "FloorDiv": (lambda ge, a, b: ge.FloorDiv(a, b), [ints(-2, 3)], (ints(-3, 7), ints(2))),
    "FloorMod": (lambda ge, a, b: ge.FloorMod(a, b), [ints(1, 1)], (ints(-3, 7), ints(2))),
    "Greater": (lambda ge, a, b: ge.Greater(a, b), [torch.tensor([False, False, True])], (ints(1, 2, 3), ints(2))),
    "GreaterEqual": (lambda ge, a, b: ge.GreaterEqual(a, b), [torch.tensor([False, True, True])], (ints(1, 2, 3), ints(2))),
    "Less": (lambda ge, a, b: ge.Less(a, b), [torch.tensor([True, False, False])], (ints(1, 2, 3), ints(2))),
    "LessEqual": (lambda ge, a, b: ge.LessEqual(a, b), [torch.tensor([True, True, False])], (ints(1, 2, 3), ints(2))),
    "LogicalAnd": (
        lambda ge, a, b: ge.LogicalAnd(a, b),
        [torch.tensor([True, False, False])],
        (torch.tensor([True, True, False]), torch.tensor([True, False, False])),
    ),
    "LogicalNot": (lambda ge, a: ge.LogicalNot(a), [torch.tensor([False, True])], (torch.tensor([True, False]),)),
    "LogicalOr": (
        lambda ge, a, b: ge.LogicalOr(a, b),
        [torch.tensor([True, True, False])],
        (torch.tensor([True, True, False]), torch.tensor([True, False, False])),
    ),
    "NotEqual": (lambda ge, a, b: ge.NotEqual(a, b), [torch.tensor([True, False, True])], (ints(1, 2, 3), ints(2))),
    "Range": (lambda ge, a: ge.Range(a, ge.Const(8, dtype=9), ge.Const(3, dtype=9)), [ints(1, 4, 7)], (torch.tensor(1),)),
    "RealDiv": (lambda ge, a, b: ge.RealDiv(a, b), [ints(-1, 3)], (ints(-3, 7), ints(2))),
    "ReduceAll": (
        lambda ge, x: ge.ReduceAll(x, [1]),
        [torch.tensor([True, False])],
        (torch.tensor([[True, True], [True, False]]),),
    ),
    "ReduceAny": (
        lambda ge, x: ge.ReduceAny(x, [0]),
        [torch.tensor([True, False])],
        (torch.tensor([[False, False], [True, False]]),),
    ),
    "ReduceMeanWithCast": (
        lambda ge, x: ge.ReduceMeanWithCast(x, [0], dtype=0),
        [torch.tensor(1.5)],
        (ints(1, 2),),
    ),
    "Shape": (lambda ge, x: ge.Shape(x, dtype=9), [ints(2, 3)], (torch.zeros(2, 3),)),
    "TopK": (
        lambda ge, x: ge.TopK(x, ge.Const(2, dtype=3), largest=False),
        [torch.tensor([[1.0, 3]]), torch.tensor([[1, 0]], dtype=torch.int32)],
        (torch.tensor([[3.0, 1, 4]]),),
    ),
    "TopKV2": (
        lambda ge, x: ge.TopKV2(x, ge.Const(2, dtype=3)),
        [torch.tensor([[4.0, 4]]), torch.tensor([[2, 3]], dtype=torch.int32)],
        (torch.tensor([[3.0, 1, 4, 4]]),),
    ),
    "TruncateDiv": (lambda ge, a, b: ge.TruncateDiv(a, b), [ints(-1, 3)], (ints(-3, 7), ints(2))),
    "DynamicQuant": (
        lambda ge, x, s: ge.DynamicQuant(x, s, None, dst_type=2),
        [torch.tensor([[127, -13, 0], [0, 0, 0]], dtype=torch.int8), torch.tensor([2.0, 0]) / 127 * 5],
        (torch.tensor([[5.0, -1, 0], [0, 0, 0]]).half(), torch.tensor([2.0, 1, 1]).half()),
    ),
}


@pytest.mark.parametrize("name", EXACT_CASES)
def test_exact(name: str) -> None:
    make, expected, operands = EXACT_CASES[name]
    for wide in (False, True):
        found = compute(make, *operands, wide=wide)
        assert len(found) == len(expected)
        for each, wanted in zip(found, expected, strict=True):
            if wide and name == "DynamicQuant" and wanted.dtype == torch.int8:  # in steps, but not rounded to whole ones
                assert each.dtype == torch.float32 and each[0, 1] == pytest.approx(-12.7)
                close(each.round(), wanted.float())
                continue
            assert each.dtype == wanted.dtype
            close(each, wanted)


def test_statistics_of_norms() -> None:
    x, weight = rand(3, 16).half(), rand(16).half()
    wide = x.float()
    rstd = 1 / torch.sqrt((wide * wide).mean(1, keepdim=True) + 1e-6)
    for found in (
        compute(lambda ge, x, w: ge.RmsNorm(x, w)[1], x, weight),
        compute(lambda ge, x, w: ge.AddRmsNorm(x, ge.ZerosLike(x), w)[1], x, weight),
    ):
        assert found[0].dtype == torch.float32  # the definition says so, whatever x is
        close(found[0], rstd)
    total = compute(lambda ge, x, w: ge.AddRmsNorm(x, x, w)[2], x, weight)[0]
    assert torch.equal(total, (x.float() * 2).half())
    _, mean, rstd = compute(lambda ge, x, w: ge.LayerNormV4(x, [16], w, None), x.float(), weight.float())
    close(mean, wide.mean(1, keepdim=True))
    close(rstd, 1 / torch.sqrt(wide.var(1, keepdim=True, correction=0) + 1e-5))


def test_half_matrix_products_add_up_in_float32() -> None:
    x = torch.full((1, 4096), 1.0).half()
    x[0, 0] = 2048  # in float16, 2048 + 1 is 2048
    found = compute(lambda ge, a, b: ge.MatMul(a, b, None), x, torch.ones(4096, 1).half())
    assert found[0].item() == 2048 + 4096  # 6143, to the nearest float16


def test_a_half_is_rounded_after_every_operator_unless_wide() -> None:
    x = torch.full((1,), 2048.0).half()

    def make(ge: Any, x: Any) -> Any:
        return ge.Adds(ge.Adds(x, value=1.0), value=1.0)

    assert compute(make, x)[0].item() == 2048
    assert compute(make, x, wide=True)[0].item() == 2050


def test_shapes_of_the_definitions_variants() -> None:
    x = rand(2, 3, 4, 8)
    rows = compute(lambda ge, c, a, b: ge.Select(c, a, b), torch.tensor([True, False]), torch.ones(2, 3), torch.zeros(2, 3))
    assert rows[0].tolist() == [[1, 1, 1], [0, 0, 0]]
    gelu = compute(lambda ge, x: ge.GeluV2(x, approximate="tanh"), x)[0]
    assert torch.equal(gelu, compute(lambda ge, x: ge.Gelu(x), x)[0])
    padded = compute(
        lambda ge, x, w: ge.Conv2D(x, w, None, None, strides=[1, 1, 1, 1], pads=[1, 0, 0, 2], data_format="NCHW"),
        torch.ones(1, 1, 2, 2),
        torch.ones(1, 1, 2, 2),
    )
    assert padded[0].tolist() == [[[[2, 1, 0], [4, 2, 0]]]]
    wide = compute(lambda ge, x: ge.SoftmaxV2(x, axes=[-1], half_to_float=True), torch.zeros(1, 3).half())
    assert wide[0].dtype == torch.float32
    close(wide[0], torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("dtype", HALVES)
def test_weight_quant_batch_matmul(group: int, dtype: torch.dtype) -> None:
    x, bias = rand(3, 80).to(dtype), rand(5).to(dtype)
    weight = torch.randint(-128, 128, (80, 5), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    rows = [r // group for r in range(80)] if group else [0] * 80
    scale, offset = (rand(max(rows) + 1, 5).abs() + 0.5).to(dtype) / 64, (rand(max(rows) + 1, 5) * 3).to(dtype)
    dense = torch.stack([(weight[r].float() + offset[rows[r]].float()) * scale[rows[r]].float() for r in range(80)])

    def make(ge: Any, x: Any, w: Any, s: Any, o: Any, b: Any) -> Any:
        return ge.WeightQuantBatchMatmulV2(x, w, s, o, None, None, b, antiquant_group_size=group)

    close(compute(make, x, weight, scale, offset, bias, wide=True)[0], x.float() @ dense + bias.float())
    expected = x.float() @ dense.to(dtype).float() + bias.float()  # the cube unit takes the rounded weight
    close(compute(make, x, weight, scale, offset, bias)[0], expected, dtype)

    def transposed(ge: Any, x: Any, w: Any, s: Any, o: Any) -> Any:
        return ge.WeightQuantBatchMatmulV2(x, w, s, o, None, None, None, transpose_weight=True, antiquant_group_size=group)

    turned_over = [each.T.contiguous() for each in (weight, scale, offset)]
    close(compute(transposed, x, *turned_over, wide=True)[0], x.float() @ dense)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("group", [0, 32])
def test_weights_of_4_bits(group: int, transposed: bool) -> None:
    """Eight in an int32, the first in the lowest bits: along the columns, or along what becomes the rows."""
    x, whole = rand(3, 64).half(), torch.randint(-8, 8, (64, 16), generator=torch.Generator().manual_seed(0))
    scale = (rand(2 if group else 1, 16).abs() + 0.5).half()
    expected = x.float() @ (whole * scale.float().repeat_interleave(32 if group else 64, 0))
    lying = whole.T if transposed else whole
    eights = (lying & 15).unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    packed = eights.sum(-1).to(torch.int32)  # the highest number of an int32 has its sign

    def make(ge: Any, x: Any, w: Any, s: Any) -> Any:
        settings = {"antiquant_group_size": group, "transpose_weight": transposed}
        return ge.WeightQuantBatchMatmulV2(x, w, s, None, None, None, None, **settings)

    close(compute(make, x, packed, scale.T.contiguous() if transposed else scale, wide=True)[0], expected)


def test_quant_batch_matmul() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator) for shape in ((3, 600), (600, 5)))
    exact = [[sum(int(a[i, k]) * int(b[k, j]) for k in range(600)) for j in range(5)] for i in range(3)]
    scale, tokens, bias = rand(5).abs() / 1000, rand(3).abs(), ints(1, -70000, 3, 4, 5, dtype=torch.int32)

    def make(ge: Any, a: Any, b: Any, s: Any, c: Any, t: Any) -> Any:
        return ge.QuantBatchMatmulV3(a, b, s, None, c, t, dtype=27)

    expected = (torch.tensor(exact) + bias).float() * scale * tokens[:, None]
    found = compute(make, a, b, scale, bias, tokens)[0]
    assert found.dtype == torch.bfloat16
    close(found, expected, torch.bfloat16)
    close(compute(make, a, b, scale, bias, tokens, wide=True)[0], expected)
    whole = compute(lambda ge, a, b, s: ge.QuantBatchMatmulV3(a, b, s, None, None, None, dtype=3), a, b, scale)[0]
    assert whole.tolist() == exact


REFUSED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "another neutral value": (
        lambda ge, x: ge.PadV3(x, const(ge, [0, 1]), None, mode="reflect"),
        (rand(4),),
        "mode = 'reflect' is not supported; only 'constant' is",
    ),
    "an index": (lambda ge, x: ge.GatherV2(x, const(ge, [4]), [0]), (rand(4),), "index 4 is out of range; expected 0 to 3"),
    "a negative index": (lambda ge, x: ge.GatherV2(x, const(ge, [-1]), [0]), (rand(4),), "index -1 is out of range"),
    "two dtypes": (lambda ge, x, y: ge.Add(x, y), (rand(4), rand(4).half()), "several dtypes: x1 float32, x2 float16"),
    "inner sizes": (lambda ge, x, y: ge.MatMul(x, y, None), (rand(2, 3), rand(2, 3)), "the inner sizes differ"),
    "steps": (
        lambda ge, x: ge.StridedSliceV2(x, const(ge, [3]), const(ge, [0]), None, const(ge, [-1])),
        (rand(4),),
        "only forward slices",
    ),
    "a mask of slices": (
        lambda ge, x: ge.StridedSlice(x, const(ge, [0]), const(ge, [1]), const(ge, [1]), ellipsis_mask=1),
        (rand(4),),
        "ellipsis_mask = 1 is not supported",
    ),
    "a count": (lambda ge, x: ge.TopKV2(x, ge.Const(5, dtype=3)), (rand(4),), "k = 5, but axis -1 has 4 values"),
    "channels last": (
        lambda ge, x, w: ge.Conv2D(x, w, None, None, strides=[1, 1, 1, 1], pads=[0, 0, 0, 0], data_format="NHWC"),
        (rand(1, 2, 2, 2), rand(1, 2, 2, 2)),
        "data_format = 'NHWC'",
    ),
    "parts": (lambda ge, x: ge.SplitD(x, split_dim=0, num_split=3), (rand(4),), "num_split = 3 does not divide"),
    "a rotary mode": (
        lambda ge, x: ge.ApplyRotaryPosEmb(x, x, x, x, layout=1, rotary_mode="quarter"),
        (rand(1, 1, 1, 4),),
        "rotary_mode = 'quarter'",
    ),
    "a weight of 4 bits": (
        lambda ge, x, w, s: ge.WeightQuantBatchMatmulV2(x, w, s, None, None, None, None),
        (rand(1, 64).half(), torch.zeros(16, 4, dtype=torch.int32), rand(4).half()),
        r"weight has the shape \[16, 4\]; expected 64 or 8 rows of int32",
    ),
    "a group of scales": (
        lambda ge, x, w, s: ge.WeightQuantBatchMatmulV2(x, w, s, None, None, None, None, antiquant_group_size=32),
        (rand(1, 64).half(), torch.zeros(64, 4, dtype=torch.int8), rand(3, 4).half()),
        r"antiquant_scale has the shape \[3, 4\]; expected \[2, 4\] for groups of 32",
    ),
    "packed scales": (
        lambda ge, x, w, s: ge.QuantBatchMatmulV3(x, w, s, None, None, None, dtype=1),
        (torch.zeros(1, 4, dtype=torch.int8), torch.zeros(4, 4, dtype=torch.int8), ints(1)),
        "scale is torch.int64",
    ),
    "a scale after the product": (
        lambda ge, x, w, s, q: ge.WeightQuantBatchMatmulV2(x, w, s, None, q, None, None),
        (rand(1, 64).half(), torch.zeros(64, 4, dtype=torch.int8), rand(4).half(), rand(4)),
        "input quant_scale is not supported",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operators_refuse(name: str) -> None:
    make, operands, message = REFUSED[name]
    with pytest.raises(GeGraphError, match=message):
        compute(make, *operands)


def test_every_operator_has_a_test() -> None:
    elsewhere = {
        "AddRmsNormDynamicQuant", "Assign", "DequantSwigluQuant", "FusedInferAttentionScore", "HcomAllGather", "HcomAllReduce",
        "MatmulAllReduce", "QuantBatchMatmulV3", "Quantize", "Scatter", "ScatterPaKvCache", "ScatterUpdate",
        "WeightQuantBatchMatmulV2",
    }  # fmt: skip
    assert set(OPS) == {*FLOAT_CASES, *EXACT_CASES, *BY_NUMPY, *elsewhere}

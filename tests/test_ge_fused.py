"""Fused GE operators on the simulator against numpy, written from their public documents, and operands that they refuse.

Sources: op-plugin docs/zh/custom_APIs/torch_npu (npu_add_rms_norm_dynamic_quant, npu_apply_rotary_pos_emb, npu_quantize,
npu_quant_matmul, npu_dequant_swiglu_quant, npu_mm_all_reduce_base); ops-nn norm/add_rms_norm, quant/dequant_swiglu_quant,
quant/quantize; ops-transformer posembedding/apply_rotary_pos_emb.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraphError

from .ge_formulas import HALVES, close, ints, rand
from .ge_graphs import compute
from .need_torchair import skip_without_torchair
from .test_ge_attention import attention

skip_without_torchair()

Array = np.ndarray
INT8, INT32 = 2, 3  # of torchair.ge.DataType
each_half = pytest.mark.parametrize("dtype", HALVES)


def of(x: Tensor) -> Array:
    return x.double().numpy()


def same(found: Tensor, expected: Array, dtype: torch.dtype = torch.float32) -> None:
    assert list(found.shape) == list(expected.shape)
    close(found, torch.from_numpy(expected), dtype)


def rows_in_8_bits(y: Array) -> tuple[Array, Array]:
    """Each row in steps of a 127th of its largest magnitude, not rounded, and the steps."""
    scales = np.abs(y).max(-1) / 127
    return y / np.where(scales > 0, scales, 1)[..., None], scales


def check_rows(found: list[Tensor], y: Array, wide: list[Tensor]) -> None:
    """Rows and scales computed in 16 bits and wide: whole numbers next to the true ones, and the true ones."""
    steps, scales = rows_in_8_bits(y)
    assert found[0].dtype == torch.int8 and found[1].dtype == torch.float32
    assert np.abs(found[0].double().numpy() - steps).max() <= 0.5 + 1e-3
    same(found[1], scales)
    torch.testing.assert_close(wide[0].double(), torch.from_numpy(steps), rtol=1e-4, atol=1e-3)
    same(wide[1], scales)


def normalised(x: Array, gamma: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gamma


def summed(a: Tensor, b: Tensor) -> Array:
    """The sum as it is stored: rounded to the operands' type."""
    return of((a.double() + b.double()).to(a.dtype))


@each_half
@pytest.mark.parametrize(("shape", "eps"), [((2, 3, 16), 1e-5), ((4, 70), 0.25)])
def test_add_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], eps: float) -> None:
    a, b, gamma = rand(*shape).to(dtype), (3 * rand(*reversed(shape)).reshape(shape)).to(dtype), rand(shape[-1]).to(dtype)
    total = summed(a, b)
    y, rstd, x = compute(lambda ge, *given: ge.AddRmsNorm(*given, epsilon=eps), a, b, gamma)
    same(y, normalised(total, of(gamma), eps), dtype)
    same(rstd, 1 / np.sqrt((total**2).mean(-1, keepdims=True) + eps))
    assert np.array_equal(of(x), total) and x.dtype == dtype


@each_half
@pytest.mark.parametrize(
    ("shape", "eps", "mask", "smooth", "shifted"),
    [
        ((2, 3, 32), 1e-5, [True, False], 0, False),
        ((5, 48), 0.5, [False, True], 0, False),
        ((5, 48), 0.5, [True, True], 1, True),
        ((3, 64), 1e-6, [], 1, False),
        ((3, 64), 1e-6, [], 2, True),
    ],
)
def test_add_rms_norm_dynamic_quant(
    dtype: torch.dtype, shape: tuple[int, ...], eps: float, mask: list[bool], smooth: int, shifted: bool
) -> None:
    width = shape[-1]
    a, b, gamma = rand(*shape).to(dtype), (2 * rand(*reversed(shape)).reshape(shape)).to(dtype), rand(width).to(dtype)
    smooths = [(1 + rand(width + i).abs()[:width]).to(dtype) for i in range(smooth)]
    beta = [rand(width + 7)[:width].to(dtype)] if shifted else []

    def make(ge: Any, a: Any, b: Any, gamma: Any, *rest: Any) -> Any:
        first, second, *_ = [*rest[:smooth], None, None]
        beta = rest[smooth] if shifted else None
        return ge.AddRmsNormDynamicQuant(a, b, gamma, first, second, beta, epsilon=eps, output_mask=mask, dst_type=INT8)

    def run(*given: Tensor, wide: bool = False) -> list[Tensor]:
        return compute(make, *given, wide=wide)

    given = [a, b, gamma, *smooths, *beta]
    halves, in_float32 = run(*given), run(*(each.float() for each in given), wide=True)
    y = normalised(summed(a, b), of(gamma), eps) + (of(beta[0]) if beta else 0)
    exact = normalised(of(a) + of(b), of(gamma), eps) + (of(beta[0]) if beta else 0)
    there = mask or [True, smooth == 2]
    for i in range(2):
        if not there[i]:
            assert halves[i].numel() == halves[3 + i].numel() == 0
            continue
        factor = of(smooths[i]) if i < smooth else 1
        steps, scales = rows_in_8_bits(y * factor)
        assert halves[i].dtype == torch.int8 and halves[3 + i].dtype == torch.float32
        assert np.abs(of(halves[i]) - steps).max() <= 0.5 + 1e-3
        same(halves[3 + i], scales)
        steps, scales = rows_in_8_bits(exact * factor)
        torch.testing.assert_close(in_float32[i].double(), torch.from_numpy(steps), rtol=1e-4, atol=1e-3)
        same(in_float32[3 + i], scales)
    assert np.array_equal(of(halves[2]), summed(a, b)) and halves[2].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("b", "t", "heads", "kv_heads", "d"), [(2, 3, 4, 2, 128), (1, 5, 6, 6, 64)])
def test_apply_rotary_pos_emb(dtype: torch.dtype, b: int, t: int, heads: int, kv_heads: int, d: int) -> None:
    """cos and sin of both halves differ: each place takes its own."""
    q, k, cos, sin = (rand(*s).to(dtype) for s in ((b, t, heads, d), (b, t, kv_heads, d), (b, t, 1, d), (t, b, 1, d)))
    sin = sin.reshape(b, t, 1, d)
    found = compute(lambda ge, *given: ge.ApplyRotaryPosEmb(*given, layout=1, rotary_mode="half"), q, k, cos, sin)
    for x, result in zip((q, k), found, strict=True):
        value, turned = of(x), np.empty(x.shape)
        turned[..., : d // 2], turned[..., d // 2 :] = -value[..., d // 2 :], value[..., : d // 2]
        same(result, value * of(cos) + turned * of(sin), dtype)
        assert result.dtype == dtype


@each_half
@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 64), -1), ((4, 6), 0)])
@pytest.mark.parametrize("shifted", [False, True])
def test_quantize(dtype: torch.dtype, shape: tuple[int, ...], axis: int, shifted: bool) -> None:
    x = (100 * rand(*shape)).to(dtype)
    sizes = [size if i == axis % len(shape) else 1 for i, size in enumerate(shape)]
    scales = (rand(shape[axis]).abs() + 0.5).reshape(sizes)
    shift = [torch.arange(shape[axis], dtype=torch.int32).reshape(sizes)] if shifted else []
    value = of(x) / of(scales) + (of(shift[0]) if shift else 0)

    def make(ge: Any, x: Any, scales: Any, shift: Any = None) -> Any:
        return ge.Quantize(x, scales, shift, dtype="torch.qint8", axis=axis)

    for wide in (False, True):
        (found,) = compute(make, x.float() if wide else x, scales, *shift, wide=wide)
        assert found.dtype == torch.int8
        assert np.abs(of(found) - np.clip(value, -128, 127)).max() <= 0.5 + 1e-4
        assert (np.abs(value) > 200).any()  # some are cut off


def test_quantize_rounds_halves_to_even_and_takes_bfloat16_scales() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 200, -200]]).bfloat16()
    scales = torch.ones(1, 1).bfloat16()
    (found,) = compute(lambda ge, x, s: ge.Quantize(x, s, None, dtype="torch.qint8", axis=1), x, scales)
    assert found.tolist() == [[0, 2, 2, 0, -2, 127, -128]]


def product(ge: Any, a: Any, b: Any, s: Any) -> Any:
    return ge.QuantBatchMatmulV3(a, b, s, None, None, None, dtype=INT32)


def whole(*shape: int, low: int = -128) -> Tensor:
    numbers = torch.randint(low, 128, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return numbers.to(torch.int8)


def test_products_in_whole_numbers_take_no_scale() -> None:
    a, b, scale = whole(3, 70), whole(70, 8), rand(8)
    (found,) = compute(product, a, b, scale)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64))
    # Wide, what is not rounded stays so.
    (found,) = compute(
        lambda ge, x, b, s: product(ge, ge.DynamicQuant(x, None, None, dst_type=INT8)[0], b, s),
        rand(3, 70).half(),
        b,
        scale,
        wide=True,
    )
    steps, _ = rows_in_8_bits(of(rand(3, 70).half()))
    torch.testing.assert_close(found.double(), torch.from_numpy(steps @ of(b)), rtol=1e-4, atol=1e-2)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("rows", "half", "left", "by_rows", "smooth", "bias"),
    [
        (3, 32, True, True, False, None),
        (5, 16, False, True, True, None),
        (4, 24, True, False, False, torch.int32),
        (2, 32, False, True, False, torch.float32),
    ],
)
def test_dequant_swiglu_quant(rows: int, half: int, left: bool, by_rows: bool, smooth: bool, bias: torch.dtype | None) -> None:
    x = torch.randint(-9000, 9000, (rows, 2 * half), generator=torch.Generator().manual_seed(half), dtype=torch.int32)
    columns, activations = (rand(2 * half).abs() + 0.5) / 1000, (rand(rows, 1).abs() + 0.5)
    factors = rand(half).abs() + 1
    shift = None if bias is None else (100 * rand(2 * half) if bias == torch.int32 else rand(2 * half)).to(bias)
    given = {"ws": columns, "as": activations if by_rows else None, "b": shift, "qs": factors if smooth else None}
    names = [name for name, value in given.items() if value is not None]

    def make(ge: Any, x: Any, *rest: Any) -> Any:
        taken = {**dict.fromkeys(given), **dict(zip(names, rest, strict=True))}
        return ge.DequantSwigluQuant(
            x, taken["ws"], taken["as"], taken["b"], taken["qs"], None, None, activate_left=left, quant_mode="dynamic"
        )

    value = of(x) + (of(shift) if shift is not None and bias == torch.int32 else 0)
    value = value * of(columns) * (of(activations) if by_rows else 1)
    value = value + (of(shift) if shift is not None and bias == torch.float32 else 0)
    first, second = value[:, :half], value[:, half:]
    y = silu(first) * second if left else silu(second) * first
    y = y * of(factors) if smooth else y
    operands = [x, *(value for value in given.values() if value is not None)]
    found = compute(make, *operands)
    assert found[0].dtype == torch.int8 and found[0].shape == (rows, half)
    check_rows(found, y, compute(lambda ge, x, *rest: make(ge, ge.Cast(x, dst_type=0), *rest), *operands, wide=True))


@each_half
def test_dequant_swiglu_quant_of_floats(dtype: torch.dtype) -> None:
    x = (3 * rand(4, 40)).to(dtype)

    def make(ge: Any, x: Any) -> Any:
        return ge.DequantSwigluQuant(x, None, None, None, None, None, None, activate_left=True, quant_mode="dynamic")

    y = silu(of(x)[:, :20]) * of(x)[:, 20:]
    check_rows(compute(make, x), y, compute(make, x.float(), wide=True))


@each_half
@pytest.mark.parametrize(("t", "heads", "kv_heads"), [(3, 4, 2), (5, 2, 2)])
def test_attention_gives_its_result_with_heads_last(dtype: torch.dtype, t: int, heads: int, kv_heads: int) -> None:
    b, s, d = 2, 7, 16
    q, k, v = (rand(*shape).to(dtype) for shape in ((b, heads, t, d), (b, kv_heads, s, d), (s, kv_heads, b, d)))
    v = v.reshape(b, kv_heads, s, d)

    def make(ge: Any, q: Any, k: Any, v: Any) -> Any:
        sizes = {"num_heads": heads, "num_key_value_heads": kv_heads, "scale": 0.25}
        return attention(ge, q, k, v, input_layout="BNSD_BSND", **sizes)[0]

    (found,) = compute(make, q, k, v)
    expected = np.empty((b, t, heads, d))
    for i, h in np.ndindex(b, heads):
        keys, values = (of(each)[i, h // (heads // kv_heads)] for each in (k, v))
        weights = np.exp(of(q)[i, h] @ keys.T * 0.25)
        expected[i, :, h] = weights / weights.sum(-1, keepdims=True) @ values
    same(found, expected, dtype)


REFUSED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "a sum of two types": (
        lambda ge, a, b, g: ge.AddRmsNormDynamicQuant(a, b, g, None, None, None),
        (rand(2, 8).half(), rand(2, 8).bfloat16(), rand(8).half()),
        "operands have several dtypes",
    ),
    "a norm of float32": (
        lambda ge, a, b, g: ge.AddRmsNormDynamicQuant(a, b, g, None, None, None),
        (rand(2, 8), rand(2, 8), rand(8)),
        "input x1 is torch.float32; the operator takes float16 and bfloat16",
    ),
    "gamma of another width": (
        lambda ge, a, b, g: ge.AddRmsNormDynamicQuant(a, b, g, None, None, None, dst_type=INT8),
        (rand(2, 8).half(), rand(2, 8).half(), rand(4).half()),
        r"gamma \[4\] do not fit each other",
    ),
    "no output": (
        lambda ge, a, b, g: ge.AddRmsNormDynamicQuant(a, b, g, None, None, None, output_mask=[False, False], dst_type=INT8),
        (rand(2, 8).half(), rand(2, 8).half(), rand(8).half()),
        r"output_mask = \[False, False\]",
    ),
    "4 bits": (
        lambda ge, a, b, g: ge.AddRmsNormDynamicQuant(a, b, g, None, None, None, dst_type=INT32),
        (rand(2, 8).half(), rand(2, 8).half(), rand(8).half()),
        "dst_type = torch.int32 is not supported",
    ),
    "scales in float16": (
        lambda ge, x, s: ge.Quantize(x, s, None, dtype="torch.qint8", axis=1),
        (rand(2, 8).half(), rand(1, 8).half()),
        "input scales is torch.float16 for x in torch.float16; expected float32",
    ),
    "scales of another axis": (
        lambda ge, x, s: ge.Quantize(x, s, None, dtype="torch.qint8", axis=0),
        (rand(2, 8).half(), rand(1, 8)),
        r"expected \[2, 1\]",
    ),
    "unsigned numbers": (
        lambda ge, x, s: ge.Quantize(x, s, None, dtype="torch.quint8", axis=1),
        (rand(2, 8).half(), rand(1, 8)),
        "dtype = 'torch.quint8' is not supported",
    ),
    "static quantisation": (
        lambda ge, x: ge.DequantSwigluQuant(x, None, None, None, None, None, None),
        (rand(2, 8).half(),),
        "quant_mode = 'static'",
    ),
    "whole numbers without scales": (
        lambda ge, x: ge.DequantSwigluQuant(x, None, None, None, None, None, None, quant_mode="dynamic"),
        (ints(1, 2, 3, 4, dtype=torch.int32).reshape(1, 4),),
        "int32 needs weight_scale",
    ),
    "scales of another number": (
        lambda ge, x, s: ge.DequantSwigluQuant(x, s, None, None, None, None, None, quant_mode="dynamic"),
        (ints(1, 2, 3, 4, dtype=torch.int32).reshape(1, 4), rand(3)),
        r"weight_scale \[3\], activation_scale None with x \[1, 4\]",
    ),
    "more than a core holds": (
        lambda ge, x, s: ge.DequantSwigluQuant(x, s, None, None, None, None, None, quant_mode="dynamic"),
        (torch.zeros(1, 22016, dtype=torch.int32), rand(22016)),
        "needs 968704 bytes of a core's memory; the operator has 196608",
    ),
    "whole numbers with scales of rows": (
        lambda ge, a, b, s, r: ge.QuantBatchMatmulV3(a, b, s, None, None, r, dtype=INT32),
        (whole(2, 4), whole(4, 4), rand(4), rand(2)),
        "an output in int32 takes none",
    ),
    "another layout for the result of one query": (
        lambda ge, q, k: attention(ge, q, k, k, input_layout="BNSD_BSND", num_heads=2, num_key_value_heads=2)[0],
        (rand(1, 2, 1, 16).half(), rand(1, 2, 5, 16).half()),
        "input_layout = 'BNSD_BSND' with one query is not supported",
    ),
    "heads of a width that is not 64 or 128": (
        lambda ge, q, c: ge.ApplyRotaryPosEmb(q, q, c, c),
        (rand(1, 2, 2, 32), rand(1, 2, 1, 32)),
        r"query \[1, 2, 2, 32\]",
    ),
    "cos of every head": (
        lambda ge, q, c: ge.ApplyRotaryPosEmb(q, q, c, c),
        (rand(1, 2, 2, 64), rand(1, 2, 2, 64)),
        r"cos \[1, 2, 2, 64\]",
    ),
    "cos of one row for all": (
        lambda ge, q, c: ge.ApplyRotaryPosEmb(q, q, c, c),
        (rand(2, 2, 2, 64), rand(1, 2, 1, 64)),
        r"cos \[1, 2, 1, 64\]",
    ),
    "heads first": (
        lambda ge, q, c: ge.ApplyRotaryPosEmb(q, q, c, c, layout=3),
        (rand(1, 2, 2, 64), rand(1, 2, 1, 64)),
        "layout = 3 is not supported; a card takes 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    make, operands, message = REFUSED[name]
    with pytest.raises(GeGraphError, match=message):
        compute(make, *operands)

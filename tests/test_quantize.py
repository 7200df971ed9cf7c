"""Quantised weights: the layout is ONNX Runtime's, and the error is what rounding must leave."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from staticvl.model_defs.config import quant_block, read_config
from staticvl.weights.quantize import (
    dequantize,
    dequantize_w4,
    dequantize_w8,
    quantize,
    quantize_w4,
    quantize_w8,
    quantize_w8a8,
)
from staticvl.weights.storage import stored_targets, uniform
from staticvl.weights.tensors import StoredTensor
from staticvl.weights.weight_map import targets

from .checkpoints import tiny_llava

# Rows and columns: whole blocks of 128; whole blocks of 32; a padded last block; one row.
KINDS = ("w8a16", "w8a8", "w4a16", "w4a16-g32")
SIZES = [(6, 256), (5, 96), (7, 112), (1, 40)]


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)).to(dtype)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_half_a_step(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight, block = random_weight(rows, columns, dtype), quant_block(columns)
    q, scales = quantize_w8(weight, block)
    blocks = -(-columns // block)
    assert (q.dtype, tuple(q.shape)) == (torch.uint8, (rows, blocks, block))
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, (rows, blocks))
    step = scales.repeat_interleave(block, dim=1)[:, :columns]
    error = (dequantize_w8(q, scales, columns) - weight.float()).abs()
    assert (error <= 0.5001 * step).all()
    assert error.max() > 0.4 * step.min(), "a bound that nothing comes near would prove nothing"
    # The largest entry of each block uses the whole range.
    assert ((q.int() - 128).abs().amax(dim=-1) == 127).all() and q.min() >= 1


def test_scales_are_the_largest_entry_of_each_block() -> None:
    weight = torch.tensor([[1.0] * 31 + [-127.0] + [0.5] * 32, [0.0] * 32 + [254.0] + [2.0] * 31])
    q, scales = quantize_w8(weight, 32)
    assert scales.tolist() == [[1.0, pytest.approx(0.5 / 127)], [0.0, 2.0]]
    assert q[0, 0].tolist() == [129] * 31 + [1] and q[0, 1].tolist() == [255] * 32
    assert q[1, 0].tolist() == [128] * 32 and q[1, 1].tolist() == [255] + [129] * 31
    assert torch.equal(dequantize_w8(q, scales, 64)[1], weight[1])


def test_padding_is_zero() -> None:
    q, scales = quantize_w8(torch.full((2, 40), 3.0), 32)
    assert (q[:, 1, 8:] == 128).all() and tuple(dequantize_w8(q, scales, 40).shape) == (2, 40)


@pytest.mark.parametrize("quant", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-44, 1.96e-43, 6e-8, -3e38])
def test_extreme_values(quant: str, value: float) -> None:
    weight = torch.full((1, 32), value)
    got = dequantize(quant, quantize(quant, weight), 32)
    assert got.isfinite().all() and torch.allclose(got, weight, rtol=1e-6, atol=2e-43)


@pytest.mark.parametrize("quant", KINDS)
def test_rows_do_not_depend_on_how_they_are_cut(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(37, 96)
    whole = quantize(quant, weight)
    monkeypatch.setattr("staticvl.weights.quantize._CHUNK", 96 * 4)
    cut = quantize(quant, weight)
    assert all(torch.equal(value, cut[part]) for part, value in whole.items())


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_4_bits(rows: int, columns: int) -> None:
    weight = random_weight(rows, columns)
    q, scales = quantize_w4(weight, 32)
    blocks = -(-columns // 32)
    assert (q.dtype, tuple(q.shape), tuple(scales.shape)) == (torch.uint8, (rows, blocks, 16), (rows, blocks))
    padded = torch.nn.functional.pad(weight, (0, -columns % 32)).view(rows, blocks, 32)
    error = dequantize_w4(q, scales, columns) - weight
    # At worst what lies at the end that has one step less: the best of the scales is no worse than the plain one.
    plain = padded.abs().amax(-1, keepdim=True) / 7
    left = (padded / plain).round() * plain - padded
    assert error.square().sum() < 0.9 * left.square().sum(), "better than 15 steps between -max and max"
    assert (padded.flatten(1)[:, columns:] == 0).all() and (dequantize_w4(q, scales, blocks * 32)[:, columns:] == 0).all()
    assert (q & 15).unique().numel() == 16 or rows == 1


@pytest.mark.parametrize(("quant", "least", "most"), [("w4a16", 0.095, 0.1), ("w4a16-g32", 0.080, 0.0845)])
def test_4_bits_lose_as_little_as_documented(quant: str, least: float, most: float) -> None:
    """One step for each block would lose 0.103 and 0.086 of normally distributed weights."""
    weight = random_weight(128, 512)
    near = dequantize(quant, quantize(quant, weight), 512)
    assert least < float((near - weight).norm() / weight.norm()) < most


def test_4_bits_by_hand() -> None:
    """Every number of a block has its own, the first in the low bits; of two scales the one is taken that leaves nothing."""
    up, down = torch.arange(-8.0, 8).repeat(2), torch.arange(8.0, -8, -1).repeat(2)
    q, scales = quantize_w4(torch.stack((up, down)) / 4, 32)
    assert scales.tolist() == [[0.25], [-0.25]]
    assert q[:, 0].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2] * 2
    assert torch.equal(dequantize_w4(q, scales, 32) * 4, torch.stack((up, down)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_8_bits_by_column(dtype: torch.dtype) -> None:
    """Turned round for whole-number products, with one scale for each output."""
    weight = random_weight(6, 96, dtype)
    q, scales = quantize_w8a8(weight)
    assert (q.dtype, tuple(q.shape), scales.dtype) == (torch.int8, (96, 6), torch.float32)
    torch.testing.assert_close(scales, weight.float().abs().amax(1) / 127, rtol=1e-6, atol=0)
    error = ((q.float() * scales).T - weight.float()).abs()
    assert (error <= 0.5001 * scales[:, None]).all() and error.max() > 0.4 * scales.min()
    assert (q.int().abs().amax(0) == 127).all()


@pytest.mark.parametrize(("accuracy_level", "tolerance"), [(0, 1e-5), (4, 0.02)])
@pytest.mark.parametrize(("rows", "columns"), [(48, 256), (33, 96), (16, 112)])
@pytest.mark.parametrize("quant", ["w8a16", "w4a16", "w4a16-g32"])
def test_onnx_runtime_reads_the_same_weights(
    quant: str, rows: int, columns: int, accuracy_level: int, tolerance: float
) -> None:
    parts = quantize(quant, random_weight(rows, columns))
    x = np.random.default_rng(1).standard_normal((3, columns), dtype=np.float32)
    bits = 8 if quant == "w8a16" else 4
    got = run_matmul_nbits(x, parts["qweight"].numpy(), parts["scales"].numpy(), accuracy_level, bits)
    expected = x @ dequantize(quant, parts, columns).numpy().T
    # Level 4 rounds the input to 8 bits too.
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def run_matmul_nbits(x: np.ndarray, q: np.ndarray, scales: np.ndarray, accuracy_level: int, bits: int) -> np.ndarray:
    rows, columns = q.shape[0], x.shape[1]
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "scales"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=q.shape[2] * 8 // bits, accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (x.shape[0], rows))],
        [
            helper.make_tensor("q", TensorProto.UINT8, q.shape, q.tobytes(), raw=True),
            helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def test_what_is_stored_in_fewer_bits(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = read_config(tiny_llava(tmp_path_factory.mktemp("stored")).folder)
    plain = stored_targets(config, "none")
    assert {name: spec.shape for name, spec in plain.items()} == targets(config)
    assert {spec.dtype for spec in plain.values()} == {"float32"}
    quantised = stored_targets(config, "w8a16")
    gone, made = plain.keys() - quantised.keys(), quantised.keys() - plain.keys()
    linear = [
        f"text.layers.{i}.{n}"
        for i in (0, 1)
        for n in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    linear.append("text.lm_head")
    assert gone == {f"{name}.weight" for name in linear}
    assert made == {f"{name}.{part}" for name in linear for part in ("qweight", "scales")}
    assert quantised["text.layers.0.mlp.down.qweight"].shape == (64, 4, 32)  # K = 112, padded to 128
    assert quantised["text.layers.0.mlp.down.scales"].shape == (64, 4)
    assert quantised["text.lm_head.qweight"].nbytes == 389 * 64
    for quant in ("w8a8", "w4a16"):
        assert stored_targets(config, quant).keys() == quantised.keys()
    towered = stored_targets(config, "w8a8+vision").keys() - quantised.keys()
    layers = range(config.vision.used_layers)  # type: ignore[union-attr]
    names = [f"vision.layers.{i}.{n}" for i in layers for n in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")]
    assert towered == {f"{name}.{part}" for name in names for part in ("qweight", "scales")}
    four = stored_targets(config, "w4a16")
    assert four["text.layers.0.mlp.down.qweight"].shape == (64, 4, 16)
    assert four["text.lm_head.qweight"] == quantised["text.lm_head.qweight"], "stays in 8 bits"
    whole = stored_targets(config, "w8a8", uniform("bfloat16"))
    assert whole["text.layers.0.mlp.down.qweight"] == StoredTensor("int8", (112, 64))
    assert whole["text.layers.0.mlp.down.scales"] == StoredTensor("float32", (64,))

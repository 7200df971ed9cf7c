"""8-bit weights: the layout is ONNX Runtime's, and the error is what rounding must leave."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from staticvl.model_defs.config import quant_block, read_config
from staticvl.weights.quantize import dequantize_w8, quantize_w8
from staticvl.weights.rules import targets
from staticvl.weights.stored import stored_targets

from .checkpoints import tiny_llava

# Rows and columns: whole blocks of 128; whole blocks of 32; a padded last block; one row.
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


@pytest.mark.parametrize("value", [0.0, 1e-44, 1.96e-43, 6e-8, 3e38])
def test_extreme_values(value: float) -> None:
    weight = torch.full((1, 32), value)
    got = dequantize_w8(*quantize_w8(weight, 32), 32)
    assert got.isfinite().all() and torch.allclose(got, weight, rtol=1e-6, atol=1e-43)


def test_rows_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(37, 96)
    whole = quantize_w8(weight, 32)
    monkeypatch.setattr("staticvl.weights.quantize._CHUNK", 96 * 4)
    cut = quantize_w8(weight, 32)
    assert torch.equal(whole[0], cut[0]) and torch.equal(whole[1], cut[1])


@pytest.mark.parametrize(("accuracy_level", "tolerance"), [(0, 1e-5), (4, 0.02)])
@pytest.mark.parametrize(("rows", "columns"), [(48, 256), (33, 96), (16, 112)])
def test_onnx_runtime_reads_the_same_weights(rows: int, columns: int, accuracy_level: int, tolerance: float) -> None:
    block = quant_block(columns)
    q, scales = quantize_w8(random_weight(rows, columns), block)
    x = np.random.default_rng(1).standard_normal((3, columns), dtype=np.float32)
    got = run_matmul_nbits(x, q.numpy(), scales.numpy(), accuracy_level)
    expected = x @ dequantize_w8(q, scales, columns).numpy().T
    # Level 4 rounds the input to 8 bits too.
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def run_matmul_nbits(x: np.ndarray, q: np.ndarray, scales: np.ndarray, accuracy_level: int) -> np.ndarray:
    rows, columns = q.shape[0], x.shape[1]
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "scales"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=8, block_size=q.shape[2], accuracy_level=accuracy_level,
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


def test_what_is_stored_in_8_bits(tmp_path_factory: pytest.TempPathFactory) -> None:
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

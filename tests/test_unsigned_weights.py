"""Products of bytes on processors without VNNI: as exact as on others, whether weights are packed for all graphs or not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from staticvl.compiler.build import build
from staticvl.compiler.plan import Options
from staticvl.runtime import load
from staticvl.runtime.backends import host_cache, unsigned_weights
from staticvl.runtime.backends import ort as backend

from .checkpoints import tiny_llava
from .test_host_cache import BUCKETS, DIMS

ROWS, DEPTH, COLUMNS = 3, 64, 16
SHIFT = 96  # bytes before the weight in its file


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    x = np.random.default_rng(0).integers(0, 256, (ROWS, DEPTH), np.uint8)
    x[0] = 255  # any two of its products by 127 are more than 16 bits hold
    return x


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    weight = np.random.default_rng(1).integers(-128, 128, (DEPTH, COLUMNS)).astype(np.int8)
    weight[:, 0], weight[:, 1] = 127, -128
    return weight


def model_of(weight: np.ndarray, folder: Path) -> onnx.ModelProto:
    """Two products with the same weight, and one that reads it in float; the weight lies in a file."""
    (folder / "weights.bin").write_bytes(bytes(SHIFT) + weight.tobytes() + bytes(8))
    stored = TensorProto(name="w", data_type=TensorProto.INT8, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", SHIFT), ("length", weight.nbytes)):
        stored.external_data.add(key=key, value=str(value))
    constants = [
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        numpy_helper.from_array(np.array(100, np.uint8), "another"),
    ]
    product = ("x", "w", "one", "one")
    nodes = [
        helper.make_node("MatMulIntegerToFloat", [*product, "zero"], ["y"], domain="com.microsoft"),
        helper.make_node("MatMulIntegerToFloat", [*product, "another"], ["z"], domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["w", "one"], ["float"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [ROWS, DEPTH])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z", "float")]
    graph = helper.make_graph(nodes, "g", [x], outputs, [stored, *constants])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def values(model: onnx.ModelProto, folder: Path, x: np.ndarray) -> list[np.ndarray]:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    options = backend._options(pack=True, threads=1)
    session = ort.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=backend._DISABLED_OPTIMIZERS
    )
    return [np.asarray(each) for each in session.run(None, {"x": x})]


@pytest.mark.parametrize("turned", [False, True])
def test_products_are_exact(turned: bool, x: np.ndarray, weight: np.ndarray, tmp_path: Path) -> None:
    """As the backend opens a graph, and turned over as for packing; whoever reads the weight in float sees it as it was."""
    model = model_of(weight, tmp_path)
    if not turned:
        model.graph.node[1].input[1] = "copy"  # onnxruntime itself turns no weight over that two products share
        model.graph.initializer.append(numpy_helper.from_array(weight, "copy"))
    else:
        unsigned_weights.write(tmp_path, unsigned_weights.make_unsigned(model))
        (first, second, other) = model.graph.node
        assert first.input[1] == second.input[1] != other.input[0] == "w"
    y, z, floats = values(model, tmp_path, x)
    wide = weight.astype(np.int64)
    np.testing.assert_array_equal(y, (x.astype(np.int64) - 128) @ wide)
    np.testing.assert_array_equal(z, (x.astype(np.int64) - 100) @ wide)
    np.testing.assert_array_equal(floats, weight)


def test_files_hold_what_is_needed(weight: np.ndarray, tmp_path: Path) -> None:
    needed = unsigned_weights.make_unsigned(model_of(weight, tmp_path))
    assert needed == {"weights.bin": {(SHIFT, weight.nbytes)}}
    unsigned_weights.write(tmp_path, needed)
    held = np.frombuffer((tmp_path / "weights.bin.unsigned").read_bytes(), np.uint8)
    np.testing.assert_array_equal(held[SHIFT:], weight.ravel().astype(np.int16) + 128)


def test_the_processor_is_asked() -> None:
    """Where Linux lists its features: those without VNNI, and no others, cut off."""
    flags = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
    if "avx2" not in flags:
        pytest.skip("tells of x86 processors from AVX2 on")
    assert unsigned_weights.saturates() == (not {"avx512_vnni", "avx_vnni"} & set(flags))


def test_the_probe_is_one_product_of_bytes() -> None:
    model = onnx.load_from_string(unsigned_weights.PROBE)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["MatMulInteger"]
    (weight,) = model.graph.initializer
    assert weight.data_type == TensorProto.INT8
    np.testing.assert_array_equal(numpy_helper.to_array(weight), [[127], [127]])


def test_the_probe_needs_no_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert unsigned_weights.saturates.__wrapped__() == unsigned_weights.saturates()


def test_signed_weights_stay_where_their_products_are_exact(
    weight: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that turned them over would hold a copy of its own beside those that are packed, and multiply slowly."""
    monkeypatch.setattr(unsigned_weights, "saturates", lambda: True)
    assert backend._options(pack=True, threads=1).get_session_config_entry(unsigned_weights.PRECISE) == "1"
    monkeypatch.setattr(unsigned_weights, "saturates", lambda: False)
    options = backend._options(pack=True, threads=1)
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    model = model_of(weight, tmp_path)
    model.graph.node[1].input[1] = "copy"
    model.graph.initializer.append(numpy_helper.from_array(weight, "copy"))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    ort.InferenceSession(
        tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"], disabled_optimizers=backend._DISABLED_OPTIMIZERS
    )
    graph = onnx.load(tmp_path / "opened.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert [types[node.input[1]] for node in products] == [TensorProto.INT8] * 2


@pytest.mark.slow
def test_packed_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor without VNNI packs, against what every session makes for itself."""
    artifact = tmp_path / "a"
    tiny = tiny_llava(tmp_path / "checkpoint", **DIMS["w8a8"])
    build(Options(checkpoint=tiny.folder, out=artifact, buckets=BUCKETS, quant="w8a8"))

    def answer() -> np.ndarray:
        return load(artifact).generate("one two three four", max_new_tokens=4, ignore_eos=True, return_logits=True).logits

    alone = answer()
    monkeypatch.setattr(backend, "WORTH_PACKING", 0)
    monkeypatch.setattr(host_cache.unsigned_weights, "saturates", lambda: True)
    packed = answer()
    copies = [*(artifact / host_cache.FOLDER).glob("*/decode-1-*.onnx")]
    tensors = onnx.load(copies[0], load_external_data=False).graph.initializer
    assert any(tensor.name.endswith(unsigned_weights.SUFFIX) for tensor in tensors)
    np.testing.assert_allclose(packed, alone, atol=1e-6 * np.abs(alone).max())

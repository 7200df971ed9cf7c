"""Weights in FRACTAL_NZ on a card: which, when, and that nothing else changes. A stand-in for torch_npu notes what is cast."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from staticvl.compiler.build import build
from staticvl.compiler.emit_ascend import emit
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import ArtifactError, Manifest, read_manifest
from staticvl.runtime.backends.ascend import backend as ascend
from staticvl.runtime.backends.ascend.weight_layout import FRACTAL_NZ, VARIABLE, forms_in_nz, weight_layout
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.tools.operator_tests import kernels
from staticvl.tools.operator_tests.case import Setting
from staticvl.tools.operator_tests.forms import form

from .card_graphs import Graph
from .checkpoints import tiny_llava
from .merged_models import graphs
from .need_torchair import skip_without_torchair

skip_without_torchair()

Casts = list[tuple[tuple[int, ...], int]]


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> Casts:
    """Shapes and layouts of the tensors that were cast."""
    done: Casts = []

    def cast(tensor: Tensor, layout: int) -> Tensor:
        done.append((tuple(tensor.shape), layout))
        return tensor.clone()

    npu = SimpleNamespace(utils=SimpleNamespace(get_cann_version=lambda: "9.0"))
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu_format_cast=cast, npu=npu))
    return done


# ---- which


def product(kind: str, dtype: str, *shape: int, port: str = "x2") -> ge_graph.GeGraph:
    """A node that reads its second input, a weight."""
    graph = Graph()
    weight, x = graph.input(dtype, *shape), graph.input("float32", 4, shape[-1])
    other = {"x2": "x1", "x1": "x2"}.get(port, "x1")
    graph.node(kind, {port: weight, other: x}, [(dtype, (4, shape[0]))])
    return graph.made()


@pytest.mark.parametrize(
    ("graph", "cast"),
    [
        (product("MatMul", "float16", 48, 32), True),
        (product("MatMul", "bfloat16", 48, 32), True),
        (product("MatMul", "float16", 40, 32), False),
        (product("MatMul", "float16", 48, 8), False),
        (product("MatMul", "float16", 1, 32), False),
        (product("MatMul", "float32", 48, 32), False),
        (product("MatMul", "float16", 48, 32, port="x1"), False),
        (product("QuantBatchMatmulV3", "int8", 48, 32), True),
        (product("QuantBatchMatmulV3", "int8", 48, 16), False),
        (product("QuantBatchMatmulV3", "float16", 48, 32), False),
        (product("WeightQuantBatchMatmulV2", "int8", 48, 32, port="weight"), False),
        (product("GatherV2", "float16", 48, 32, port="x"), False),
    ],
)
def test_matrices_of_whole_blocks(graph: ge_graph.GeGraph, cast: bool) -> None:
    descriptor = graph.inputs[0].outputs[0]
    assert forms_in_nz([graph]) == (frozenset({(descriptor.dtype, descriptor.shape)}) if cast else frozenset())


def test_a_form_that_one_graph_reads_otherwise_stays() -> None:
    """A head of the shape of the table of embeddings, tied to it or not; a weight that is transposed first; one that nothing
    reads."""
    head, table = product("MatMul", "float16", 48, 32), product("GatherV2", "float16", 48, 32, port="x")
    assert forms_in_nz([head, table]) == frozenset()
    assert forms_in_nz([head, head]) == {("float16", (48, 32))}
    graph = Graph()
    weight, x = graph.input("float16", 48, 32), graph.input("float32", 4, 48)
    turned = graph.node("Transpose", {"x": weight, "perm": graph.const(1, 0)}, [("float16", (32, 48))])
    graph.node("MatMul", {"x1": x, "x2": turned}, [("float16", (4, 32))])
    assert forms_in_nz([graph.made()]) == frozenset()
    graph = Graph()
    graph.input("float16", 48, 32)
    graph.node("MatMul", {"x1": graph.input("float32", 4, 32), "x2": graph.input("float16", 16, 32)}, [("float16", (4, 16))])
    assert forms_in_nz([graph.made()]) == {("float16", (16, 32))}


@pytest.mark.parametrize("quant", ["none", "w8a8", pytest.param("w4a16", marks=pytest.mark.slow)])
def test_weights_of_a_decode_step(quant: str) -> None:
    """The four products of a layer, in floats and w8a8; never the table of embeddings, nor a weight in 4 bits."""
    graph = next(each for each in graphs("llava", quant, heads=32) if each.kind == "decode")
    forms = forms_in_nz([ge_graph.parse(emit(graph, "float16").graph)])
    shapes = {name: tuple(each.shape) for name, each in graph.module.named_parameters()}
    parts = {"none": ("weight", 0, "float16"), "w8a8": ("qweight", 1, "int8")}
    if quant not in parts:
        assert forms == frozenset()
        return
    part, axis, dtype = parts[quant]
    layer = {
        stem: shapes[f"text.layers.0.{stem}.{part}"]
        for stem in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    merged = [joined([layer[f"attn.{each}"] for each in "qkv"], axis), joined([layer["mlp.gate"], layer["mlp.up"]], axis)]
    blocks = (16, 16) if quant == "none" else (16, 32)
    expected = [shape for shape in (*merged, layer["attn.o"], layer["mlp.down"]) if fits(shape, blocks)]
    assert len(expected) >= 2 and {(dtype, shape) for shape in expected} == forms
    assert ("float16", shapes["text.embed.weight"]) not in forms


def fits(shape: tuple[int, ...], blocks: tuple[int, int]) -> bool:
    return all(size % block == 0 for size, block in zip(shape, blocks, strict=True))


def joined(shapes: list[tuple[int, ...]], axis: int) -> tuple[int, ...]:
    """The shape of matrices one after another."""
    total = sum(shape[axis] for shape in shapes)
    return (total, shapes[0][1]) if axis == 0 else (shapes[0][0], total)


# ---- when


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layout")
    buckets = Buckets(prefill=(8,), decode=(1,), vision=(1,), context=32, slots=1)
    checkpoint = tiny_llava(folder / "checkpoint").folder
    build(Options(checkpoint=checkpoint, out=folder / "artifact", buckets=buckets, backend="ascend", eager=("vision",)))
    return folder / "artifact"


def opened(artifact: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> ascend.AscendBackend:
    """On a card that is a CPU."""
    soc = manifest.ascend.soc if manifest.ascend else ""
    monkeypatch.setattr(ascend, "_card", lambda _device: (ascend.Device("cpu"), soc))
    return ascend.open_ascend(artifact, manifest, "npu")


def test_off_unless_requested(artifact: Path, casts: Casts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    backend = opened(artifact, read_manifest(artifact), monkeypatch)
    assert backend.device.in_nz == frozenset() and not casts
    assert backend.compile_cache is not None and not backend.compile_cache.name.endswith("-nz")
    monkeypatch.setenv(VARIABLE, "NZ")
    with pytest.raises(ArtifactError, match=rf"{VARIABLE} is 'NZ'; expected nd \(weights as they are stored\) or nz"):
        weight_layout()


def test_weights_are_cast_once_when_they_are_read(artifact: Path, casts: Casts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nz")
    manifest = read_manifest(artifact)
    backend = opened(artifact, manifest, monkeypatch)
    assert backend.compile_cache is not None and backend.compile_cache.name.endswith("-nz")
    eager = {form_of(manifest, name) for graph in manifest.graphs if graph.eager for name in graph.weights}
    assert eager and backend.device.in_nz and not backend.device.in_nz & eager
    assert not casts  # nothing has been read
    text = next(graph for graph in manifest.graphs if graph.kind == "decode")
    values = {name: backend._weight(name) for name in text.weights}
    assert all(backend._weight(name) is value for name, value in values.items())
    forms = [form_of(manifest, name) for name in text.weights]
    assert sorted(casts) == sorted((shape, FRACTAL_NZ) for dtype, shape in forms if (dtype, shape) in backend.device.in_nz)
    assert len(casts) == 3 * manifest.cache.layers  # attn.o has the shape of layers of the tower, which is eager
    others = opened(artifact, manifest, monkeypatch)
    others.device = replace(others.device, in_nz=frozenset())
    assert all(torch.equal(others._weight(name), value) for name, value in values.items())


def form_of(manifest: Manifest, name: str) -> tuple[str, tuple[int, ...]]:
    return manifest.weights[name].dtype, tuple(manifest.weights[name].shape)


def test_the_simulator_keeps_weights_as_they_are(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nz")
    backend = ascend.open_ascend(artifact, read_manifest(artifact), "sim")
    assert backend.device.in_nz == frozenset()


@pytest.fixture
def lowered_product(tmp_path: Path) -> Path:
    """A folder with one case, made while no torch_npu is there, which nothing could be lowered beside."""
    rows = form("product_several", rows=4, features=64, inputs=48)
    kernels.lower_forms({rows: ("decode",)}, Setting(dtype="float16"), tmp_path)
    return tmp_path


def test_operator_tests_use_the_layout(lowered_product: Path, casts: Casts, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is tested before graphs run with it."""
    file = lowered_product / "0.kernel"
    matrix = frozenset({("float16", (64, 48))})
    for value, expected in (("nd", frozenset()), ("nz", matrix)):
        monkeypatch.setenv(VARIABLE, value)
        assert kernels._forms_in_nz(file, ascend.Device("npu:0")) == expected
        assert kernels._forms_in_nz(file, ascend.Device("cpu")) == frozenset()
    device, weight = ascend.Device("cpu", in_nz=matrix), torch.ones(64, 48).half()
    assert torch.equal(device.placed(weight), weight) and casts == [((64, 48), FRACTAL_NZ)]
    assert device.placed(weight[:, 1:]).shape == (64, 47) and len(casts) == 1

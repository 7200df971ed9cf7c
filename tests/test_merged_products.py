"""Linear layers with the same input are one product in graphs for Ascend, in every family, form and kind of graph."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from staticvl import runtime
from staticvl.compiler import fingerprint
from staticvl.compiler.ascend_graph import merging as ascend_merging
from staticvl.compiler.ascend_graph.merging import PRODUCTS, join_swiglu, merge_products
from staticvl.compiler.ascend_graph.rewriting import TracedGraph, traced
from staticvl.compiler.buckets import Buckets
from staticvl.compiler.build import build
from staticvl.compiler.emit_ascend import emit
from staticvl.compiler.fingerprint import OTHER_BACKENDS
from staticvl.compiler.graphs import trace
from staticvl.compiler.options import Options
from staticvl.compiler.source_files import code_digests
from staticvl.runtime.backends.ascend import torchair_host
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.weights import merging
from staticvl.weights.merging import members_of
from staticvl.weights.storage import QUANTS

from .conftest import EMBEDDED
from .merged_models import FAMILIES, graphs, model_config
from .need_torchair import skip_without_torchair

skip_without_torchair()

LAYER = re.compile(r"((?:text|vision)\.(?:global_)?layers\.\d+)\.(\w+\.\w+)\.(?:weight|qweight)")


def products(rewritten: TracedGraph) -> dict[str, list[str]]:
    """The products of each layer, by the layers whose weights they read."""
    found: dict[str, list[str]] = {}
    for node in rewritten.graph.nodes:
        weight = node.args[1] if node.op == "call_function" and node.target.__name__.partition(".")[0] in PRODUCTS else None
        if match := LAYER.fullmatch(rewritten.parameters.get(weight, "")):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_has_four_products(family: str, quant: str) -> None:
    """In every kind of graph; and SwiGlu takes a product as it is."""
    torchair_host.load()
    config, kinds = model_config(family), set()
    for graph in graphs(family, quant):
        rewritten = traced(graph, (merge_products, join_swiglu))
        count = Counter(node.target.__name__.partition(".")[0] for node in rewritten.graph.nodes if node.op == "call_function")
        layers = products(rewritten)
        crossing = {f"text.layers.{i}" for i in config.text.cross_layers} & layers.keys()
        for name, found in layers.items():
            attention = ["attn.q" if name in crossing else "attn.qkv", "attn.o"]
            assert found == [*attention, "mlp.gate_up" if graph.kind != "vision" else "mlp.up", "mlp.down"], name
        assert count["split_with_sizes"] == len(layers) - len(crossing)
        if graph.kind == "vision":
            assert len(layers) > 1
        else:
            assert len(layers) == count["npu_swiglu"] == config.text.layers and not count["silu_mul"]
        kinds.add(graph.kind)
    assert kinds == {"vision", "prefill", "decode", "verify"}


# Products of other quantisations are counted by tests/test_ascend_fusions.py, layer by layer.
@pytest.mark.parametrize("quant", ["w8a8", *(pytest.param(each, marks=pytest.mark.slow) for each in ("none", "w4a16-g32"))])
def test_what_torchair_makes_of_it(quant: str) -> None:
    graph = next(each for each in graphs("llava", quant, heads=16) if each.kind == "decode")
    types = ge_graph.parse(emit(graph, "float16").graph).types()
    layers = model_config("llava").text.layers
    kernel = {"none": "MatMul", "w8a8": "QuantBatchMatmulV3", "w4a16-g32": "WeightQuantBatchMatmulV2"}[quant]
    assert types[kernel] == 4 * layers + (quant != "w8a8")  # and lm_head
    joined = types.get("SwiGlu", 0) + types.get("DequantSwigluQuant", 0)
    assert types["SplitV"] == joined == layers and "ConcatV2" not in types


def test_a_trace_is_left_as_it_was() -> None:
    """It has other users, ONNX graphs among them."""
    graph = next(graphs("llava"))
    before = str(trace(graph).graph)
    traced(graph, (merge_products,))
    assert str(trace(graph).graph) == before


def test_weights_and_graphs_are_made_anew_where_merging_changes() -> None:
    weights = {"weights/merging.py", "weights/merged_tensors.py", "weights/head_pieces.py"}
    assert weights <= code_digests("weights.convert").keys()
    passes = {"compiler/ascend_graph/merging.py", "compiler/ascend_graph/head.py"}
    assert passes <= code_digests("compiler.make", without=OTHER_BACKENDS["ascend"]).keys()


# --- Artifacts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_artifacts_from_before_still_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graphs name weights that lie apart. Made again, they are merged, and say the same."""
    options = Options(
        checkpoint=EMBEDDED,
        out=tmp_path,
        buckets=Buckets(prefill=(16,), decode=(1,), context=64, slots=1),
        backend="ascend",
        candidates=0,
    )
    answer = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    with monkeypatch.context() as patch:
        for module in (merging, ascend_merging):
            patch.setattr(module, "complete_groups", lambda _names: {})
        patch.setattr(fingerprint, "code_digests", lambda *_, **__: {"code": "of an earlier version"})
        old = build(options).manifest
    assert "text.layers.0.attn.k.weight" in old.weights and not any(map(members_of, old.weights))
    assert "text.layers.0.attn.k.weight" in old.graphs[-1].weights
    expected = runtime.load(tmp_path, device="sim").generate("Say one word.", **answer)
    made = build(options)
    assert made.converted and len(made.traced) == len(old.graphs)
    assert "text.layers.0.attn.qkv.weight" in made.manifest.weights
    assert all(graph.certificate and graph.certificate.worst <= 1e-4 for graph in made.manifest.graphs)
    assert runtime.load(tmp_path, device="sim").generate("Say one word.", **answer).token_ids == expected.token_ids
    files = {spec.file for spec in made.manifest.weights.values()}
    assert {str(each.relative_to(tmp_path)) for each in (tmp_path / "weights").rglob("*.safetensors")} == files

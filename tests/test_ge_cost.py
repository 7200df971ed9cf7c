"""Kernels, bytes and operations of GE graphs: against figures by hand, against every tensor that a run makes, and at full size
against the size of the weights and the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from staticvl.compiler.build import build
from staticvl.compiler.cost import graph_cost
from staticvl.compiler.emit_ascend import emit
from staticvl.compiler.ge_cost import lowered_cost, serialised_cost
from staticvl.compiler.ge_sizes import Sizes
from staticvl.compiler.plan import Buckets, Options
from staticvl.model_defs.config import TextConfig
from staticvl.runtime.artifact import GraphKey, LoweredCost, Manifest, encode_manifest, open_artifact
from staticvl.runtime.backends.ge_simulator.ge_graph import Constant, GeGraph, Node, Source, TensorDescriptor
from staticvl.runtime.backends.ge_simulator.simulator import Simulator
from staticvl.tools.artifact_facts import facts
from staticvl.tools.cards import CARDS, KERNEL_US, Card
from staticvl.tools.cli import main
from staticvl.tools.development import ascend_forecast
from staticvl.tools.development.ascend_coverage import named_config
from staticvl.tools.development.ascend_forecast import Graphs, buckets, text_costs
from staticvl.tools.development.kernel_count import Form, _definitions, definitions
from staticvl.tools.forecast import decoder_layers, forecast

from .ascend import CHECKPOINTS
from .need_torchair import skip_without_torchair

skip_without_torchair()

HALF, WORD, LONG, BYTE = "float16", "int32", "int64", "int8"
FREE = ("Data", "Const", "NetOutput", "Reshape", "Identity", "Unsqueeze", "Squeeze")
Shape = tuple[int, ...]
Output = tuple[str | None, Shape | None]  # None: not stated


# ---- graphs by hand


class Hand:
    """A graph written node by node; a tensor is named by the node that makes it."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def data(self, name: str, shape: Shape, dtype: str = HALF) -> str:
        output = TensorDescriptor("y", dtype, shape)
        self.nodes.append(Node("Data", name, (), (), {"index": len(self.nodes)}, (output,)))
        return name

    def const(self, name: str, values: Sequence[int], dtype: str = LONG) -> str:
        array = np.array(values, dtype)
        value = Constant(dtype, array.shape, array.tobytes())
        self.nodes.append(Node("Const", name, (), (), {"value": value}, (TensorDescriptor("y", dtype, array.shape),)))
        return name

    def node(
        self, kind: str, name: str, inputs: Mapping[str, str], *outputs: tuple[str | None, Shape | None], **more: Any
    ) -> str:
        sources = tuple(Source(each, 0) for each in inputs.values())
        described = tuple(TensorDescriptor(f"y{place}", dtype, shape) for place, (dtype, shape) in enumerate(outputs))
        self.nodes.append(Node(kind, name, tuple(inputs), sources, more, described))
        return name

    @property
    def graph(self) -> GeGraph:
        return GeGraph("hand", tuple(self.nodes), tuple(node for node in self.nodes if node.type == "Data"), ())

    def figures(self) -> tuple[int, int, int, int]:
        """Kernels, bytes read, bytes written, operations; nothing folded, every size known."""
        cost = lowered_cost(self.graph)
        assert (cost.folded, cost.unsized) == (0, 0)
        return cost.kernels, cost.read, cost.written, cost.flops


def test_products_and_copies() -> None:
    """Views are free; a copy and a sum read and write all of their tensors."""
    hand = Hand()
    hand.data("x", (4, 1, 8))
    hand.data("w", (16, 8))
    hand.node("Reshape", "rows", {"x": "x", "shape": hand.const("shape", [4, 8])}, (HALF, (4, 8)))
    hand.node("MatMul", "y", {"x1": "rows", "x2": "w"}, (HALF, (4, 16)), transpose_x1=False, transpose_x2=True)
    assert hand.figures() == (1, 2 * (4 * 8 + 16 * 8), 2 * 4 * 16, 2 * 4 * 8 * 16)
    hand.node("Add", "sum", {"x1": "y", "x2": "y"}, (HALF, (4, 16)))
    hand.node("Identity", "same", {"x": "sum"}, (HALF, (4, 16)))
    hand.node("ConcatV2", "both", {"x0": "same", "x1": "y"}, (HALF, (8, 16)))
    assert hand.figures() == (3, 2 * (32 + 128 + 64 + 64 + 64 + 64), 2 * (64 + 64 + 128), 1024)


def test_a_turned_left_side() -> None:
    hand = Hand()
    hand.data("x", (8, 4))
    hand.data("w", (8, 16))
    hand.node("MatMul", "y", {"x1": "x", "x2": "w"}, (HALF, (4, 16)), transpose_x1=True, transpose_x2=False)
    assert hand.figures()[3] == 2 * 4 * 8 * 16


def test_lookups_read_rows() -> None:
    hand = Hand()
    hand.data("table", (1000, 8))
    hand.data("ids", (3,), WORD)
    hand.node("GatherV2", "rows", {"x": "table", "indices": "ids", "axis": hand.const("axis", [0])}, (HALF, (3, 8)))
    assert hand.figures() == (1, 2 * 3 * 8 + 3 * 4 + 8, 2 * 3 * 8, 0)


def test_scatter_writes_new_rows() -> None:
    """As they are stored: an int8 cache takes a byte for each half."""
    for dtype, width in ((HALF, 2), (BYTE, 1)):
        hand = Hand()
        hand.data("cache", (2, 4, 100, 8), dtype)
        hand.data("at", (2,), WORD)
        hand.data("new", (2, 4, 1, 8))
        kind = "Scatter" if dtype == HALF else "QuantUpdateScatter"
        hand.node(kind, "y", {"var": "cache", "indices": "at", "updates": "new"}, (dtype, (2, 4, 100, 8)))
        assert hand.figures() == (1, 2 * 4 + 2 * 64, 64 * width, 0)


def test_writing_into_pages_moves_the_new_rows() -> None:
    hand = Hand()
    for name in ("k", "v"):
        hand.data(name, (3, 4, 8))
        hand.data(f"{name}_pages", (50, 10, 4, 8))
    hand.data("slots", (3,), WORD)
    inputs = {"key": "k", "key_cache": "k_pages", "slot_mapping": "slots", "value": "v", "value_cache": "v_pages"}
    hand.node("ScatterPaKvCache", "y", inputs, *[(HALF, (50, 10, 4, 8))] * 2)
    rows = 2 * 2 * 3 * 4 * 8
    assert hand.figures() == (1, rows + 4 * 3, rows, 0)


def attended(paged: bool = False, **attributes: Any) -> Hand:
    hand = Hand()
    hand.data("q", (2, 8, 1, 16))
    shape = (50, 10, 4 * 16) if paged else (2, 4, 100, 16)  # pages of 10 tokens
    for name in ("keys", "values"):
        hand.data(name, shape)
    inputs = {"query": "q", "key0": "keys", "value0": "values"}
    if paged:
        inputs["block_table"] = hand.data("pages", (2, 6), WORD)
        attributes["block_size"] = 10
    outputs = ((HALF, (2, 8, 1, 16)), ("float32", (2, 8, 1, 1)))
    hand.node("FusedInferAttentionScore", "y", inputs, *outputs, input_layout="BNSD", **attributes)
    return hand


def test_attention_reads_the_whole_cache() -> None:
    queries, cache = 2 * 8 * 16, 2 * 4 * 100 * 16
    assert attended().figures() == (1, 2 * (queries + 2 * cache), 2 * queries, 4 * queries * 100)
    assert attended(softmax_lse_flag=True).figures()[2] == 2 * queries + 4 * 16
    # Of 50 pages a row reads the 6 that its table names.
    pages = 2 * 6 * 4 * 10 * 16
    assert attended(paged=True).figures() == (1, 2 * (queries + 2 * pages) + 4 * 12, 2 * queries, 4 * queries * 60)


@pytest.mark.parametrize(("order", "folded"), [([0, 2, 1, 3], False), ([1, 0, 2, 3], True), ([0, 1, 3, 2], False)])
def test_transposes_of_one_element(order: list[int], folded: bool) -> None:
    hand = Hand()
    shape = (1, 4, 3, 8)
    hand.data("x", shape)
    hand.node("Transpose", "y", {"x": "x", "perm": hand.const("perm", order)}, (HALF, tuple(shape[axis] for axis in order)))
    cost = lowered_cost(hand.graph)
    assert (cost.kernels, cost.folded) == ((0, 1) if folded else (1, 0))
    assert (cost.read, cost.written) == ((0, 0) if folded else (2 * 96 + 4 * 8, 2 * 96))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_transposes_of_quantised_weights(elsewhere: bool) -> None:
    """Free in front of a product alone; not where another node reads the result as well."""
    hand = Hand()
    hand.data("x", (4, 64))
    hand.data("w", (32, 64), BYTE)
    hand.node("Transpose", "turned", {"x": "w", "perm": hand.const("perm", [1, 0])}, (BYTE, (64, 32)))
    hand.node("WeightQuantBatchMatmulV2", "y", {"x": "x", "weight": "turned"}, (HALF, (4, 32)), transpose_x=False)
    if elsewhere:
        hand.node("Cast", "wide", {"x": "turned"}, (HALF, (64, 32)), dst_type=1)
    cost = lowered_cost(hand.graph)
    assert (cost.kernels, cost.folded) == ((3, 0) if elsewhere else (1, 1))
    assert cost.flops == 2 * 4 * 64 * 32
    product = 2 * 4 * 64 + 64 * 32
    assert cost.read == product + (2 * 64 * 32 + 16 if elsewhere else 0)


def test_sizes_that_are_not_stated() -> None:
    """Those of converters' nodes are inferred; what cannot be is counted, as no bytes."""
    hand = Hand()
    hand.data("x", (2, 3, 4))
    hand.node("Cast", "wide", {"x": "x"}, (None, None), dst_type=0)
    hand.node("Mul", "scaled", {"x1": "wide", "x2": hand.data("s", (3, 1), "float32")}, (None, None))
    hand.node("Transpose", "turned", {"x": "scaled", "perm": hand.const("perm", [2, 0, 1])}, (None, None))
    hand.node("Reshape", "flat", {"x": "turned", "shape": hand.const("shape", [0, -1])}, (None, None))
    hand.node("Unsqueeze", "more", {"x": "flat"}, (None, None), axes=[0, -1])
    limits = {name: hand.const(name, [value], WORD) for name, value in (("start", 1), ("limit", 8), ("delta", 2))}
    hand.node("Range", "numbers", limits, (None, None))
    sizes = Sizes(hand.graph)
    found = {name: sizes.of(Source(name, 0)) for name in ("wide", "scaled", "turned", "flat", "more", "numbers")}
    assert [(each.dtype, each.shape) for each in found.values() if each] == [
        ("float32", (2, 3, 4)),
        ("float32", (2, 3, 4)),
        ("float32", (4, 2, 3)),
        ("float32", (4, 6)),
        ("float32", (1, 4, 6, 1)),
        ("int32", (4,)),
    ]
    known = lowered_cost(hand.graph)
    hand.node("NewOperator", "open", {"x": "flat"}, ("float32", (5,)), (None, None))
    cost = lowered_cost(hand.graph)
    assert (cost.kernels - known.kernels, cost.read - known.read, cost.written - known.written) == (1, 96, 20)
    assert (known.unsized, cost.unsized) == (0, 1)


# ---- compiled graphs, against every tensor of a run


@pytest.mark.parametrize(
    ("family", "quant", "kinds"),
    [
        ("llava", "none", ("prefill",)),
        ("llava", "w8a8", ("decode",)),
        ("qwen_vl", "w4a16", ("decode",)),
        ("mllama", "w8a16", ("vision",)),
        pytest.param("llava", "none", ("vision",), marks=pytest.mark.slow),
        pytest.param("qwen_vl", "w4a16", ("prefill",), marks=pytest.mark.slow),
        pytest.param("mllama", "w8a16", ("decode",), marks=pytest.mark.slow),
    ],
)
def test_compiled_graphs(family: str, quant: str, kinds: tuple[str, ...]) -> None:
    for key, definition in _definitions(named_config(str(CHECKPOINTS[family])), Form(quant)):
        if key.kind in kinds:
            serialised = emit(definition, HALF).graph
            counted = serialised_cost(serialised)
            kernels, read, written = by_tensors(serialised)
            assert (counted.kernels, counted.read, counted.written, counted.unsized) == (kernels, read, written, 0)
            # The definition counts the same operations, but for heads that are filled up in the tower.
            assert key.kind == "vision" or counted.flops == graph_cost(definition, HALF).flops


def by_tensors(serialised: bytes) -> tuple[int, int, int]:
    """Kernels, bytes read and bytes written, by the tensors that the simulator computes with."""
    values: dict[Source, Tensor] = {}

    def keep(node: Node, outputs: Sequence[Tensor]) -> None:
        values.update({Source(node.name, place): each.detach().clone() for place, each in enumerate(outputs)})

    simulator = Simulator(serialised, on_outputs=keep)
    graph = simulator.graph
    fed = [torch.ones(each.outputs[0].shape or (), dtype=getattr(torch, each.outputs[0].dtype or "")) for each in graph.inputs]
    simulator(fed)
    values.update({Source(node.name, 0): each for node, each in zip(graph.inputs, fed, strict=True)})
    values.update({Source(name, 0): torch.from_numpy(each.array().copy()) for name, each in graph.constants().items()})
    totals = [0, 0, 0]
    for node in graph.nodes:
        if node.type in ("Data", "Const", "NetOutput", "Reshape", "Identity", "Unsqueeze", "Squeeze") or is_view(
            graph, node, values
        ):
            continue
        given = {name: nbytes(values[source]) for name, source in zip(node.input_names, node.inputs, strict=True) if source}
        made = [nbytes(values[Source(node.name, place)]) for place in range(len(node.outputs))]
        if node.type == "Scatter":
            made = [given["updates"]]
            del given["var"]
        elif node.type in ("GatherV2", "StridedSliceV2"):
            given["x"] = made[0]
        elif node.type == "FusedInferAttentionScore":
            del made[1:]
        totals = [totals[0] + 1, totals[1] + sum(given.values()), totals[2] + sum(made)]
    return totals[0], totals[1], totals[2]


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def is_view(graph: GeGraph, node: Node, values: Mapping[Source, Tensor]) -> bool:
    """Whether a Transpose leaves elements where they are, or is only read as the weight of a product that takes it turned."""
    if node.type != "Transpose" or not all(node.inputs):
        return False
    x, order = (values[source] for source in node.inputs if source)
    places = torch.arange(x.numel()).reshape(x.shape)
    if torch.equal(places.permute(order.tolist()).flatten(), places.flatten()):
        return True
    return {each.type for each in graph.readers(Source(node.name, 0))} == {"WeightQuantBatchMatmulV2"}


# ---- artifacts


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lowered") / "artifact"
    some = Buckets(prefill=(16,), decode=(1,), vision=(1,), context=64, slots=1)
    build(Options(checkpoint=CHECKPOINTS["llava"], out=out, buckets=some, backend="ascend", dtype=HALF, eager=("vision",)))
    return out


def test_the_manifest_holds_the_counts(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = open_artifact(artifact).manifest
    lowered = {graph.kind: graph.lowered for graph in manifest.graphs}
    assert lowered["vision"] is msgspec.UNSET  # run op by op
    shown_graphs = facts(artifact, "910B").artifact
    assert shown_graphs
    (decode,) = (each for each in shown_graphs.graphs if each.name == "decode-1")
    cost = lowered["decode"]
    assert cost and decode.launches and cost.kernels == decode.launches.kernels > 4 * 10
    assert decode.launches.layer_kernels == cost.kernels / 4
    assert decode.launches.ms == pytest.approx(decode.at_best.ms + cost.kernels * KERNEL_US / 1e3)
    assert decode.launches.tokens_per_s == pytest.approx(1e3 / decode.launches.ms)
    assert main(["show", str(artifact)]) == 0
    shown = capsys.readouterr().out
    best, _, launches = shown.partition("lower bounds on")[2].partition("for each kernel")
    assert "vision-1" in best and "decode-1" in best and "vision-1" not in launches
    (line,) = (line for line in launches.splitlines() if "decode-1" in line)
    assert f" {cost.kernels} " in line and f" {cost.kernels / 4:.1f} " in line


def test_manifests_without_counts(artifact: Path) -> None:
    """Of earlier versions: they load, and forecasts are those of the definition."""
    manifest = open_artifact(artifact).manifest
    assert b'"lowered"' in encode_manifest(manifest)
    graphs = tuple(msgspec.structs.replace(graph, lowered=msgspec.UNSET) for graph in manifest.graphs)
    old = encode_manifest(msgspec.structs.replace(manifest, graphs=graphs))
    assert b"lowered" not in old
    read = msgspec.json.decode(old, type=Manifest)
    for graph in read.graphs:
        row = forecast(graph, CARDS["910B"], decoder_layers(read))
        assert (row.flops, row.nbytes, row.launches) == (graph.flops, graph.nbytes, None)


def test_a_run_is_the_bound_and_its_kernels() -> None:
    card = Card("", flops=100.0, bandwidth=10.0, memory=0)
    assert card.run_ms(50, 1, 2000) == pytest.approx(500 + 2 * KERNEL_US)


# ---- full size


def test_further_layers_are_multiplied_exactly() -> None:
    """A model of 7 layers, two of which attend to images, compiled and computed from those of 3 and 4."""
    config = named_config(str(CHECKPOINTS["mllama"]))
    config = replace(config, text=replace(config.text, layers=7, cross_layers=(1, 4)))
    some = Graphs(prefill=(16,), decode=())
    computed = text_costs(config, Form(), some)
    graphs = dict(definitions(config, Form(), buckets(config, some)))
    assert {key.name for key in computed} == {"prefill-16-images-1"}
    for key, cost in computed.items():
        assert cost == serialised_cost(emit(graphs[key], HALF).graph), key.name


@pytest.mark.parametrize(
    ("quant", "width"),
    [
        pytest.param("none", 2, marks=pytest.mark.slow),
        pytest.param("w8a8", 1, marks=pytest.mark.slow),
        ("w4a16", 0.5 + 2 / 128),
    ],
)
def test_decode_reads_weights_and_cache(quant: str, width: float) -> None:
    """7B: every weight once but the embedding table's, lm_head in at least 8 bits, and keys and values of every position."""
    config = named_config("llava-1.5-7b-hf")
    (cost,) = text_costs(config, Form(quant), Graphs(prefill=(), decode=(1,))).values()
    text: TextConfig = config.text
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    head = text.hidden_size * text.vocab_size * (2 if quant == "none" else 1 + 2 / 128)
    cache = 2 * 2 * text.layers * text.hidden_size * (2048 + 512)
    assert cost.read == pytest.approx(text.layers * layer * width + head + cache, rel=0.01)
    assert cost.unsized == 0 and cost.written < 0.01 * cost.read
    assert 32 * 12 <= cost.kernels <= 32 * 20


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts are kept, tables are made of them, and of two versions a cell shows what differs."""
    cost = LoweredCost(kernels=1200, folded=3, flops=35 * 10**9, read=16 * 10**9, written=0)
    monkeypatch.setattr(ascend_forecast, "text_costs", lambda config, form, graphs: {GraphKey("decode", 1): cost})
    now, earlier = tmp_path / "now.json", tmp_path / "earlier.json"
    assert ascend_forecast.main([str(CHECKPOINTS["llava"]), "--counts", str(now), "--quants", "w8a8"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"| decode-1 | w8a8 | 1,200 | 16.00 | 10.00 | {10 + 1.2 * KERNEL_US:.2f} |"
    assert ascend_forecast.main(["--counts", str(now)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line
    (row,) = ascend_forecast.read_counts(now)
    assert (row.model, row.cost) == ("tiny_llava15", cost)
    more = msgspec.structs.replace(row, cost=msgspec.structs.replace(cost, kernels=2200))
    earlier.write_bytes(msgspec.json.encode([more]))
    assert ascend_forecast.main(["--counts", str(now), "--before", str(earlier)]) == 0
    launched = f"{10 + 2.2 * KERNEL_US:.2f} → {10 + 1.2 * KERNEL_US:.2f}"
    assert capsys.readouterr().out.splitlines()[-1] == f"| decode-1 | w8a8 | 2,200 → 1,200 | 16.00 | 10.00 | {launched} |"
    assert ascend_forecast.main(["--counts", str(tmp_path / "none.json")]) == 1
    assert "error: " in capsys.readouterr().err

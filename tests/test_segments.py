"""Graphs of one rank, cut at their collectives: the cutter on graphs made by hand, and ranks on onnxruntime in lockstep against
the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from staticvl.compiler.emit_onnx import Emitter, _lower, _model, emit, emit_steps
from staticvl.compiler.graphs import GraphDef, trace
from staticvl.compiler.segments import Cut, Part, cut
from staticvl.model_defs import ops
from staticvl.model_defs.layers import Table, empty_parameter
from staticvl.runtime.artifact import ArtifactError, CacheSpec, Collective, GraphKey, GraphSpec, Segment, Step, TensorSpec
from staticvl.runtime.backends.ort import OrtBackend

from .lockstep import Counting, array_group, not_summed, reversed_gather, run_ranks
from .rank_models import Model, communication, model_of, steps, worst_errors, write_steps
from .wide_models import write_random

MODELS = [("llava", 8), ("llava", 2), ("mllama", 2)]
TP = (2, 4)
TOLERANCE = 1e-5


# --- The cutter alone ------------------------------------------------------------------------------------------------------


def floats(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def graph_of(
    forward: Callable[..., object], inputs: int = 1, outputs: tuple[TensorSpec, ...] = (floats("y", 2, 4),)
) -> GraphDef:
    """A graph of two ranks with inputs x0, x1, ... [2, 4] and a weight w [2, 4]."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = empty_parameter(2, 4)

        def forward(self, *x: Tensor) -> object:
            return forward(self.w, *x)

    with torch.device("meta"):
        module = Module()
    specs = tuple(floats(f"x{i}", 2, 4) for i in range(inputs))
    return GraphDef(GraphKey("decode", 2), module, specs, outputs)


def cut_of(graph: GraphDef) -> Cut:
    return cut(graph, trace(graph))


def shown(found: Cut) -> list[str]:
    """The steps as text: what is read, what is done, what is written."""

    def show(step: Part | Collective) -> str:
        if isinstance(step, Collective):
            return f"{step.reads} {step.op} {step.writes}"
        return f"{' '.join(s.name for s in step.inputs)} -> {' '.join(s.name for s in step.outputs)}"

    return [show(step) for step in found.steps]


def summed(x: Tensor) -> Tensor:
    return ops.all_reduce(x, 2)


def test_a_graph_that_meets_nobody_is_one_part() -> None:
    found = cut_of(graph_of(lambda w, a, b: a * w + a, inputs=2))
    assert shown(found) == ["x0 x1 -> y"] and not found.buffers  # an input that nothing reads is one all the same


def test_sums_are_made_in_place_and_one_buffer_serves_them_all() -> None:
    def forward(w: Tensor, x: Tensor) -> Tensor:
        for _ in range(3):
            x = ops.gelu(summed(ops.gelu(x)))
        return x

    # A segment reads its input until it has written its output: two buffers in turn, for three sums.
    expected = ["x0 -> buffer.0", "buffer.0 all_reduce buffer.0", "buffer.0 -> buffer.1", "buffer.1 all_reduce buffer.1"]
    expected += ["buffer.1 -> buffer.0", "buffer.0 all_reduce buffer.0", "buffer.0 -> y"]
    found = cut_of(graph_of(forward))
    assert shown(found) == expected
    assert found.buffers == (floats("buffer.0", 2, 4), floats("buffer.1", 2, 4))


def test_a_value_used_two_segments_later_keeps_its_buffer() -> None:
    def forward(w: Tensor, x: Tensor) -> Tensor:
        kept = ops.gelu(x)
        y = summed(ops.gelu(kept))
        return summed(ops.gelu(y)) + kept

    expected = [
        "x0 -> buffer.0 buffer.1",
        "buffer.1 all_reduce buffer.1",
        "buffer.1 -> buffer.2",
        "buffer.2 all_reduce buffer.2",
    ]
    assert shown(cut_of(graph_of(forward))) == [*expected, "buffer.2 buffer.0 -> y"]


def test_what_is_summed_and_read_again_is_not_overwritten() -> None:
    def forward(w: Tensor, x: Tensor) -> Tensor:
        part = ops.gelu(x)
        return summed(part) + part

    expected = ["x0 -> buffer.0", "buffer.0 all_reduce buffer.1", "buffer.1 buffer.0 -> y"]
    assert shown(cut_of(graph_of(forward))) == expected


def test_collectives_in_a_row_have_no_segment_between() -> None:
    def forward(w: Tensor, x: Tensor) -> Tensor:
        return ops.all_gather(summed(ops.gelu(x)), 2)

    found = cut_of(graph_of(forward, outputs=(floats("y", 2, 8),)))
    assert shown(found) == ["x0 -> buffer.0", "buffer.0 all_reduce buffer.0", "buffer.0 all_gather y"]
    assert [step.ranks for step in found.steps if isinstance(step, Collective)] == [2, 2]


def test_an_input_goes_where_it_is_used_and_is_never_overwritten() -> None:
    found = cut_of(graph_of(lambda w, a, b: summed(a) * b, inputs=2))
    assert shown(found) == ["x0 all_reduce buffer.0", "buffer.0 x1 -> y"]


def test_what_is_made_of_weights_alone_is_made_where_it_is_used() -> None:
    def forward(w: Tensor, x: Tensor) -> Tensor:
        doubled = w + w
        return summed(x * doubled) * doubled

    found = cut_of(graph_of(forward))
    assert shown(found) == ["x0 -> buffer.0", "buffer.0 all_reduce buffer.0", "buffer.0 -> y"]
    assert [[node.target for node in part.nodes].count(torch.ops.aten.add.Tensor) for part in found.parts] == [1, 1]


def test_buffers_of_other_shapes_are_not_shared() -> None:
    def forward(w: Tensor, x: Tensor) -> Tensor:
        wide = ops.all_gather(ops.gelu(x), 2)
        return ops.all_gather(ops.gelu(wide), 2)

    found = cut_of(graph_of(forward, outputs=(floats("y", 2, 16),)))
    assert [spec.shape for spec in found.buffers] == [(2, 4), (2, 8), (2, 8)]


def test_outputs_leave_where_they_are_made() -> None:
    outputs = (floats("y", 2, 4), floats("z", 2, 4))
    found = cut_of(graph_of(lambda w, x: (summed(ops.gelu(z := ops.gelu(x))), z), outputs=outputs))
    assert shown(found) == ["x0 -> z buffer.0", "buffer.0 all_reduce y"]


def awkward(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A slice that takes everything, a sum that is not made in place, one of an input, and a gather that is read twice."""
    part = ops.gelu(x)
    total = summed(part) * part + summed(y) + summed(torch.ops.aten.slice.Tensor(x, 1, 0, 4))
    joined = ops.all_gather(total * w, 2)
    return summed(ops.gelu(joined)) + joined


def test_awkward_graphs_run(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((2, 4), np.float32)
    graph = replace(graph_of(awkward, inputs=2, outputs=(floats("y", 2, 8),)), constants={"w": w})
    emitted = emit_steps(graph, {}, "awkward")
    (tmp_path / "awkward").mkdir()
    for name, data in emitted.files.items():
        (tmp_path / name).write_bytes(data)
    spec = msgspec.structs.replace(graph.spec(), file="awkward", steps=emitted.steps, buffers=emitted.buffers)
    nothing = CacheSpec(layers=0, kv_heads=1, head_dim=1, slots=1, context=1, rows=1, dtype="float32")

    def work(rank: int) -> None:
        rng = np.random.default_rng(1 + rank)
        fed = {name: rng.standard_normal((2, 4), np.float32) for name in ("x0", "x1")}
        before = {name: array.copy() for name, array in fed.items()}
        backend = OrtBackend(tmp_path, nothing, threads=1, group=array_group(2))
        expected = awkward(*map(torch.from_numpy, (w, *fed.values()))).numpy()
        for _ in range(2):  # a second run finds what the first has left
            np.testing.assert_allclose(backend.run(spec, fed).first, expected, rtol=1e-5, atol=1e-5)
        assert all(np.array_equal(before[name], fed[name]) for name in fed)
        backend.unload(spec)
        assert not (backend.sessions or backend.buffers or backend.outputs or backend.bound)

    run_ranks(2, work)


# --- Ranks on onnxruntime ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Emitted:
    """The graphs of one cut, written into the folder of the model."""

    specs: dict[str, GraphSpec]
    cuts: dict[str, Cut]


@pytest.fixture(scope="module", params=MODELS, ids=lambda param: f"{param[0]}-{param[1]}")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, kv_heads = request.param
    model = model_of(family, kv_heads, tmp_path_factory.mktemp("segments"))
    write_random(model.config, model.folder)
    return model


@pytest.fixture(scope="module")
def whole(model: Model) -> list[np.ndarray]:
    return alone(model)


def alone(model: Model, *, exact: bool = False) -> list[np.ndarray]:
    """What the whole model's graphs find."""
    weights, specs = model.converted(1, 0).weights, {}
    for kind, graph in model.traced_once(1).items():
        specs[kind] = msgspec.structs.replace(graph.spec(), file=f"{graph.name}.onnx")
        (model.out / specs[kind].file).write_bytes(emit(graph, weights, exact=exact))
    backend = OrtBackend(model.out, model.cache(1), threads=1)
    found = steps(backend, specs, list(backend.caches))
    assert all(np.isfinite(each).all() and each.std() > 0 for each in found)
    return found


def results(model: Model, tp: int, *, exact: bool = False) -> list[list[np.ndarray]]:
    """What every rank finds. Files are emitted once, with the weights of the last rank."""
    stored = [model.converted(tp, rank) for rank in range(tp)]
    specs = write_steps(model, tp, stored[-1].weights, exact=exact)

    def work(rank: int) -> list[np.ndarray]:
        backend = OrtBackend(model.out, model.cache(tp), threads=1, group=array_group(tp))
        return steps(backend, specs, list(backend.caches))

    return run_ranks(tp, work)[0]


@pytest.mark.parametrize("tp", TP)
def test_ranks_compute_what_the_whole_model_computes(model: Model, whole: list[np.ndarray], tp: int) -> None:
    ranks = results(model, tp)
    errors = worst_errors(model, ranks, whole)
    assert len(errors) == len(whole) and max(errors) <= TOLERANCE, errors
    logits = [found[-1 - len(model.cache(tp).buffers())] for found in ranks]
    assert all(np.array_equal(each, logits[0]) for each in logits), "every rank samples the same token"


def test_communication_is_what_was_counted(model: Model) -> None:
    specs = write_steps(model, 2, model.converted(2, 0).weights, exact=False)

    def work(rank: int) -> tuple[int, int]:
        group = array_group(2, Counting)
        steps(OrtBackend(model.out, model.cache(2), threads=1, group=group), specs, [])
        return group.calls, group.nbytes

    for rank in (1, 0):
        model.converted(2, rank)
    assert run_ranks(2, work)[0] == [communication(model.define(2), "float32")] * 2
    assert communication(model.define(1), "float32") == (0, 0)


def test_in_8_bits_where_cuts_fall_between_blocks(tmp_path: Path) -> None:
    """Kernels round activations block by block, so the exact twins are compared."""
    model = model_of("llava", 8, tmp_path)
    model = replace(model, config=replace(model.config, text=replace(model.config.text, intermediate_size=64)), quant="w8a16")
    write_random(model.config, tmp_path)
    assert max(worst_errors(model, results(model, 2, exact=True), alone(model, exact=True))) <= TOLERANCE
    assert np.isfinite(results(model, 2)[0][-1]).all()


def deeper(model: Model, by: int) -> Model:
    """With so many layers more in the tower and in the decoder."""
    config = model.config
    text = replace(config.text, layers=config.text.layers + by)
    more = {name: getattr(config.vision, name) + by for name in ("layers", "used_layers") if hasattr(config.vision, name)}
    return replace(model, config=replace(config, text=text, vision=replace(config.vision, **more)))


@pytest.mark.parametrize("model", MODELS[1:], indirect=True, ids=lambda param: f"{param[0]}-{param[1]}")
def test_depth_costs_no_buffers(model: Model) -> None:
    """What a layer leaves behind lies where the layer before it left it."""
    text = model.config.text
    if text.layers - 1 in text.cross_layers:  # the last of each is of one kind: it alone works on one token
        model = deeper(model, 1)
    for shallow, deep in zip(model.traced_once(2).values(), deeper(model, 4).define(2).values(), strict=True):
        few, many = cut_of(shallow), cut_of(deep)
        assert len(many.steps) >= len(few.steps) + 4 * 2 * 2
        meets = [step for step in many.steps if isinstance(step, Collective)]
        assert len(many.buffers) == len(few.buffers) < len(meets)
        assert all(step.reads == step.writes for step in meets if step.op == "all_reduce")


def test_caches_go_only_to_the_segments_that_use_them(model: Model) -> None:
    for part in cut_of(model.traced_once(2)["decode"]).parts:
        assert len([spec for spec in part.inputs if "_cache." in spec.name]) in (0, 2)


# --- What would be seen ------------------------------------------------------------------------------------------------------


def weights_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staticvl.runtime.backends.ort.weights_folder", lambda group: "weights/rank-0")


@pytest.mark.parametrize("model", [("mllama", 2)], indirect=True, ids=["mllama"])
@pytest.mark.parametrize("fault", [not_summed, weights_of_rank_0, reversed_gather])
def test_a_fault_is_seen(
    model: Model, whole: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], tmp_path: Path
) -> None:
    fault(monkeypatch)
    found = results(replace(model, out=tmp_path), 2)
    assert max(worst_errors(model, found, whole)) > 100 * TOLERANCE


# --- What is written --------------------------------------------------------------------------------------------------------


def test_segments_are_the_same_for_all_ranks(model: Model) -> None:
    graph = model.traced_once(2)["decode"]
    first, second = (emit_steps(graph, model.converted(2, rank).weights, "decode") for rank in range(2))
    assert first == second
    assert not any(b"rank-" in data for data in first.files.values())


def test_a_whole_graph_is_emitted_node_by_node_in_one_piece(model: Model) -> None:
    """Emitting knows no cuts here: every traced node in its order, every input and output."""
    weights = model.converted(1, 0).weights
    for graph in model.traced_once(1).values():
        program = trace(graph)
        e = Emitter(weights, graph.constants)
        e.names |= program.parameters
        e.names |= {node: given.name for node, given in zip(program.inputs, graph.inputs, strict=True)}
        results: tuple[torch.fx.Node, ...] = ()
        for node in program.graph.nodes:
            if node.op == "call_function" and "_assert" not in str(node.target):
                e.names[node] = _lower(e, node)
            elif node.op == "output":
                results = node.args[0]
        part = Part((), graph.inputs, graph.outputs, {}, results)
        assert emit(graph, weights) == _model(e, graph.name, part, [e[node] for node in results]).SerializeToString()


def spec_with(model: Model, steps: tuple[Step, ...]) -> GraphSpec:
    return msgspec.structs.replace(model.define(2)["decode"].spec(), file="g", steps=steps)


def test_a_part_of_a_model_does_not_run_by_itself(model: Model) -> None:
    meet = Collective(op="all_reduce", ranks=2, reads="a", writes="a")
    backend = OrtBackend(model.out, model.cache(2), threads=1)
    with pytest.raises(ArtifactError, match="for one of 2 ranks, but its group has 1; open all 2 ranks together"):
        backend.run(spec_with(model, (meet,)), {})


def test_steps_survive_the_manifest_and_absent_ones_leave_no_trace(model: Model) -> None:
    segment = Segment(file="g.000.onnx", inputs=("a",), outputs=("b",))
    spec = spec_with(model, (segment, Collective(op="all_gather", ranks=2, reads="b", writes="c")))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=GraphSpec) == spec and spec.plan == spec.steps
    plain = model.define(1)["decode"].spec()
    assert not {"steps", "buffers"} & set(msgspec.json.decode(msgspec.json.encode(plain)))
    assert [type(step) for step in plain.plan] == [Segment]


def test_a_table_looked_up_by_an_input_is_not_made_of_weights() -> None:
    with torch.device("meta"):
        module = Table(4, 8, ranks=2)
    ids = TensorSpec(name="ids", dtype="int32", shape=(1, 2))
    graph = GraphDef(GraphKey("decode", 1), module, (ids,), (floats("y", 1, 2, 8),))
    assert shown(cut_of(graph)) == ["ids -> buffer.0", "buffer.0 all_gather y"]

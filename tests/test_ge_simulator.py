"""The GE simulator: what it parses, checks and writes in place; graphs that torchair lowers, against plain torch formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraphError, Source, parse
from staticvl.runtime.backends.ge_simulator.simulator import Simulator

from .ge_formulas import (
    FLOATS,
    HALVES,
    behind,
    by_rows,
    close,
    compressed,
    convolved,
    ints,
    rand,
    rms,
    standard,
    turned,
)
from .ge_graphs import build, compute, edited, lower, set_attribute
from .need_torchair import skip_without_torchair

skip_without_torchair()

H, K, D = 4, 2, 8  # heads, kv heads, head dim


def simple() -> bytes:
    return build(lambda ge, x, y: ge.Add(ge.Muls(x, value=2.0), y), torch.zeros(2, 3).half(), torch.zeros(3).half())


def change(**fields: Any) -> Callable[[Any], None]:
    def edit(graph: Any) -> None:
        for name, value in fields.items():
            setattr(next(op for op in graph.op if op.type == "Muls"), name, value)

    return edit


def test_parse() -> None:
    graph = parse(simple())
    assert [node.type for node in graph.nodes] == ["Data", "Data", "Muls", "Add", "NetOutput"]
    assert graph.node("Add").inputs == (Source("Muls", 0), Source("in1", 0))
    assert graph.node("Muls").attributes["value"] == 2.0
    assert [(node.outputs[0].dtype, node.outputs[0].shape) for node in graph.inputs] == [("float16", (2, 3)), ("float16", (3,))]
    assert graph.outputs == (Source("Add", 0),)
    assert graph.readers(Source("Muls", 0)) == [graph.node("Add")]
    with pytest.raises(KeyError):
        graph.node("Sub")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool])
def test_constants(dtype: torch.dtype) -> None:
    value = torch.tensor([[1.5, 0], [-2.25, 1]]).to(dtype)
    data = build(lambda ge, x: (x, ge.Const(value, node_name="table"), ge.Const([], dtype=9)), torch.zeros(1))
    constants = parse(data).constants()
    assert constants["table"].array().tolist() == value.tolist()
    assert constants["table"].dtype == str(dtype).removeprefix("torch.")
    found = Simulator(data)([torch.zeros(1)])
    assert torch.equal(found[1], value)
    assert found[2].shape == (0,)


def test_nodes_run_behind_what_they_need() -> None:
    def reverse(graph: Any) -> None:
        ops = [type(op).FromString(op.SerializeToString()) for op in graph.op]
        del graph.op[:]
        graph.op.extend(reversed(ops))

    x, y = torch.ones(2, 3).half(), torch.full((3,), 5.0).half()
    assert Simulator(edited(simple(), reverse))([x, y])[0].tolist() == [[7, 7, 7]] * 2

    def wait(graph: Any) -> None:  # in1 has a reader; make the first operator wait for one that would come later
        graph.op.add(type="Neg", name="Neg", input=["in1:0"]).input_desc.add(name="x")
        graph.op[-1].output_desc.add(name="y")
        next(op for op in graph.op if op.type == "Muls").input.append("Neg:-1")

    types = [node.type for node in parse(edited(simple(), wait)).nodes]
    assert types.index("Neg") < types.index("Muls")


def cycle(graph: Any) -> None:
    next(op for op in graph.op if op.type == "Muls").input.append("Add:-1")


def renumber(graph: Any) -> None:
    graph.op[1].attr["index"].i = 5


def rename(graph: Any) -> None:
    next(op for op in graph.op if op.type == "Muls").name = "Add"


def cut(graph: Any) -> None:
    next(op for op in graph.op if op.type == "Muls").input[0] = "nobody:0"


def end(graph: Any) -> None:
    del graph.op[-1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (cycle, "depends on its own output"),
        (renumber, r"indices \[0, 5\]; expected 0 to 1"),
        (rename, "two nodes of the graph have one name"),
        (cut, "takes an output of nobody, which is not in the graph"),
        (end, "0 nodes of type NetOutput"),
    ],
)
def test_parse_refuses(edit: Callable[[Any], None], message: str) -> None:
    with pytest.raises(GeGraphError, match=message):
        parse(edited(simple(), edit))


def test_parse_refuses_other_bytes() -> None:
    with pytest.raises(GeGraphError, match="no serialised GE model"):
        parse(b"\xff\xff\xff")
    with pytest.raises(GeGraphError, match="holds 0 graphs"):
        parse(b"")


def attribute(name: str, value: Any, op_type: str = "Muls") -> Callable[[Any], None]:
    return lambda graph: set_attribute(graph, op_type, name, value)


def feed(graph: Any) -> None:
    op = next(op for op in graph.op if op.type == "Muls")
    op.input.append("in1:0")
    op.input_desc.add(name="mask")


def starve(graph: Any) -> None:
    op = next(op for op in graph.op if op.type == "Muls")
    op.input[0] = ""


def forget(graph: Any) -> None:
    del next(op for op in graph.op if op.type == "Muls").attr["value"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(type="Frobnicate"), "Frobnicate Muls: operators of type Frobnicate are not simulated"),
        (attribute("rounding", 3), "Muls Muls: attribute rounding = 3 is not supported"),
        (feed, "Muls Muls: input mask is not supported"),
        (starve, "Muls Muls: input x is missing"),
        (forget, "Muls Muls: attribute value is missing"),
    ],
)
def test_the_simulator_refuses(edit: Callable[[Any], None], message: str) -> None:
    with pytest.raises(GeGraphError, match=message):
        Simulator(edited(simple(), edit))


def test_attributes_of_torchair_itself_are_passed_over() -> None:
    Simulator(edited(simple(), attribute("_readable_value", "x")))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.zeros(2, 3).half()], "1 inputs were given to a graph of 2"),
        ([torch.zeros(2, 4).half(), torch.zeros(3).half()], r"input 0 \(in0\) has the shape \[2, 4\]; expected \[2, 3\]"),
        ([torch.zeros(2, 3).half(), torch.zeros(3)], r"input 1 \(in1\) is torch.float32; expected torch.float16"),
    ],
)
def test_inputs_are_checked(inputs: list[Tensor], message: str) -> None:
    with pytest.raises(GeGraphError, match=message):
        Simulator(simple())(inputs)


def test_wide_takes_halves_as_float32() -> None:
    x, y = rand(2, 3), rand(3)
    close(Simulator(simple(), wide=True)([x, y])[0], 2 * x + y)
    with pytest.raises(GeGraphError, match=r"is torch\.int32; expected torch\.float16"):
        Simulator(simple(), wide=True)([x.int(), y])


def test_an_output_that_torchair_traced_otherwise_is_an_error() -> None:
    def lie(graph: Any) -> None:
        described = next(op for op in graph.op if op.type == "Muls").output_desc[0]
        described.attr["_meta"].s = b"Tensor(dtype=torch.float16, shape=torch.Size([2, 4])"

    with pytest.raises(GeGraphError, match=r"output y has the shape \[2, 3\]; torchair traced \[2, 4\]"):
        Simulator(edited(simple(), lie))([torch.zeros(2, 3).half(), torch.zeros(3).half()])


def test_assigned_outputs_are_written_there() -> None:
    target, x, y = torch.zeros(2, 3).half(), torch.ones(2, 3).half(), torch.zeros(3).half()
    found = Simulator(simple())([x, y], [target])
    assert found[0] is target
    assert target.tolist() == [[2, 2, 2]] * 2
    with pytest.raises(GeGraphError, match="2 tensors are assigned to 1 outputs"):
        Simulator(simple())([x, y], [target, target])


def test_outputs_that_swap_two_inputs() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    Simulator(build(lambda ge, a, b: (ge.Identity(b), ge.Identity(a)), a, b))([a, b], [a, b])
    assert (a.tolist(), b.tolist()) == ([0, 0], [1, 1])


def test_values_go_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[list[str]] = []
    run = Simulator._run_node

    def watch(self: Simulator, step: Any, values: dict[Source, Tensor]) -> None:
        run(self, step, values)
        held.append([source.producer for source in values])

    monkeypatch.setattr(Simulator, "_run_node", watch)
    Simulator(simple())([torch.zeros(2, 3).half(), torch.zeros(3).half()])
    assert held == [["in1", "Muls"], ["Add"]]


def test_an_output_is_no_view_of_a_constant() -> None:
    simulator = Simulator(build(lambda ge, x: (x, ge.Identity(ge.Const(1.0))), torch.zeros(1)))
    simulator([torch.zeros(1)])[1].fill_(7)
    assert simulator([torch.zeros(1)])[1].item() == 1


def test_operands_that_do_not_fit_name_the_operator() -> None:
    with pytest.raises(GeGraphError, match=r"Add Add: The size of tensor a \(3\) must match"):
        compute(lambda ge, x, y: ge.Add(x, y), rand(3), rand(4))


def write(ge: Any, cache: Any, at: Any, new: Any, axis: int = 2) -> Any:
    return ge.Scatter(cache, at, new, reduce="update", axis=axis)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scatter_is_seen_by_the_caller(dtype: torch.dtype) -> None:
    cache, new, at = rand(2, 2, 6, 4).to(dtype), rand(2, 2, 3, 4).to(dtype), ints(0, 3, dtype=torch.int32)
    expected = cache.clone()
    expected[0, :, 0:3], expected[1, :, 3:6] = new[0], new[1]
    for wide in (False, True):
        mine = cache.clone()
        found = Simulator(build(lambda ge, c, a, n: ge.Identity(write(ge, c, a, n)), mine, at, new), wide=wide)([mine, at, new])
        assert torch.equal(mine, expected)
        close(found[0], expected)
        assert found[0].data_ptr() != mine.data_ptr()


@pytest.mark.parametrize(("starts", "message"), [((0, 4), "rows 4 to 6 of row 1"), ((-1, 0), "rows -1 to 1 of row 0")])
def test_scatter_out_of_range_writes_nothing(starts: tuple[int, int], message: str) -> None:
    cache = torch.zeros(2, 2, 6, 4).half()
    with pytest.raises(GeGraphError, match=f"Scatter.*{message}"):
        compute(write, cache, ints(*starts), torch.ones(2, 2, 3, 4).half())
    assert not cache.any()


def test_scatter_takes_a_graph_input_or_a_copy_that_nobody_else_reads() -> None:
    cache, at, new = torch.zeros(2, 2, 6, 4).half(), ints(0, 0), torch.ones(2, 2, 1, 4).half()
    with pytest.raises(GeGraphError, match="Scatter Scatter writes in place what Neg Neg made; expected a graph input"):
        compute(lambda ge, c, a, n: write(ge, ge.Neg(c), a, n), cache, at, new)
    with pytest.raises(GeGraphError, match="writes in0 in place, which Neg reads too"):
        compute(lambda ge, c, a, n: (ge.Neg(c), write(ge, c, a, n)), cache, at, new)
    found = compute(lambda ge, c, a, n: (ge.Neg(c), write(ge, ge.TensorMove(c), a, n)), cache, at, new)
    assert found[1].any()
    assert not cache.any()


@pytest.mark.parametrize("shape", [(2, 2, 6, 4), (1, 2, 1, 4)])
def test_scatter_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    axis = 0 if shape[0] == 2 else 2
    with pytest.raises(GeGraphError, match=r"of var \[2, 2, 6, 4\]"):
        compute(lambda ge, c, a, n: write(ge, c, a, n, axis), torch.zeros(2, 2, 6, 4), ints(0, 0), torch.ones(shape))


def test_other_operators_that_write_in_place() -> None:
    table, rows = torch.zeros(4, 2), torch.ones(2, 2)
    compute(lambda ge, t, i, r: ge.ScatterUpdate(t, i, r), table, ints(3, 1), rows)
    assert table.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    compute(lambda ge, t, v: ge.Assign(t, v), table, torch.full((4, 2), 5.0))
    assert table.tolist() == [[5, 5]] * 4
    with pytest.raises(GeGraphError, match="out of range"):
        compute(lambda ge, t, i, r: ge.ScatterUpdate(t, i, r), table, ints(3, 4), rows)


def test_a_cached_decoder_layer() -> None:
    """RMS norm, projections, rotary embedding, cache write, attention and SwiGLU as torchair lowers them, in place."""
    b, t, s, c, lengths = 2, 2, 7, H * D, ints(0, 4, dtype=torch.int32)
    npu, air = torch.ops.npu, torch.ops.air

    def layer(x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, gate: Tensor, cos: Tensor, sin: Tensor,
              mask: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:  # fmt: skip
        y = npu.npu_rms_norm.default(x, norm, 1e-5)[0]
        q = npu.npu_rotary_mul.default((y @ wq.t()).view(b, t, H, D), cos, sin).transpose(1, 2)
        k = npu.npu_rotary_mul.default((y @ wk.t()).view(b, t, K, D), cos, sin).transpose(1, 2)
        v = (y @ wv.t()).view(b, t, K, D).transpose(1, 2)
        keys = npu.scatter_update.default(k_cache, lengths, k.contiguous(), 2)
        values = npu.scatter_update.default(v_cache, lengths, v.contiguous(), 2)
        out = air.npu_fused_infer_attention_score.default(
            q.contiguous(), keys, values, atten_mask=mask, actual_seq_lengths_kv=(lengths + t).long(), num_heads=H,
            num_key_value_heads=K, scale=D**-0.5, input_layout="BNSD", sparse_mode=3,
        )[0]  # fmt: skip
        x = x + out.transpose(1, 2).reshape(b, t, c) @ wo.t()
        k_cache.copy_(keys)
        v_cache.copy_(values)
        return npu.npu_swiglu.default(x @ gate.t()).float()

    def formula(x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, gate: Tensor, cos: Tensor, sin: Tensor,
                _mask: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        y = rms(x, norm, 1e-5)
        q, k = (turned((y @ w.T).view(b, t, -1, D), cos, sin).transpose(1, 2) for w in (wq, wk))
        v = (y @ wv.T).view(b, t, K, D).transpose(1, 2)
        for row, start in enumerate(lengths.tolist()):
            k_cache[row, :, start : start + t], v_cache[row, :, start : start + t] = k[row], v[row]
        kv_lengths = (lengths + t).tolist()
        out, _ = by_rows(
            q, behind(k_cache, kv_lengths, 0), behind(v_cache, kv_lengths, 0), [t] * b, kv_lengths, None, 3, (0, 0)
        )
        y = (x + out.transpose(1, 2).reshape(b, t, c) @ wo.T) @ gate.T
        half = y.shape[-1] // 2
        return y[..., :half] * torch.sigmoid(y[..., :half]) * y[..., half:], k_cache, v_cache

    small = [(b, t, c), (c,), (c, c), (K * D, c), (K * D, c), (c, c), (24, c), (b, t, 1, D), (b, t, 1, D)]
    values = [rand(*shape) / (6 if len(shape) == 2 else 1) for shape in small]
    caches = [behind(rand(b, K, s, D) * scale, lengths.tolist(), 99.0) for scale in (1, 2)]
    for dtype in HALVES:
        halves = [each.to(dtype) for each in values]
        mine = [each.to(dtype) for each in caches]
        lowered = lower(layer, *halves, compressed(), *mine, lengths)
        wide = [each.float() for each in (*halves, *[each.to(dtype) for each in caches])]
        expected = formula(*wide[:9], compressed(), *wide[9:], lengths)
        coarse = 0.02 if dtype == torch.float16 else 0.15
        for found, wanted in zip((lowered.result, *mine), expected, strict=True):
            assert (found.float() - wanted).abs().max() < coarse * wanted.where(wanted != 99, 0).abs().max()
        close(lowered.run(wide=True)[0], expected[0])
        assert not parse(lowered.data).types().get("TensorMove")  # the caches are not copied


def test_a_vision_layer() -> None:
    """A convolution of patches, layer norm, softmax attention and GELU as torchair lowers them."""

    def layer(pixels: Tensor, kernel: Tensor, bias: Tensor, norm: Tensor, shift: Tensor, up: Tensor) -> Tensor:
        x = functional.conv2d(pixels, kernel, bias, stride=2).flatten(2).transpose(1, 2)
        x = functional.layer_norm(x, (8,), norm, shift, 1e-5)
        x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
        return torch.ops.npu.npu_gelu.default(functional.linear(torch.cat((x[:, :1], x), 1), up, shift))

    def formula(pixels: Tensor, kernel: Tensor, bias: Tensor, norm: Tensor, shift: Tensor, up: Tensor) -> Tensor:
        x = convolved(pixels, kernel, bias, 2).flatten(2).transpose(1, 2)
        x = standard(x, 1) * norm + shift
        scores = torch.exp(x @ x.transpose(1, 2))
        x = scores / scores.sum(-1, keepdim=True) @ x
        x = torch.cat((x[:, :1], x), 1) @ up.T + shift
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))

    operands = [rand(2, 3, 6, 6), rand(8, 3, 2, 2), rand(8), rand(8), rand(8) * 2, rand(8, 8)]
    for dtype in FLOATS:
        given = [each.to(dtype) for each in operands]
        lowered = lower(layer, *given)
        expected = formula(*[each.float() for each in given])
        close(lowered.run(wide=True)[0], expected)
        assert (lowered.result.float() - expected).abs().max() < {
            torch.float32: 1e-4,
            torch.float16: 0.02,
            torch.bfloat16: 0.2,
        }[dtype]

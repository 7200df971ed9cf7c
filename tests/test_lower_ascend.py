"""Lowering to Ascend operators: every op by itself against its definition, and the graphs of the tiny models.

Both run on the simulator: what torchair made is computed in float32, which has to give what the definition gives, and in
the graph's own dtype, which may round.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from staticvl.compiler import emit_eager, lower_ascend
from staticvl.compiler.ascend_graph import attention, products
from staticvl.compiler.emit_ascend import EmitError, Emitted, emit
from staticvl.compiler.graphs import GraphContext, GraphDef, define_graph
from staticvl.compiler.plan import Buckets, Options, make_plan
from staticvl.model_defs import ops
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import CROSS_HIDDEN, ImageProcessorConfig
from staticvl.runtime.backends.ascend.weights import to_offsets, to_signed
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.weights.merging import complete_groups, merged_shapes
from staticvl.weights.quantize import joined_halves, quantize_w4, quantize_w8, quantize_w8a8

from .conftest import EMBEDDED, REPO
from .ge_graphs import lower
from .need_torchair import skip_without_torchair
from .tiny_families import GOLDEN_QWEN

skip_without_torchair()

LLAVA, LLAVA_NEXT, MLLAMA = EMBEDDED, EMBEDDED.with_name("tiny_llava16"), EMBEDDED.with_name("tiny_mllama")
EXACT, ROUNDED = 1e-5, 1e-2


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-9))


# --- One op at a time ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """`call` gets an op, its definition or its lowering, and the tensors."""

    op: str
    tensors: tuple[Tensor, ...]
    call: Callable[..., Any]


def case(op: str, *tensors: Tensor, then: tuple[Any, ...] = ()) -> Case:
    return Case(op, tensors, lambda f, *given: f(*given, *then))


@functools.cache
def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator()).half()


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cached(rows: int, tokens: int, *lengths: int, room: int = 12) -> Case:
    """Rows after the length are what an earlier sequence left."""
    heads, kv_heads, d = 4, 2, 16
    caches = [rand(rows, kv_heads, room, d) for _ in "kv"]
    for row, length in enumerate(lengths):
        for each in caches:
            each[row, :, length:] = 100
    q, k, v = rand(rows, tokens, heads * d), rand(rows, tokens, kv_heads * d), rand(rows, tokens, kv_heads * d)
    return case("cached_attention", q, k, v, *caches, ints(*lengths), then=(heads,))


def cached_in_8_bits(rows: int, tokens: int, *lengths: int, room: int = 12) -> Case:
    """The same; some keys lie beyond the last step."""
    heads, kv_heads, d = 4, 2, 32
    caches = [torch.randint(-128, 128, (rows, kv_heads, room, d), generator=_generator(), dtype=torch.int8) for _ in "kv"]
    scales = [(rand(kv_heads, 1, d).abs() + 0.1) / 50 for _ in "kv"]
    q, k, v = rand(rows, tokens, heads * d), rand(rows, tokens, kv_heads * d), rand(rows, tokens, kv_heads * d)
    k[..., :2] = torch.tensor([100.0, -100.0])
    return case("int8_cached_attention", q, k, v, *caches, *scales, ints(*lengths), then=(heads,))


def paged(rows: int, tokens: int, *lengths: int, in_8_bits: bool = False) -> Case:
    """Pages in any order, the first of which two rows share; the other pages, and what lies after a length, are garbage."""
    heads, kv_heads, d, width, page = 4, 2, 32, 2, 128
    pages = 1 + rows * width
    table = 1 + torch.randperm(rows * width, generator=_generator()).view(rows, width)
    if rows > 1 and lengths[0] >= page <= lengths[1]:
        table[1, 0] = table[0, 0]
    at = torch.tensor(lengths)[:, None] + torch.arange(tokens)
    slots = table.gather(1, at // page) * page + at % page
    if in_8_bits:
        caches = [torch.randint(-128, 128, (pages, page, kv_heads, d), generator=_generator(), dtype=torch.int8) for _ in "kv"]
        scales = [(rand(kv_heads, 1, d).abs() + 0.1) / 50 for _ in "kv"]
    else:
        caches, scales = [rand(pages, page, kv_heads, d) for _ in "kv"], []
        for each in caches:
            each[0] = 100
            for row, length in enumerate(lengths):
                each[table[row, length // page], length % page :] = 100
    q, k, v = rand(rows, tokens, heads * d), rand(rows, tokens, kv_heads * d), rand(rows, tokens, kv_heads * d)
    places = (ints(*lengths), table.int(), slots.int())
    return case("int8_paged_attention" if in_8_bits else "paged_attention", q, k, v, *caches, *scales, *places, then=(heads,))


def narrow(subject: Case) -> Case:
    """The same in bfloat16, whose kernels differ from those in float16."""
    return Case(subject.op, tuple(x.bfloat16() if x.is_floating_point() else x for x in subject.tensors), subject.call)


def crossed(tokens: int, images: int) -> Case:
    """Two tiles an image of three keys each; the first token of a row sees nothing, the last everything."""
    q, keys = rand(2, tokens, 64), [rand(2, 2, 6, 16) for _ in range(2 * images)]
    mask = torch.where(torch.rand((2, tokens, 2 * images), generator=_generator()) < 0.5, 0.0, CROSS_HIDDEN)
    mask[:, -1], mask[:, 0, 0] = 0, 0
    mask[0, 0] = CROSS_HIDDEN

    def call(op: Callable[..., Any], q: Tensor, mask: Tensor, *keys: Tensor) -> Tensor:
        return op(q, list(keys[:images]), list(keys[images:]), mask, 4)

    return Case("cross_attention", (q, mask, *keys), call)


def quantised(columns: int, block: int, *, bias: bool, bits: int = 8) -> Case:
    qweight, scales = (quantize_w8 if bits == 8 else quantize_w4)(rand(6, columns).float(), block)
    given = (rand(2, 3, columns), qweight, scales.half(), *([rand(6)] if bias else []))
    return Case(f"linear_w{bits}", given, lambda f, x, q, s, b=None: f(x, q, s, b))


def around_zero_points(columns: int, *, bits: int, block: int = 32) -> Case:
    """As `quantised`, each block with a zero point of its own, the least and the largest among them."""
    subject = quantised(columns, block, bias=False, bits=bits)
    x, qweight, scales = subject.tensors
    zeros = torch.randint(0, 1 << bits, scales.shape, generator=_generator(), dtype=torch.uint8)
    zeros[0, 0], zeros[-1, -1] = 0, (1 << bits) - 1
    stored = joined_halves(zeros) if bits == 4 else zeros
    return Case(subject.op, (x, qweight, scales, stored), lambda f, x, q, s, z: f(x, q, s, None, z))


def whole_numbers(*, bias: bool) -> Case:
    """Its kernel rounds in any case: computed wide, it does not, as its definition without rounding."""
    given = (rand(2, 3, 70), *quantize_w8a8(rand(6, 70)), *([rand(6)] if bias else []))
    return Case("linear_w8a8", given, lambda f, x, q, s, b=None: f(x, q, s, b, False))


def top_k_ids(rows: int, vocab: int, count: int, factors: int | None = None) -> Case:
    """No two logits of a row are equal: which of equals are taken is open."""
    order = torch.rand((rows, vocab), generator=_generator()).argsort(-1)
    return case("top_tokens", (order / 64 - 8).half(), torch.linspace(0.5, 2, factors or rows), then=(count,))


def rotary(b: int, t: int, d: int) -> tuple[Tensor, Tensor]:
    cos, sin = rand(b, t, d // 2), rand(b, t, d // 2)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: case("linear", rand(2, 3, 10), rand(6, 10), rand(6)),
    "linear, no bias": lambda: case("linear", rand(4, 10), rand(6, 10), then=(None,)),
    "linear_w8": lambda: quantised(64, 32, bias=True),
    "linear_w8, one block": lambda: quantised(32, 32, bias=False),
    "linear_w8, last block not full": lambda: quantised(40, 32, bias=False),
    "linear_w4": lambda: quantised(64, 32, bias=True, bits=4),
    "linear_w4, one block": lambda: quantised(32, 32, bias=False, bits=4),
    "linear_w4, last block not full": lambda: quantised(40, 32, bias=False, bits=4),
    "linear_w8, zero points": lambda: around_zero_points(96, bits=8),
    "linear_w4, zero points": lambda: around_zero_points(64, bits=4),
    "linear_w4, zero points of an odd number": lambda: around_zero_points(96, bits=4),
    "linear_w4, zero points of wide blocks": lambda: around_zero_points(384, bits=4, block=128),
    "linear_w4, zero points of one block": lambda: around_zero_points(32, bits=4),
    "linear_w8a8": lambda: whole_numbers(bias=True),
    "linear_w8a8, no bias": lambda: whole_numbers(bias=False),
    "rms_norm": lambda: case("rms_norm", rand(2, 3, 10), rand(10), then=(1e-5,)),
    "rms_norm of heads": lambda: case("rms_norm", rand(2, 3, 4, 10), rand(10), then=(1e-2,)),
    "layer_norm": lambda: case("layer_norm", rand(2, 3, 10), rand(10), rand(10), then=(1e-5,)),
    "silu_mul": lambda: case("silu_mul", rand(2, 3, 10), rand(2, 3, 10)),
    "gelu": lambda: case("gelu", 3 * rand(40, 10)),
    "quick_gelu": lambda: case("quick_gelu", 3 * rand(40, 10)),
    "embed": lambda: case("embed", ints([3, 0, 4]), rand(5, 8)),
    "merge_rows": lambda: case("merge_rows", rand(1, 4, 8), rand(3, 8), ints([-1, 2, 0, -1])),
    "take_token": lambda: case("take_token", rand(1, 4, 8), ints(2)),
    "take_token of rows": lambda: case("take_token", rand(3, 4, 8), ints(2, 0, 3)),
    "top_tokens": lambda: top_k_ids(3, 50, 8),
    "top_tokens, blocks": lambda: top_k_ids(3, 1030, 8),
    "top_tokens, whole blocks, a draft": lambda: top_k_ids(2, 1280, 8, factors=1),
    "top_tokens, one row": lambda: top_k_ids(1, 1100, 8),
    "rope": lambda: case("rope", rand(2, 3, 4 * 16), *rotary(2, 3, 16)),
    "cached_attention, decode": lambda: cached(3, 1, 0, 5, 11),
    "cached_attention, prefill": lambda: cached(1, 4, 5),
    "cached_attention, first chunk": lambda: cached(1, 4, 0),
    "cached_attention, prefill of 1": lambda: cached(1, 1, 3),
    "cached_attention, full": lambda: cached(1, 4, 8),
    "int8_cached_attention, decode": lambda: cached_in_8_bits(3, 1, 0, 5, 11),
    "int8_cached_attention, prefill": lambda: cached_in_8_bits(1, 4, 5),
    "int8_cached_attention, first chunk": lambda: cached_in_8_bits(1, 4, 0),
    "int8_cached_attention, full": lambda: cached_in_8_bits(1, 4, 8),
    "int8_cached_attention, bfloat16": lambda: narrow(cached_in_8_bits(1, 4, 5)),
    "int8_cached_attention, bfloat16, decode": lambda: narrow(cached_in_8_bits(3, 1, 0, 5, 11)),
    "int8_cached_attention, bfloat16, full": lambda: narrow(cached_in_8_bits(1, 12, 0)),
    "paged_attention, decode": lambda: paged(3, 1, 130, 200, 0),
    "paged_attention, decode of 1": lambda: paged(1, 1, 127),
    "paged_attention, prefill": lambda: paged(1, 8, 125),
    "paged_attention, first chunk": lambda: paged(1, 8, 0),
    "paged_attention, full": lambda: paged(1, 128, 128),
    "paged_attention, bfloat16": lambda: narrow(paged(1, 8, 125)),
    "int8_paged_attention, decode": lambda: paged(3, 1, 130, 200, 0, in_8_bits=True),
    "int8_paged_attention, prefill": lambda: paged(1, 8, 125, in_8_bits=True),
    "int8_paged_attention, bfloat16": lambda: narrow(paged(1, 8, 125, in_8_bits=True)),
    "int8_paged_attention, bfloat16, decode": lambda: narrow(paged(2, 1, 5, 254, in_8_bits=True)),
    "attention": lambda: case("attention", rand(2, 5, 64), rand(2, 7, 64), rand(2, 7, 64), then=(4,)),
    "padded_attention": lambda: case(
        "padded_attention", rand(1, 6, 64), rand(1, 6, 64), rand(1, 6, 64), torch.tensor([[0.0, 0, 1, 0, 1, 1]]), then=(4,)
    ),
    "cross_attention, 1 image": lambda: crossed(3, 1),
    "cross_attention, 2 images": lambda: crossed(3, 2),
    "cross_attention, decode": lambda: crossed(1, 2),
    "mask_tiles": lambda: case("mask_tiles", rand(4, 3, 2), ints(3)),
    "tile_padding": lambda: case("tile_padding", ints(2), then=(4, 5, 8)),
    "pad_rows": lambda: case("pad_rows", rand(2, 3, 4), then=(8,)),
}


def as_taken(tensor: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """What a graph takes of a stored tensor, one of x, qweight, scales, zeros."""
    if tensor.dtype != torch.uint8:
        return tensor
    return to_signed(tensor) if tensor is tensors[1] else to_offsets(tensor, tensors[1], tensors[2])


@pytest.mark.parametrize("name", CASES)
def test_a_lowering_computes_what_its_op_is_defined_as(name: str) -> None:
    subject = CASES[name]()
    given = [as_taken(each, subject.tensors) for each in subject.tensors]
    lowered = lower(lambda *tensors: subject.call(lower_ascend.LOWERINGS[subject.op], *tensors), *given)
    wide = [each.float() if each.is_floating_point() else each for each in subject.tensors]
    dtypes = {each.dtype for each in subject.tensors}
    expected = subject.call(getattr(ops, subject.op), *wide)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for result, rounded, reference in zip(lowered.run(wide=True), lowered.run(), expected, strict=True):
        assert result.shape == reference.shape
        assert relative(result, reference) <= EXACT
        assert relative(rounded, reference) <= (8 if torch.bfloat16 in dtypes else 1) * ROUNDED


@pytest.mark.parametrize(("tokens", "kinds"), [(1, (False, True)), (4, (True,)), (12, (True,)), (17, ())])
def test_a_cache_in_8_bits_is_widened_only_where_the_operator_takes_no_scales(tokens: int, kinds: tuple[bool, ...]) -> None:
    """One token in both types, up to 16 in bfloat16."""
    for in_bfloat16 in (False, True):
        plain = cached_in_8_bits(1, tokens, 0, room=20)
        subject = narrow(plain) if in_bfloat16 else plain
        lowered = lower(lambda *tensors, s=subject: s.call(attention.int8_cached_attention, *tensors), *subject.tensors)
        (node,) = (each for each in ge_graph.parse(lowered.data).nodes if each.type == "FusedInferAttentionScore")
        given = {name for name, source in zip(node.input_names, node.inputs, strict=True) if source}
        assert ("key_antiquant_scale" in given) == ("value_antiquant_scale" in given) == (in_bfloat16 in kinds)


def test_eager_programs_hide_images_in_16_bits() -> None:
    """Where -1e30 is infinite, and a token that sees nothing would attend to not a number."""
    q, mask, *keys = crossed(3, 2).tensors
    expected = ops.cross_attention(q.float(), [k.float() for k in keys[:2]], [v.float() for v in keys[2:]], mask.float(), 4)
    for dtype, allowed in ((torch.float32, EXACT), (torch.float16, ROUNDED)):
        k, v = ([each.to(dtype) for each in half] for half in (keys[:2], keys[2:]))
        assert relative(emit_eager._cross_attention(q.to(dtype), k, v, mask.to(dtype), 4), expected) <= allowed


def test_a_head_of_many_features_is_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MOST_W8_FEATURES", 4)
    test_a_lowering_computes_what_its_op_is_defined_as("linear_w8")


def test_every_op_has_a_lowering_and_every_lowering_an_op() -> None:
    table = {str(op).removesuffix(".default").replace(".", "::") for op in lower_ascend.lowerings()}
    vocabulary = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{ops.NAMESPACE}::")}
    assert table == vocabulary
    # Where ranks meet is tested with ranks (test_ge_collectives.py).
    tested = {subject().op for subject in CASES.values()} | set(ops.COLLECTIVES)
    assert tested == {name.split("::")[1] for name in vocabulary}


# --- Whole graphs ---------------------------------------------------------------------------------------------------------


def definitions(checkpoint: Path, *, quant: str = "none", context: int = 64, slots: int = 2) -> Iterator[GraphDef]:
    config = read_config(checkpoint)
    images = (1,) if config.text.cross_layers else None
    buckets = Buckets(prefill=(1, 8), decode=(2, slots) if slots > 2 else (2,), images=images, context=context, slots=slots)
    options = Options(checkpoint=checkpoint, out=Path(), buckets=buckets)
    plan = make_plan(config, options)
    third = (0.3, 0.4, 0.5)
    image = ImageProcessorConfig(
        mode="stretch", size=config.vision.image_size, rows=config.vision.rows_per_tile, mean=third, std=third
    )
    shared = GraphContext(config=config, image=image, cache=plan.cache, quant=quant)
    yield from (define_graph(shared, key) for key in plan.graphs)


@functools.cache
def definition(checkpoint: Path, name: str, **settings: Any) -> GraphDef:
    return next(each for each in definitions(checkpoint, **settings) if each.name == name)


@functools.cache
def emitted(checkpoint: Path, name: str, **settings: Any) -> Emitted:
    return emit(definition(checkpoint, name, **settings), "float16")


GRAPHS = [
    (LLAVA, "vision-1"),
    (LLAVA, "decode-2"),
    (MLLAMA, "vision-4"),
    (MLLAMA, "prefill-8-images-1"),
    (GOLDEN_QWEN, "prefill-8"),
    (GOLDEN_QWEN, "prefill-1"),
]
each_graph = pytest.mark.parametrize(
    ("checkpoint", "name"), GRAPHS, ids=[f"{(c.parent if c == GOLDEN_QWEN else c).name} {n}" for c, n in GRAPHS]
)


def opened(data: bytes, folder: Path) -> Any:
    """torchair's own view of a cache file."""
    from torchair.inference._cache_compiler import CompiledModel

    path = folder / "compiled_module"
    path.write_bytes(data)
    path.chmod(0o600)
    return CompiledModel.load(str(path))


def weights_of(graph: GraphDef) -> dict[str, Tensor]:
    """Values for the parameters that are weights, of a size that keeps activations near 1."""
    torch.manual_seed(2)
    shapes = {name: each.shape for name, each in graph.module.named_parameters() if name not in graph.constants}
    made = {name: torch.randn(shape) / max(1, shape[-1]) ** 0.5 for name, shape in shapes.items()}
    return {name: (value + 1 if "norm.weight" in name else value).half() for name, value in made.items()}


def with_merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with those that graphs take in place of several."""
    return {**weights, **{n: torch.cat([weights[each] for each in of]) for n, of in complete_groups(weights).items()}}


NUMBERS = {"token_ids": 7, "row_index": 0, "lengths": 5, "last_index": 0, "tile_count": 2, "aspect_id": 3}


def feed_of(graph: GraphDef) -> dict[str, Tensor]:
    """Values for the inputs, each in its range."""
    torch.manual_seed(3)
    feed = {}
    for spec in graph.inputs:
        if spec.dtype == "uint8":
            feed[spec.name] = torch.randint(0, 256, spec.shape, dtype=torch.uint8)
        elif spec.dtype == "int32":
            feed[spec.name] = torch.full(spec.shape, NUMBERS[spec.name], dtype=torch.int32)
        else:
            feed[spec.name] = torch.randn(spec.shape).half().float()
    if "cross_mask" in feed:
        feed["cross_mask"] = torch.where(feed["cross_mask"] < 0, 0.0, CROSS_HIDDEN)
    for name in {"rope_cos", "rope_sin"} & feed.keys():
        half = feed[name].shape[-1] // 2
        feed[name][..., half:] = feed[name][..., :half]
    return feed


def eagerly(graph: GraphDef, weights: Mapping[str, Tensor], feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The definition's outputs by name, in float32. The module is left without values, as it was."""
    state = {name: value.float() for name, value in weights.items()}
    state |= {name: torch.from_numpy(value) for name, value in graph.constants.items()}
    with torch.no_grad():
        result = torch.func.functional_call(graph.module, state, tuple(feed.values()), strict=True)
    result = result if isinstance(result, tuple) else (result,)
    return dict(zip((spec.name for spec in graph.outputs), result, strict=True))


RUNTIME = """
import functools, sys
sys.modules["staticvl.compiler"] = sys.modules["staticvl.model_defs"] = None
import torch
from staticvl.runtime.backends.ascend import torchair_host
from staticvl.runtime.backends.ge_simulator.simulator import Simulator
host = torchair_host.load()
from torchair.inference._cache_compiler import CompiledModel
for path in sys.argv[1:]:
    kernel = CompiledModel.load(path + "/compiled_module").rebase(None)
    tensors = torch.load(path + "/tensors")
    with host.running_on(functools.partial(Simulator, wide=True)):
        result = kernel(None, *tensors)
    torch.save((result, tensors), path + "/results")
"""


@pytest.mark.slow
def test_graphs_run_without_the_definitions(tmp_path: Path) -> None:
    folders = []
    for number, (checkpoint, name) in enumerate(GRAPHS):
        graph, compiled = definition(checkpoint, name), emitted(checkpoint, name)
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        opened(compiled.data, folders[-1])
        weights, feed = with_merged(weights_of(graph)), feed_of(graph)
        constants = [torch.from_numpy(graph.constants[each]) for each in compiled.constants]
        places = [torch.zeros(spec.shape) for spec in graph.outputs if spec.name in compiled.outputs_in_place]
        torch.save(
            [*(weights[each] for each in compiled.weights), *constants, *feed.values(), *places], folders[-1] / "tensors"
        )
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUNTIME, *map(str, folders)], check=True, cwd=tmp_path)
    for folder, (checkpoint, name) in zip(folders, GRAPHS, strict=True):
        graph, compiled = definition(checkpoint, name), emitted(checkpoint, name)
        expected = eagerly(graph, weights_of(graph), feed_of(graph))
        result, tensors = torch.load(folder / "results")
        names = [*compiled.weights, *compiled.constants, *(spec.name for spec in graph.inputs), *compiled.outputs_in_place]
        after = dict(zip(names, tensors, strict=True))
        for output, reference in expected.items():
            found = after.get(output.removesuffix(".out"), result)
            assert found is not None and found.dtype == torch.float32
            assert relative(found, reference) <= EXACT, f"{graph.name}: {output}"


@each_graph
def test_kernels_take_weights_constants_and_inputs(checkpoint: Path, name: str, tmp_path: Path) -> None:
    graph, compiled = definition(checkpoint, name), emitted(checkpoint, name)
    parameters = merged_shapes({each: tuple(tensor.shape) for each, tensor in graph.module.named_parameters()})
    assert sorted([*compiled.weights, *compiled.constants]) == sorted(parameters)
    assert set(compiled.constants) == graph.constants.keys()
    model = opened(compiled.data, tmp_path)
    assert compiled.name == name.replace("-", "_")
    assert model.meta.name == f"{compiled.name}(*tensors)"
    # Weights never move, anything else may.
    options = dict(re.findall(r'local_compile_options\["(.+?)"\] = "(.*?)"', model.compiled_fx.py_code))
    frozen = options["frozenInput"].split(",")
    assert frozen.count("1") == len(compiled.weights)
    assert frozen.count("0") == len(compiled.constants) + len(graph.inputs) + len(compiled.outputs_in_place)
    assert (options["ge.tiling_schedule_optimize"], options["ge.topoSortingMode"]) == ("1", "3")
    assert options["ge.graph_key"] == ge_graph.parse(compiled.graph).name
    # Nothing tells where it was made.
    for place in (REPO, Path.home(), Path("/tmp")):
        assert str(place).encode() not in compiled.data


@each_graph
def test_graphs_hold_nothing_that_a_step_or_a_model_decides(checkpoint: Path, name: str) -> None:
    graph, parsed = definition(checkpoint, name), ge_graph.parse(emitted(checkpoint, name).graph)
    assert _placements(emitted(checkpoint, name).graph) == {"NPU"}
    assert max(len(each.data) for each in parsed.constants().values()) <= 128
    if graph.kind == "vision":
        return
    assert parsed.types()["Scatter"] == sum(spec.name.endswith(".out") for spec in graph.outputs)
    assert not {"TensorMove", "Assign"} & parsed.types().keys()
    # The causal mask is made once, whatever the number of layers.
    assert parsed.types().get("Range", 0) == (1 if graph.bucket > 1 and graph.kind == "prefill" else 0)


def _placements(serialized: bytes) -> set[str]:
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    model = ModelDef()
    model.ParseFromString(serialized)
    return {op.output_desc[0].device_type for op in model.graph[0].op if op.type == "Data"}


@pytest.mark.parametrize("name", ["prefill-8", "decode-2"])
def test_constants_do_not_depend_on_context_or_slots(name: str) -> None:
    """Every length, position and slot lies within a cache, and graphs of different caches hold the same constants."""
    found = [
        ge_graph.parse(emitted(GOLDEN_QWEN, name, **settings).graph).constants()
        for settings in ({}, {"context": 40, "slots": 3})
    ]
    assert found[0] == found[1]


def test_the_same_definition_gives_the_same_bytes() -> None:
    first = emitted(GOLDEN_QWEN, "decode-2")
    again = emit(next(each for each in definitions(GOLDEN_QWEN) if each.name == "decode-2"), "float16")
    assert again == first
    other = emitted(GOLDEN_QWEN, "decode-2", context=40, slots=3)
    assert ge_graph.parse(first.graph).name != ge_graph.parse(other.graph).name


def test_folders_of_the_working_directory_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch opens the files that code objects name. A folder of the package's name lies beside any clone."""
    first = emitted(GOLDEN_QWEN, "decode-2")
    (tmp_path / "staticvl").mkdir()
    monkeypatch.chdir(tmp_path)
    torch._dynamo.pgo._hash_containing_file.cache_clear()
    assert emit(definition(GOLDEN_QWEN, "decode-2"), "float16") == first


def test_weights_in_8_bits_are_taken_as_they_lie() -> None:
    compiled = emitted(GOLDEN_QWEN, "decode-2", quant="w8a16")
    parsed = ge_graph.parse(compiled.graph)
    eights = [node for node in parsed.inputs if node.outputs[0].dtype == "int8"]
    assert len(eights) == parsed.types()["WeightQuantBatchMatmulV2"] == sum(n.endswith(".qweight") for n in compiled.weights)
    # Transposed for an operator that reads it either way: no other node touches a weight.
    for node in eights:
        seen = node
        for expected in ("Transpose", "WeightQuantBatchMatmulV2"):
            (seen,) = parsed.readers(ge_graph.Source(seen.name, 0))
            assert seen.type == expected
        assert seen.attributes["antiquant_group_size"] == 0, "one scale for each column"


def test_weights_in_4_bits_are_taken_as_they_lie() -> None:
    compiled = emitted(GOLDEN_QWEN, "decode-2", quant="w4a16-g32")  # several blocks a row
    parsed = ge_graph.parse(compiled.graph)
    taken = [node for node in parsed.inputs if node.outputs[0].dtype == "int32" and len(node.outputs[0].shape or ()) == 3]
    assert len(taken) + 1 == parsed.types()["WeightQuantBatchMatmulV2"], "lm_head has 8 bits"
    for node in taken:
        seen = node
        for expected in ("Reshape", "Transpose", "WeightQuantBatchMatmulV2"):
            (seen,) = parsed.readers(ge_graph.Source(seen.name, 0))
            assert seen.type == expected


def test_each_input_of_whole_number_products_is_rounded_once() -> None:
    graph = next(each for each in definitions(GOLDEN_QWEN, quant="w8a8") if each.name == "decode-2")
    layers, parsed = len(graph.outputs) // 2, ge_graph.parse(emit(graph, "bfloat16").graph)
    types = parsed.types()
    # Norms quantise their own rows, but for the first, which has no sum before it; the activation of an MLP its own.
    assert (types["AddRmsNormDynamicQuant"], types["DynamicQuant"]) == (2 * layers - 1, layers + 1)
    assert types["DequantSwigluQuant"] == layers
    assert types["QuantBatchMatmulV3"] == 4 * layers
    taken = [node for node in parsed.inputs if node.outputs[0].dtype == "int8" and len(node.outputs[0].shape or ()) == 2]
    readers = [[each.type for each in parsed.readers(ge_graph.Source(node.name, 0))] for node in taken]
    assert readers.count(["QuantBatchMatmulV3"]) == 4 * layers
    assert [each for each in readers if each != ["QuantBatchMatmulV3"]] == [["Transpose"]], "lm_head, of another product"
    scales = [node for node in parsed.inputs if node.outputs[0].dtype == "float32" and len(node.outputs[0].shape or ()) == 1]
    assert len(scales) == 5 * layers, "and biases of q, k and v, which are float32 beside bfloat16"


def test_another_dtype_is_refused() -> None:
    with pytest.raises(EmitError, match="dtype 'float32' cannot be compiled for Ascend; use one of float16, bfloat16"):
        emit(definition(GOLDEN_QWEN, "decode-2"), "float32")


def test_heads_that_attention_cannot_take_are_refused() -> None:
    graph = definition(GOLDEN_QWEN, "decode-2")
    caches = tuple(msgspec.structs.replace(spec, shape=(*spec.shape[:-1], 20)) for spec in graph.inputs[-2:])
    with pytest.raises(EmitError, match=r"decode-2: a head of 20 elements cannot .* takes multiples of 16"):
        emit(replace(graph, inputs=(*graph.inputs[:-2], *caches)), "float16")


def test_bfloat16() -> None:
    compiled = emit(definition(GOLDEN_QWEN, "decode-2"), "bfloat16")
    dtypes = {node.outputs[0].dtype for node in ge_graph.parse(compiled.graph).inputs}
    assert dtypes == {"bfloat16", "float32", "int32"}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [LLAVA, LLAVA_NEXT, MLLAMA, GOLDEN_QWEN])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_graph_of_the_tiny_models(checkpoint: Path, dtype: str) -> None:
    for graph in definitions(checkpoint):
        assert emit(graph, dtype).graph

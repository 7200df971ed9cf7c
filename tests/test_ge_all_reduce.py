"""MatmulAllReduce: on the simulator against numpy, ranks as threads; and the pass that puts it into graphs.

Source: op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-npu_mm_all_reduce_base.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from staticvl.compiler.ascend_graph.fusions import FUSIONS, fuse_all_reduce
from staticvl.compiler.choices import PlanError
from staticvl.compiler.emit_ascend import emit
from staticvl.compiler.graphs import GraphContext, GraphDef, define_graph
from staticvl.compiler.option_table import COMPILE_OPTIONS
from staticvl.compiler.plan import Buckets, Options, make_plan
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import ImageProcessorConfig
from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraphError, parse
from staticvl.runtime.backends.ge_simulator.simulator import Simulator

from .conftest import EMBEDDED
from .ge_formulas import HALVES, close, ints, rand
from .ge_graphs import build
from .lockstep import array_group, run_ranks
from .need_torchair import skip_without_torchair
from .test_ge_collectives import Copies, named

skip_without_torchair()

Array = np.ndarray
NAMES = ("bias", "x3", "antiquant_scale", "antiquant_offset", "dequant_scale", "pertoken_scale")


def of(x: Tensor) -> Array:
    return x.double().numpy()


def fused(ranks: int, names: tuple[str, ...] = (), **attributes: Any) -> Callable[..., Any]:
    """The operator of x1, x2 and optional inputs by name."""

    def make(ge: Any, x1: Any, x2: Any, *rest: Any) -> Any:
        given = {**dict.fromkeys((*NAMES, "comm_quant_scale_1", "comm_quant_scale_2")), **dict(zip(names, rest, strict=True))}
        return ge.MatmulAllReduce(x1, x2, **given, group=attributes.pop("group", named(ranks)), **attributes)

    return make


def on_ranks(make: Callable[..., Any], inputs: list[list[Tensor]], *, wide: bool = False) -> list[Tensor]:
    """What each rank gets of its own inputs."""
    data, size = build(make, *inputs[0]), len(inputs)
    return [
        each[0]
        for each in run_ranks(size, lambda rank: Simulator(data, wide=wide, group=array_group(size), card=None)(inputs[rank]))[
            0
        ]
    ]


def check(make: Callable[..., Any], inputs: list[list[Tensor]], expected: Array, dtype: torch.dtype) -> None:
    """The same on every rank, near the sum: each part is rounded once, and the sum."""
    size = np.abs(expected).max()
    found = on_ranks(make, inputs)
    assert all(torch.equal(each, found[0]) for each in found) and found[0].dtype == dtype
    step = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    assert np.abs(of(found[0]) - expected).max() <= 3 * step * size
    wide = [[x.float() if x.is_floating_point() else x for x in each] for each in inputs]
    close(on_ranks(make, wide, wide=True)[0] / size, torch.from_numpy(expected / size))


def seeded(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank * 100 + sum(shape)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("ranks", "m", "k", "n", "transposed"), [(2, 3, 40, 8, False), (4, 1, 24, 16, True)])
def test_products_of_floats(dtype: torch.dtype, ranks: int, m: int, k: int, n: int, transposed: bool) -> None:
    inputs = [[seeded(r, m, k).to(dtype), seeded(r, *((n, k) if transposed else (k, n))).to(dtype)] for r in range(ranks)]
    expected = sum(of(a) @ (of(b).T if transposed else of(b)) for a, b in inputs)
    check(fused(ranks, is_trans_b=transposed), inputs, np.asarray(expected), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_rank_brings_its_bias_and_what_is_added(dtype: torch.dtype) -> None:
    inputs = [[seeded(r, *shape).to(dtype) for shape in ((2, 32), (32, 8), (8,), (2, 8))] for r in range(2)]
    expected = sum(of(a) @ of(b) + of(bias) + of(x3) for a, b, bias, x3 in inputs)
    check(fused(2, ("bias", "x3")), inputs, np.asarray(expected), dtype)


def eight(rank: int, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(rank + sum(shape))).to(torch.int8)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("group", "k"), [(0, 32), (32, 96)])
@pytest.mark.parametrize("shifted", [False, True])
def test_weights_in_8_bits(dtype: torch.dtype, group: int, k: int, shifted: bool) -> None:
    shape = (k // group, 8) if group else (1, 8)
    inputs = []
    for rank in range(2):
        scales = (seeded(rank, *shape).abs() / 50 + 0.01).to(dtype)
        offset = [torch.full(shape, 3.0 + rank).to(dtype)] if shifted else []
        inputs.append([seeded(rank, 2, k).to(dtype), eight(rank, k, 8), scales, *offset])
    expected = 0
    for x, weight, scales, *offset in inputs:
        rows = np.repeat(of(scales), group or k, 0)
        shift = np.repeat(of(offset[0]), group or k, 0) if offset else 0
        expected = expected + of(x) @ of(((weight.double() + shift) * rows).to(dtype))
    names = ("antiquant_scale", "antiquant_offset") if shifted else ("antiquant_scale",)
    make = fused(2, names, antiquant_group_size=group)
    found = on_ranks(make, inputs)
    size = np.abs(expected).max()
    assert np.abs(of(found[0]) - expected).max() <= 3 * (2.0**-10 if dtype == torch.float16 else 2.0**-7) * size
    assert torch.equal(*found)


@pytest.mark.parametrize(("ranks", "m", "k", "n"), [(2, 3, 70, 8), (4, 1, 32, 24)])
def test_products_of_whole_numbers(ranks: int, m: int, k: int, n: int) -> None:
    inputs = [[eight(r, m, k), eight(r + 9, k, n), seeded(r, n).abs() / 1000, seeded(r, m).abs()] for r in range(ranks)]
    expected = sum(of(a) @ of(b) * of(columns) * of(rows)[:, None] for a, b, columns, rows in inputs)
    check(fused(ranks, ("dequant_scale", "pertoken_scale")), inputs, np.asarray(expected), torch.float16)


HALF = [rand(2, 32).half(), rand(32, 8).half()]
REFUSED: dict[str, tuple[Callable[..., Any], list[Tensor], str]] = {
    "another reduction": (fused(2, reduce_op="max"), HALF, "reduce_op = 'max' is not supported"),
    "a name": (fused(2, group="hccl_world"), HALF, "names no ranks"),
    "float32": (fused(2), [rand(2, 32), rand(32, 8)], "input x1 is torch.float32"),
    "another number of ranks": (fused(3), HALF, "has 3 ranks; expected 1, 2, 4 or 8"),
    "scales of columns alone": (
        fused(2, ("dequant_scale",)),
        [eight(0, 2, 32), eight(0, 32, 8), rand(8)],
        "without pertoken_scale; only float32 for both",
    ),
    "scales in 64 bits": (
        fused(2, ("dequant_scale", "pertoken_scale")),
        [eight(0, 2, 32), eight(0, 32, 8), ints(*range(8)), rand(2)],
        "dequant_scale is torch.int64",
    ),
    "a group that does not divide": (
        fused(2, ("antiquant_scale",), antiquant_group_size=48),
        [HALF[0], eight(0, 32, 8), rand(1, 8).half()],
        "antiquant_group_size = 48",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    make, operands, message = REFUSED[name]

    class Group(Copies):
        size = 3 if name == "another number of ranks" else 2

    with pytest.raises(GeGraphError, match=message):
        Simulator(build(make, *operands), group=Group(), card=None)(operands)


# ---- graphs


def definition(name: str, quant: str = "none", ranks: int = 2) -> GraphDef:
    config = read_config(EMBEDDED)
    buckets = Buckets(prefill=(8,), decode=(2,), verify=None, context=64, slots=2)
    options = Options(checkpoint=EMBEDDED, out=Path(), buckets=buckets, tp=ranks)
    plan = make_plan(config, options)
    image = ImageProcessorConfig(
        mode="stretch", size=config.vision.image_size, rows=config.vision.rows_per_tile, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    context = GraphContext(config=config, image=image, cache=plan.cache, quant=quant, ranks=ranks)
    return define_graph(context, next(key for key in plan.graphs if key.name == name))


@pytest.mark.parametrize(
    ("name", "quant", "dtype", "fused"),
    [
        ("prefill-8", "none", "float16", 8),
        pytest.param("prefill-8", "none", "bfloat16", 8, marks=pytest.mark.slow),
        ("prefill-8", "w8a8", "float16", 8),
        ("prefill-8", "w8a8", "bfloat16", 0),  # whose scales would have to be rounded
        ("prefill-8", "w8a16", "float16", 4),  # those of attention: blocks of the others are filled up
        ("prefill-8", "w4a16-g32", "float16", 0),  # 4 bits have no such form
        ("decode-2", "none", "float16", 0),  # advised against
    ],
)
def test_sums_of_products_are_fused(name: str, quant: str, dtype: str, fused: int) -> None:
    """Two in each of four layers; what is gathered stays, so the graph names its group anyway."""
    emitted = emit(definition(name, quant), dtype, fused_all_reduce=True)
    graph = parse(emitted.graph)
    assert (graph.types().get("MatmulAllReduce", 0), graph.types().get("HcomAllReduce", 0)) == (fused, 8 - fused)
    assert {node.attributes["group"] for node in graph.nodes if "group" in node.attributes} == {named(2)}
    assert f"used_process_group = {{'{named(2)}': ([0, 1], '')}}".encode() in emitted.data, "for the communicator's name"


def test_it_is_an_option_of_910b_with_ranks() -> None:
    base = Options(checkpoint=EMBEDDED, out=Path(), backend="ascend", tp=2, fuse_all_reduce=True)
    for changes in ({"tp": 1}, {"tp": 3}, {"backend": "onnx"}, {"soc": "Ascend310P"}):
        with pytest.raises(PlanError, match="leave --fuse-all-reduce out"):
            replace(base, **changes)
    assert next(each for each in COMPILE_OPTIONS if each.name == "fuse_all_reduce").default is False
    assert fuse_all_reduce not in FUSIONS

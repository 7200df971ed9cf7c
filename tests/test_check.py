"""Certificates of graphs with cross-attention, tiles and query scales: each is refused when one input is used wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from staticvl.compiler.build import build
from staticvl.compiler.check import CertificateError
from staticvl.compiler.inputs import prepare
from staticvl.compiler.make import GraphMaker
from staticvl.compiler.onnx_graph import LOWERINGS, Emitter
from staticvl.compiler.onnx_graph.emitter import slice_along
from staticvl.compiler.plan import Buckets, Options
from staticvl.compiler.progress import Progress
from staticvl.runtime.artifact import GraphKey, read_manifest

from .checkpoints_mllama import tiny_mllama
from .tiny_families import GOLDEN_QWEN

Break = Callable[..., Any]  # the right lowering, then the arguments of a lowering


Maker = Callable[[GraphKey], Any]


def maker(checkpoint: Path, folder: Path, buckets: Buckets) -> Maker:
    """Makes single graphs of a checkpoint that is compiled already, anew."""
    options = Options(checkpoint=checkpoint, out=folder / "artifact", buckets=buckets)
    build(options)
    job = prepare(options, Progress())
    graphs = GraphMaker(options, job.config, job.info, job.plan, read_manifest(options.out).weights)
    return lambda key: graphs.make(key, "again")


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    folder = tmp_path_factory.mktemp("mllama")
    buckets = Buckets(prefill=(8,), decode=(1,), context=32, slots=1, images=(2,))
    return maker(tiny_mllama(folder / "checkpoint").folder, folder, buckets)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    buckets = Buckets(prefill=(16,), decode=(1,), vision=(1,), context=128, slots=1)
    return maker(GOLDEN_QWEN, tmp_path_factory.mktemp("qwen"), buckets)


def seen(name: str, broken: Any) -> Break:
    """One graph input replaced where an aten op reads it."""

    def lower(right: Break, e: Emitter, node: Any, *args: Any) -> Any:
        return broken(e, node, *args) if name in args else right(e, node, *args)

    return lower


def no_mask(right: Break, e: Emitter, node: Any, q: str, keys: Any, values: Any, mask: str, heads: int) -> Any:
    return right(e, node, q, keys, values, e.node("Mul", [mask, e.constant(0, "float32")]), heads)


def mask_of_one_tile_further(right: Break, e: Emitter, node: Any, q: str, keys: Any, values: Any, mask: str, heads: int) -> Any:
    n = node.args[3].meta["val"].shape[-1]
    return right(e, node, q, keys, values, e.node("Gather", [mask, e.constant(np.roll(np.arange(n), 1))], axis=2), heads)


def images_swapped(right: Break, e: Emitter, node: Any, q: str, keys: Any, values: Any, mask: str, heads: int) -> Any:
    return right(e, node, q, keys[::-1], values[::-1], mask, heads)


def values_swapped(right: Break, e: Emitter, node: Any, q: str, keys: Any, values: Any, mask: str, heads: int) -> Any:
    return right(e, node, q, keys, values[::-1], mask, heads)


def gates_open(e: Emitter, node: Any, *_: Any) -> str:
    return e.constant(np.ones(node.meta["val"].shape), "float32")


def gates_swapped(e: Emitter, node: Any, x: str, dim: int, start: int, *_: Any) -> str:
    return slice_along(e, x, dim, 0 if start else 1, 1 if start else 2)


def full_tiles(right: Break, e: Emitter, node: Any, x: str, tile_count: str) -> str:
    return x


def no_unused_tiles(right: Break, e: Emitter, node: Any, tile_count: str, *sizes: int) -> str:
    return right(e, node, e.constant([4], "int32"), *sizes)


def padding_sees_padding(right: Break, e: Emitter, node: Any, q: str, k: str, v: str, padding: str, heads: int) -> str:
    return LOWERINGS["staticvl.attention"](e, node, q, k, v, heads)


def first_shape(right: Break, e: Emitter, node: Any, ids: str, table: str) -> str:
    return right(e, node, e.constant([1], "int32") if ids == "aspect_id" else ids, table)


PREFILL, VISION = GraphKey("prefill", 8, 2), GraphKey("vision", 4)


@pytest.mark.parametrize(
    ("graph", "op", "broken"),
    [
        (PREFILL, "staticvl.cross_attention", no_mask),
        (PREFILL, "staticvl.cross_attention", mask_of_one_tile_further),
        (PREFILL, "staticvl.cross_attention", images_swapped),
        (PREFILL, "staticvl.cross_attention", values_swapped),
        (PREFILL, "aten.slice.Tensor", seen("cross_gate", gates_open)),
        (PREFILL, "aten.slice.Tensor", seen("cross_gate", gates_swapped)),
        (VISION, "staticvl.mask_tiles", full_tiles),
        (VISION, "staticvl.tile_padding", no_unused_tiles),
        (VISION, "staticvl.padded_attention", padding_sees_padding),
        (VISION, "staticvl.embed", first_shape),
    ],
)
def test_a_graph_that_misreads_an_input_is_refused(
    looking: Maker, monkeypatch: pytest.MonkeyPatch, graph: GraphKey, op: str, broken: Break
) -> None:
    right = LOWERINGS[op]
    monkeypatch.setitem(LOWERINGS, op, lambda e, node, *args: broken(right, e, node, *args))
    with pytest.raises(CertificateError, match="differs from its definition"):
        looking(graph)


@pytest.mark.parametrize(("name", "op"), [("query_scale", "aten.mul.Tensor"), ("row_index", "staticvl.merge_rows")])
def test_so_it_is_in_qwen(qwen: Maker, monkeypatch: pytest.MonkeyPatch, name: str, op: str) -> None:
    """Queries not scaled; rows of images not put in."""
    right = LOWERINGS[op]
    monkeypatch.setitem(LOWERINGS, op, lambda e, node, *args: args[0] if name in args else right(e, node, *args))
    with pytest.raises(CertificateError, match="prefill-16 differs from its definition"):
        qwen(GraphKey("prefill", 16))

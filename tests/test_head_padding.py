"""Heads of towers and resamplers are filled up when weights are written for Ascend, and graphs take them so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from staticvl.compiler import emit_ascend, emit_eager
from staticvl.compiler.buckets import Buckets
from staticvl.compiler.build import build
from staticvl.compiler.graphs import GraphContext, GraphDef, define_graph
from staticvl.compiler.options import Options
from staticvl.compiler.plan import make_plan
from staticvl.compiler.weight_views import map_parameter
from staticvl.model_defs.config import ModelConfig, ResampledConfig
from staticvl.runtime.artifact import ImageProcessorConfig
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.weights.convert import Conversion, convert
from staticvl.weights.head_padding import head_axis, head_width, padded_width
from staticvl.weights.merging import members_of
from staticvl.weights.source import open_source
from staticvl.weights.storage import stored_targets

from .ascend import CHECKPOINTS
from .need_torchair import skip_without_torchair
from .wide_models import wide_config, write_random

FAMILIES = ("llava", "mllama", "qwen_vl")
TOWER, POOL = 5, 8  # the widths of heads in these models
LAYER = "vision.layers.0.attn"


def contents(config: ModelConfig, checkpoint: Path, out: Path, **options: object) -> dict[str, Tensor]:
    conversion = Conversion(**{"prefix": "k", **options})
    converted = convert(open_source(checkpoint), config, out, conversion)
    return {name: tensor for file in converted.files for name, tensor in load_file(out / file).items()}


def members(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored parts by the names of a definition's; merged ones of a tower are cut into thirds."""
    apart = dict(stored)
    for name in stored:
        if name.startswith("vision.") and (names := members_of(name)):
            transposed = name.endswith(".qweight")
            apart |= dict(zip(names, apart.pop(name).chunk(3, dim=int(transposed)), strict=True))
    return apart


def filled_up(value: Tensor, axis: int, width: int) -> Tensor:
    """Each head of `width` with zeros after it up to a multiple of 16, head by head."""
    zeros_shape = list(value.shape)
    zeros_shape[axis] = -width % 16
    zeros = value.new_zeros(zeros_shape)
    return torch.cat([part for head in value.split(width, dim=axis) for part in (head, zeros)], dim=axis)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_random(wide_config(family), tmp_path_factory.mktemp(family)) for family in FAMILIES}


# --- Weights ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "ranks"), [("none", 1), ("none", 4), ("w8a8+vision", 1), ("w8a8+vision", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_follow_each_head(checkpoints: dict[str, Path], family: str, quant: str, ranks: int, tmp_path: Path) -> None:
    """In q, k and v after its rows, in o after its columns, on every rank; all other weights of a tower are the same."""
    config = wide_config(family)
    for rank in range(ranks):
        options = {"quant": quant, "tp": ranks, "rank": rank}
        plain = contents(config, checkpoints[family], tmp_path / f"plain-{rank}", **options)
        found = members(contents(config, checkpoints[family], tmp_path / f"ascend-{rank}", ascend=True, **options))
        filled = 0
        for name, value in plain.items():
            if not name.startswith(("vision.", "pool.")):
                continue
            part, stem = name.rpartition(".")[2], name.rpartition(".")[0]
            width = POOL if name.startswith("pool.") else TOWER
            if ".attn." in name and not (stem.endswith(".o") and part in ("bias", "scales")):
                along = (part == "qweight") != stem.endswith(".o")  # numbers of whole-number products are [K, N]
                assert torch.equal(found[name], filled_up(value, int(along), width)), name
                filled += 1
            else:
                assert torch.equal(found[name], value), name
        assert filled >= 4


def test_which_heads_are_filled_up() -> None:
    """Widths that are multiples of 16 stay, and so does a decoder, whose heads lie in a cache."""
    assert [padded_width(width) for width in (5, 16, 64, 80, 88, 104, 128)] == [16, 16, 64, 80, 96, 112, 128]
    config = wide_config("qwen_vl")
    assert isinstance(config.vision, ResampledConfig)
    published = replace(config, vision=replace(config.vision, hidden_size=1664, heads=16))
    shapes = {name: part.shape for name, part in stored_targets(published, "none", ascend=True).items()}
    assert shapes[f"{LAYER}.qkv.weight"] == (3 * 16 * 112, 1664) and shapes[f"{LAYER}.qkv.bias"] == (3 * 16 * 112,)
    assert shapes[f"{LAYER}.o.weight"] == (1664, 16 * 112) and shapes[f"{LAYER}.o.bias"] == (1664,)
    whole = replace(config, vision=replace(config.vision, hidden_size=1280, heads=16))
    assert stored_targets(whole, "none", ascend=True)[f"{LAYER}.qkv.weight"].shape == (3 * 1280, 1280)
    assert (head_width(config, "text.layers.0.attn.q.weight"), head_axis("text.layers.0.attn.q.weight")) == (0, None)
    assert shapes["text.layers.0.attn.o.weight"] == (64, 64)


@pytest.mark.parametrize("quant", ["none", "w8a8+vision"])
def test_definitions_find_their_parameters(checkpoints: dict[str, Path], quant: str, tmp_path: Path) -> None:
    """Without what fills them up, merged or not; those of other backends as they are."""
    config = wide_config("qwen_vl")
    (graph,) = vision_graphs("qwen_vl", quant)
    sides = {
        ascend: convert(
            open_source(checkpoints["qwen_vl"]),
            config,
            tmp_path / str(ascend),
            Conversion(quant=quant, prefix="k", ascend=ascend),
        ).weights
        for ascend in (False, True)
    }
    for name, parameter in graph.module.named_parameters():
        if name not in graph.constants:
            plain, ascend = (
                map_parameter(tmp_path / str(side), weights, name, parameter.shape, graph.heads.get(name, 0))
                for side, weights in sides.items()
            )
            assert plain.shape == parameter.shape and torch.equal(plain, ascend), name
    assert graph.heads[f"{LAYER}.q.bias"] == TOWER and f"{LAYER}.o.bias" not in graph.heads


# --- Graphs -----------------------------------------------------------------------------------------------------------------


def vision_graphs(family: str, quant: str = "none", ranks: int = 1) -> Iterator[GraphDef]:
    """With a decoder whose heads are as wide as Ascend takes."""
    config = wide_config(family)
    config = replace(config, text=replace(config.text, head_dim=16))
    images = (1,) if config.text.cross_layers else None
    buckets = Buckets(prefill=(8,), decode=(1,), images=images, context=32, slots=1)
    plan = make_plan(config, Options(checkpoint=Path(), out=Path(), tp=ranks, buckets=buckets))
    size, third = config.vision.image_size, (0.3, 0.4, 0.5)
    image = ImageProcessorConfig(mode="stretch", size=size, rows=config.vision.rows_per_tile, mean=third, std=third)
    context = GraphContext(config=config, image=image, cache=plan.cache, quant=quant, ranks=ranks)
    yield define_graph(context, next(key for key in plan.graphs if key.kind == "vision"))


GRAPHS = list(product(FAMILIES, ("none", "w8a8+vision"), (1, 2)))
FEW = {("llava", "none", 1), ("mllama", "w8a8+vision", 2), ("qwen_vl", "w8a8+vision", 1)}


@pytest.mark.parametrize(
    ("family", "quant", "ranks"), [pytest.param(*each, marks=[] if each in FEW else pytest.mark.slow) for each in GRAPHS]
)
def test_graphs_neither_fill_up_nor_cut_heads(family: str, quant: str, ranks: int) -> None:
    """They take the weights that are stored, and scale scores by the true width."""
    skip_without_torchair()
    (graph,) = vision_graphs(family, quant, ranks)
    compiled = emit_ascend.emit(graph, "float16")
    parsed = ge_graph.parse(compiled.graph)
    scales = {round(float(node.attributes["scale"]), 6) for node in parsed.nodes if node.type == "FusedInferAttentionScore"}
    expected = {TOWER, POOL} if family == "qwen_vl" else {TOWER}
    assert scales == {round(width**-0.5, 6) for width in expected}
    assert "PadV3" not in parsed.types() or family == "mllama"  # whose tiles are filled up
    shapes = {name: part.shape for name, part in stored_targets(wide_config(family), quant, tp=ranks, ascend=True).items()}
    for name, argument in kernel_shapes(graph).items():
        if name.startswith((LAYER, "pool.attn")):
            assert argument == shapes[name], name
    assert emit_eager.emit(graph, "float16").weights == compiled.weights


def kernel_shapes(graph: GraphDef) -> dict[str, tuple[int, ...]]:
    kernel = emit_ascend.make_kernel(graph, torch.float16, (*emit_ascend.REWRITES, emit_ascend.take_stored_forms))
    return {name: tuple(each.shape) for name, each in zip(kernel.weights, kernel.arguments, strict=False)}


@pytest.mark.parametrize(
    "eager", [pytest.param((), id="compiled"), pytest.param(("vision",), id="eager", marks=pytest.mark.slow)]
)
def test_a_tower_in_8_bits_is_certified(eager: tuple[str, ...], tmp_path: Path) -> None:
    """Its pixels are in float32 until the first product, and all that follows is in 16 bits."""
    skip_without_torchair()
    buckets = Buckets(prefill=(16,), decode=(1,), context=64, slots=1)
    checkpoint, quant = CHECKPOINTS["qwen_vl"], "w8a8+vision"
    options = Options(checkpoint=checkpoint, out=tmp_path, buckets=buckets, backend="ascend", quant=quant, eager=eager)
    manifest = build(options).manifest
    (vision,) = (graph for graph in manifest.graphs if graph.kind == "vision")
    assert vision.certificate is not None and vision.certificate.worst <= 1e-4
    assert manifest.weights[f"{LAYER}.qkv.qweight"].dtype == "int8"

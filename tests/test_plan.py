"""Plans: which graphs a model and its options make, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from staticvl.compiler.buckets import Buckets, parse_buckets
from staticvl.compiler.choices import PlanError
from staticvl.compiler.graphs import GraphContext, define_graph
from staticvl.compiler.options import Options
from staticvl.compiler.plan import Plan, make_plan
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import CrossSpec, GraphKey, ImageProcessorConfig

from .conftest import EMBEDDED, REPO
from .tiny_families import GOLDEN_QWEN

MLLAMA = REPO / "tools" / "assets" / "tiny_mllama"
LLAVA_NEXT = REPO / "tools" / "assets" / "tiny_llava16"
ANY_IMAGE = ImageProcessorConfig(mode="tiles", size=32, rows=1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def plan(checkpoint: Path, **buckets: Any) -> Plan:
    return make_plan(read_config(checkpoint), Options(checkpoint=checkpoint, out=Path("out"), buckets=Buckets(**buckets)))


def variants(found: Plan, kind: str) -> set[int]:
    return {graph.images for graph in found.graphs if graph.kind == kind}


def test_cross_attention_has_graphs_for_no_one_and_all_images() -> None:
    found = plan(MLLAMA)
    assert variants(found, "vision") == {0}
    assert variants(found, "prefill") == variants(found, "decode") == {0, 1, 4}
    assert found.buckets("vision") == [4]
    assert found.buckets("decode") == [1, 2, 4]
    config = read_config(MLLAMA)
    assert found.cache.layers == config.text.layers - len(config.text.cross_layers)
    rows = config.vision.rows_per_image  # type: ignore[union-attr]
    assert found.cache.cross == CrossSpec(layers=len(config.text.cross_layers), images=4, rows=rows, tiles=4)
    assert len(set(found.graphs)) == len(found.graphs)


@pytest.mark.parametrize("checkpoint", [EMBEDDED, LLAVA_NEXT, GOLDEN_QWEN], ids=["llava", "llava_next", "qwen_vl"])
def test_fused_images_need_one_variant(checkpoint: Path) -> None:
    found = plan(checkpoint)
    assert variants(found, "prefill") == variants(found, "decode") == {0}
    assert found.cache.cross is None
    with pytest.raises(PlanError, match=r"images buckets \[2\] were given, but this model has no cross-attention"):
        plan(checkpoint, images=(2,))


def test_vision_buckets_are_those_of_the_grids() -> None:
    """The tiles of an image, and the whole image."""
    grids = read_config(LLAVA_NEXT).grids
    assert plan(LLAVA_NEXT).buckets("vision") == sorted({1 + rows * columns for rows, columns in grids})
    assert plan(EMBEDDED).buckets("vision") == [1]


def test_all_tiles_of_a_image_run_together() -> None:
    assert plan(MLLAMA, vision=(4,)).buckets("vision") == [4]
    with pytest.raises(PlanError, match=r"vision buckets are \[1, 4\], but this model always sees the 4 tiles of one image"):
        plan(MLLAMA, vision=(1, 4))


@pytest.mark.parametrize(("given", "wanted"), [(1, (1,)), (3, (1, 3)), ([2], (2,)), ([1, 4], (1, 4))])
def test_images_as_a_number_or_a_list(given: Any, wanted: tuple[int, ...]) -> None:
    assert parse_buckets({"images": given}, "buckets.yaml").images == wanted


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"images": 0}, "buckets.yaml: images is 0; expected a positive integer or a list of them"),
        ({"images": True}, "images is True; expected a positive integer"),
        ({"images": "two"}, "images is 'two'; expected a positive integer"),
        ({"images": [0]}, r"images is \[0\]; expected a list of integers from 1"),
        ({"images": [2, 2]}, r"images names a size twice: \[2, 2\]"),
        ({"prefill": 8}, "prefill is 8; expected a list of integers"),
        ({"decode": None}, "decode is None; expected a list of integers"),
        ({"verify": 5}, "verify is 5; expected a list of integers"),
        ({"speculate": 0}, "buckets.yaml: speculate is 0; expected a number of tokens from 1 on"),
        ({"speculate": True}, "speculate is True; expected a number of tokens from 1 on"),
        ({"speculate": []}, r"speculate is \[\]; expected a number of tokens from 1 on"),
        ({"speculate": [4, 0]}, r"speculate is \[4, 0\]; expected a number of tokens from 1 on"),
        ({"speculate": [4, 4]}, r"buckets.yaml: speculate names a number twice: \[4, 4\]"),
        (
            {"speculate": 4, "verify": [4]},
            r"speculate is \[4\] and verify is \[4\], but \[4\] drafted tokens are \[5\] verified",
        ),
        ({"speculate": 4, "verify": ["x"]}, r"speculate is \[4\] and verify is \['x'\]"),
        ({"tiles": [4]}, "unknown keys tiles; expected context, decode, images, prefill, slots, speculate, vision"),
        ([8], "holds list; expected a mapping with the keys prefill, decode, vision, speculate, images, context, slots"),
    ],
)
def test_bucket_files_that_are_wrong(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_buckets(data, "buckets.yaml")


@pytest.mark.parametrize(
    ("data", "verify"),
    [
        ({"speculate": 4}, (5,)),
        ({"speculate": [4, 2]}, (5, 3)),
        ({"verify": [5]}, (5,)),
        ({"speculate": [4, 2], "verify": [3, 5]}, (5, 3)),
    ],
)
def test_a_bucket_file_counts_drafted_tokens(data: Any, verify: tuple[int, ...]) -> None:
    """As --speculate does. Older files count the token before a draft too, under another name."""
    assert parse_buckets(data, "buckets.yaml").verify == verify


def test_graphs_that_verify_drafts() -> None:
    """None by default; those of every number of images where they are asked for."""
    assert not plan(EMBEDDED).buckets("verify")
    assert [graph for graph in plan(EMBEDDED, verify=(3, 5)).graphs if graph.kind == "verify"] == [
        ("verify", 5, 0),
        ("verify", 3, 0),
    ]
    for wrong in (1, 65):
        with pytest.raises(PlanError, match=f"verify bucket {wrong} does not fit; expected 2 .* to the context, 64"):
            plan(EMBEDDED, verify=(wrong,), context=64, prefill=(16,))


def test_graphs_are_named_by_their_keys() -> None:
    """Images are named where a graph sees some; keys are what a manifest's graphs are found by, and so are plain tuples."""
    assert [GraphKey("prefill", 64, 2).name, GraphKey("decode", 1).name] == ["prefill-64-images-2", "decode-1"]
    graphs = plan(MLLAMA).graphs
    assert len({key.name for key in graphs}) == len(graphs)
    assert GraphKey("decode", 4, 1) in graphs and ("decode", 4, 1) in graphs
    assert sorted(graphs)[0] == GraphKey("decode", 1)
    context = GraphContext(config=read_config(MLLAMA), image=ANY_IMAGE, cache=plan(MLLAMA).cache)
    spec = define_graph(context, GraphKey("decode", 2, 1)).spec()
    assert (spec.graph_key, spec.name) == (GraphKey("decode", 2, 1), "decode-2-images-1")

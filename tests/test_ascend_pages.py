"""Caches in pages on Ascend: what torchair makes of them, certificates that a wrong table breaks, and artifacts of several
ranks, of pipelines, of programs and of caches in 8 bits, which answer as ONNX Runtime does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from staticvl import runtime
from staticvl.compiler.ascend_graph import paged_attention
from staticvl.compiler.buckets import Buckets
from staticvl.compiler.build import build
from staticvl.compiler.calibration import Calibration, Conversation
from staticvl.compiler.check import CertificateError
from staticvl.compiler.choices import PlanError
from staticvl.compiler.emit_ascend import emit
from staticvl.compiler.graphs import GraphContext, define_graph
from staticvl.compiler.lockstep import LockstepBackend
from staticvl.compiler.lockstep_stages import PipelineBackend, whole_pipeline
from staticvl.compiler.options import Options
from staticvl.compiler.plan import make_plan
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import Artifact, GraphKey, Manifest, open_artifact
from staticvl.runtime.backends.base import Group
from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraph, Node, parse
from staticvl.runtime.backends.open import open_backend
from staticvl.runtime.engine.engine import Engine, EngineOptions
from staticvl.runtime.model import Model
from staticvl.runtime.processor.prompt import Message
from staticvl.tools.comparing.static_side import merged_manifest
from staticvl.tools.development.ascend_coverage import any_image

from .ascend import LONG, QUESTION
from .conftest import EMBEDDED
from .need_torchair import skip_without_torchair
from .parity import noise_image

skip_without_torchair()

BUCKETS = Buckets(prefill=(32,), decode=(2,), vision=(1,), verify=(3,), context=192, slots=2)


# ---- graphs


def graph(kind: Any, bucket: int, kv: str, *, int8: bool = False, dtype: str = "float16") -> GeGraph:
    config = read_config(EMBEDDED)
    config = replace(config, text=replace(config.text, int8_cache=int8))
    calibration = Calibration((), "") if int8 else None
    options = Options(
        checkpoint=Path(),
        out=Path(),
        backend="ascend",
        kv=kv,
        buckets=BUCKETS,
        kv_cache="int8" if int8 else "float",
        calibration=calibration,
    )
    context = GraphContext(config=config, image=any_image(config), cache=make_plan(config, options).cache)
    return parse(emit(define_graph(context, GraphKey(kind, bucket)), dtype).graph)


def kernels(made: GeGraph) -> int:
    return sum(node.type not in ("Data", "Const", "NetOutput", "Reshape", "Identity", "Unsqueeze") for node in made.nodes)


def readers(made: GeGraph, node: Node) -> list[Node]:
    return [each for each in made.nodes if any(source and source.producer == node.name for source in each.inputs)]


@pytest.mark.parametrize(
    ("kind", "bucket", "int8"),
    [
        ("decode", 2, False),
        ("prefill", 32, True),
        pytest.param("decode", 2, True, marks=pytest.mark.slow),
        pytest.param("prefill", 32, False, marks=pytest.mark.slow),
    ],
)
def test_no_cache_is_copied_and_no_index_computed(kind: str, bucket: int, int8: bool) -> None:
    slots, pages = (graph(kind, bucket, kv, int8=int8) for kv in ("slots", "pages"))
    layers, types = read_config(EMBEDDED).text.layers, pages.types()
    assert types["ScatterPaKvCache"] == types["FusedInferAttentionScore"] == layers
    assert not {"TensorMove", "ConcatV2", "Scatter", "FloorDiv", "FloorMod"} & types.keys()
    if not int8 or kind == "decode":
        assert kernels(pages) <= kernels(slots) - layers and "Transpose" not in types
        assert types.get("Add", 0) == slots.types().get("Add", 0)
    for node in pages.inputs:
        fed_to = {each.type for each in readers(pages, node)} - {"Reshape", "Cast"}
        if any(name in node.name for name in ("cache",)):
            assert fed_to <= {"ScatterPaKvCache", "Assign"}, node.name


def test_a_chunk_over_int8_pages_widens_the_pages_of_its_row_alone() -> None:
    made = graph("prefill", 32, "pages", int8=True)
    width = 2  # pages of a row: 192 tokens, and the padding of a chunk
    gathered = [node for node in made.nodes if node.type == "GatherV2" and node.outputs[0].dtype == "int8"]
    assert len(gathered) == 2 * read_config(EMBEDDED).text.layers
    in_slots = graph("prefill", 32, "slots", int8=True).types().get("GatherV2", 0)
    assert made.types()["GatherV2"] == in_slots + len(gathered)  # nothing else is looked up, such as a part of a scale
    assert {node.outputs[0].shape and node.outputs[0].shape[0] for node in gathered} == {width}


# ---- options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backend": "onnx", "kv": "pages"}, "pages of the cache are for ascend, and the backend is onnx; leave out --kv and"),
        ({"backend": "onnx", "pages": 9}, "pages of the cache are for ascend, and the backend is onnx"),
        ({"kv": "blocks"}, "kv is 'blocks'; expected one of pages, slots"),
        ({"kv": "slots", "pages": 9}, "pages is 9, but --kv slots has none"),
        ({"kv": "pages", "pages": 0}, "pages is 0; expected a number from 1 to"),
        ({"kv": "pages", "pages": 2}, "pages is 2, but a sequence of the whole context takes 2, and one more is for padding"),
    ],
)
def test_pages_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(
            read_config(EMBEDDED),
            Options(**{"checkpoint": Path(), "out": Path(), "backend": "ascend", **given}, buckets=BUCKETS),
        )


def test_pages_of_a_plan() -> None:
    config, given = read_config(EMBEDDED), {"checkpoint": Path(), "out": Path(), "backend": "ascend", "buckets": BUCKETS}
    whole = make_plan(config, Options(kv="pages", **given)).cache
    assert (whole.pages, whole.rows, whole.table_width) == (1 + 2 * 2, 192 + 32, 2)
    assert make_plan(config, Options(kv="pages", pages=3, **given)).cache.pages == 3
    assert not make_plan(config, Options(kv="slots", **given)).cache.pages
    crossing = read_config(EMBEDDED.with_name("tiny_mllama"))
    with pytest.raises(PlanError, match="attends to images by cross-attention, and their keys are in slots; leave out --kv"):
        make_plan(crossing, Options(kv="pages", **given))


# ---- certificates


def shifted(q: Tensor, caches: Any, lengths: Tensor, table: Tensor, heads: int, **more: Any) -> Any:
    """Offset by one page."""
    return q, caches, lengths, torch.cat((table[:, 1:], table[:, :1]), dim=1), heads, more


def ignored(q: Tensor, caches: Any, lengths: Tensor, table: Tensor, heads: int, **more: Any) -> Any:
    """Pages in the order in which they lie."""
    width = torch.arange(table.shape[1], dtype=torch.int32, device=table.device)
    return q, caches, lengths, table * 0 + width, heads, more


@pytest.mark.parametrize("broken", [shifted, ignored])
def test_a_wrong_table_fails_a_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Any]) -> None:
    right = paged_attention._over_pages

    def wrong(*args: Any, **more: Any) -> Tensor:
        *changed, options = broken(*args, **more)
        return right(*changed, **options)

    monkeypatch.setattr(paged_attention, "_over_pages", wrong)
    with pytest.raises(CertificateError, match="prefill-8 differs from its definition"):
        compiled(tmp_path, buckets=replace(BUCKETS, prefill=(8,), verify=None))


def test_a_row_written_a_place_off_fails_a_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as if it were right."""
    right = paged_attention._written
    monkeypatch.setattr(paged_attention, "_written", lambda caches, new, slots: right(caches, new, slots + 1))
    with pytest.raises(CertificateError, match="prefill-8 differs from its definition"):
        compiled(tmp_path, buckets=replace(BUCKETS, prefill=(8,), verify=None))


def compiled(out: Path, **options: Any) -> Path:
    build(Options(**{"checkpoint": EMBEDDED, "out": out, "backend": "ascend", "kv": "pages", "buckets": BUCKETS, **options}))
    return out


# ---- answers


CALIBRATION = Calibration(
    (Conversation("line 1", (Message("user", "Say one word.", 1),), (noise_image((50, 50), 5),)),), "ab" * 32
)


@dataclass(frozen=True)
class Variant:
    """Options of both artifacts, of the one in pages, and of the one that it is compared with; how far logits may be apart."""

    both: dict[str, Any]
    pages: dict[str, Any]
    other: dict[str, Any] = field(default_factory=dict)
    near: float = 1e-3


SLOTS = {"backend": "ascend", "kv": "slots"}
ALL = ("vision", "prefill", "decode", "verify")
VARIANTS = {
    "two ranks": Variant({}, {"tp": 2}),
    "two stages": Variant({}, {"pp": 2}),
    "some programs": Variant({}, {"eager": ("prefill", "decode")}),
    "310P": Variant({}, {"eager": ALL, "soc": "Ascend310P"}),
    "bfloat16": Variant({}, {"dtype": "bfloat16"}, near=0.05),  # weights are rounded
    # After dozens of tokens a rounding of another kernel shows in the cache: compared with slots on the same device.
    "int8": Variant({"kv_cache": "int8", "calibration": CALIBRATION}, {}, SLOTS),
    "int8, bfloat16": Variant({"kv_cache": "int8", "calibration": CALIBRATION, "dtype": "bfloat16"}, {}, SLOTS),
    "few pages": Variant({}, {"pages": 3}),
}


def opened(folder: Path) -> Model:
    """An artifact on the simulator without rounding, all its ranks as threads of this process."""
    artifact = open_artifact(folder)
    manifest = artifact.manifest
    if manifest.ranks == 1:
        return runtime.load(folder, device="sim:float32")

    def open_rank(own: Manifest, group: Group) -> Any:
        return open_backend("ascend", folder, own.cache, device="sim:float32", threads=None, manifest=own, group=group)

    if manifest.pp > 1:
        whole, backend = whole_pipeline(manifest), PipelineBackend(manifest, open_rank)
    else:
        whole, backend = (
            merged_manifest(manifest),
            LockstepBackend(manifest.tp, lambda group: open_rank(manifest, group), paged=True),
        )
    return Model(Artifact(folder, whole, artifact.hold), Engine(whole, backend, EngineOptions()))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_answers_are_those_of_slots(name: str, tmp_path: Path) -> None:
    """Of ONNX Runtime, where it rounds alike. Prompts of several chunks, two requests at once."""
    variant, other = VARIANTS[name], tmp_path / "other"
    build(Options(checkpoint=EMBEDDED, out=other, buckets=BUCKETS, **variant.both, **variant.other))
    reference = opened(other) if variant.other else runtime.load(other)
    model = opened(compiled(tmp_path / "pages", **variant.both, **variant.pages))
    settings: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 64, "ignore_eos": True, "return_logits": True}
    texts, images = [QUESTION, LONG * 2], [[noise_image((70, 50))], []]
    found = model.generate(texts, images, **settings)
    for text, some, answer in zip(texts, images, found, strict=True):
        expected = reference.generate(text, some, **settings)
        assert answer.token_ids == expected.token_ids
        assert answer.logits is not None and expected.logits is not None
        assert np.abs(answer.logits - expected.logits).max() <= variant.near * np.abs(expected.logits).max()

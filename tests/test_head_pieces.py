"""A quantised lm_head of many features is stored in pieces in artifacts for Ascend, and computed by pieces."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from staticvl import runtime
from staticvl.compiler import fingerprint
from staticvl.compiler.buckets import Buckets
from staticvl.compiler.build import build
from staticvl.compiler.emit_ascend import emit
from staticvl.compiler.options import Options
from staticvl.compiler.weight_views import map_parameter, stored_bytes
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.tools.comparing.weights import RankWeights
from staticvl.weights import head_pieces
from staticvl.weights.convert import Conversion, convert
from staticvl.weights.head_pieces import piece_rows
from staticvl.weights.source import open_source
from staticvl.weights.storage import stored_targets

from .conftest import EMBEDDED
from .merged_models import graphs, model_config
from .need_torchair import skip_without_torchair
from .wide_models import write_random

QUANTISED = ("w8a16", "w8a8", "w4a16-g32")  # each has an lm_head in 8 bits
PARTS = ("qweight", "scales")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An operator of 39 features, so that the 83 rows of the tiny models need three pieces."""
    with monkeypatch.context() as patch:
        patch.setattr(head_pieces, "MOST_FEATURES", 39)
        patch.setattr(head_pieces, "MULTIPLE", 8)
        yield


@pytest.mark.parametrize("rows", [1, 32000, 65535, 65536, 128256, 131070, 151936, 262144])
def test_pieces_fit_and_are_even(rows: int) -> None:
    pieces = piece_rows(rows)
    assert sum(pieces) == rows and max(pieces) <= 65535
    assert len(pieces) == 1 or (all(each % 64 == 0 for each in pieces[:-1]) and min(pieces) > 0)
    assert (len(pieces) == 1) == (rows <= 65535)


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.rglob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("quant", QUANTISED)
def test_pieces_are_the_rows_of_the_whole(small_pieces: None, quant: str, tp: int, rank: int, tmp_path: Path) -> None:
    """Each is made alone, also where files are so small that the pieces lie in several. Of two ranks' 42 rows the last is none
    of the model's."""
    config = model_config("llava")
    source = open_source(write_random(config, tmp_path / "checkpoint"))
    outs = [tmp_path / name for name in ("whole", "cut")]
    conversion = Conversion(quant=quant, prefix="k", ascend=True, tp=tp, rank=rank, shard_bytes=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_pieces, "MOST_FEATURES", 65535)
        specs = [convert(source, config, outs[0], conversion)]
    specs.append(convert(source, config, outs[1], conversion))
    whole, cut = map(contents, outs)
    sizes = piece_rows(-(-83 // tp))
    assert len(sizes) == (3 if tp == 1 else 2)
    assert not any(f"text.lm_head.{part}" in cut for part in PARTS)
    edges = np.cumsum((0, *sizes))
    for part in PARTS:
        for place, (first, stop) in enumerate(pairwise(edges)):
            expected = whole[f"text.lm_head.{part}"].numpy()[first:stop]
            assert np.array_equal(cut[f"text.lm_head.{place}.{part}"].numpy(), expected)
        name, spec = f"text.lm_head.{part}", specs[0].weights[f"text.lm_head.{part}"]
        assert torch.equal(map_parameter(outs[1], specs[1].weights, name, spec.shape), whole[name])
        assert stored_bytes(specs[1].weights, name, spec.shape) == spec.nbytes
    shapes = {name: part.shape for name, part in stored_targets(config, quant, tp=tp).items()}
    sides = [RankWeights(out, each.weights, quant, shapes) for out, each in zip(outs, specs, strict=True)]
    name = "text.lm_head.weight"
    assert all(name in side.names() and side.quantised(name) for side in sides)
    assert torch.equal(*(side.read(name, 64) for side in sides))


def test_what_is_not_cut(small_pieces: None) -> None:
    """Other backends, and a head in floats."""
    config = model_config("llava")
    assert "text.lm_head.weight" in stored_targets(config, "none", ascend=True)
    assert "text.lm_head.weight" in stored_targets(config, "w4a16+float-head", ascend=True)
    assert "text.lm_head.qweight" in stored_targets(config, "w8a16")


@pytest.mark.parametrize("quant", QUANTISED)
def test_no_weight_is_sliced(small_pieces: None, quant: str) -> None:
    """A product for each piece, then one concatenation, of logits."""
    skip_without_torchair()
    (graph,) = (each for each in graphs("llava", quant, heads=16) if each.kind == "decode")
    emitted = emit(graph, "float16")
    parsed = ge_graph.parse(emitted.graph)
    stored = [name for name in emitted.weights if "lm_head" in name]
    assert sorted(stored) == sorted(f"text.lm_head.{place}.{part}" for place in range(3) for part in PARTS)
    assert not any(type_.startswith(("StridedSlice", "Slice")) for type_ in parsed.types())
    (joined,) = (node for node in parsed.nodes if node.type == "ConcatV2")
    sources = {source.producer for source in joined.inputs if source}
    assert sum(node.name in sources for node in parsed.nodes if node.type == "WeightQuantBatchMatmulV2") == 3


@pytest.mark.slow
def test_artifacts_from_before_still_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their head is whole. Made again it is in pieces, and says the same."""
    skip_without_torchair()
    buckets = Buckets(prefill=(16,), decode=(1,), context=64, slots=1)
    options = Options(checkpoint=EMBEDDED, out=tmp_path, buckets=buckets, backend="ascend", candidates=0, quant="w8a8")
    answer = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "code_digests", lambda *_, **__: {"code": "of an earlier version"})
        old = build(options).manifest
    assert "text.lm_head.qweight" in old.weights
    expected = runtime.load(tmp_path, device="sim").generate("Say one word.", **answer)
    monkeypatch.setattr(head_pieces, "MOST_FEATURES", 100)
    made = build(options)
    assert "text.lm_head.1.qweight" in made.manifest.weights and "text.lm_head.qweight" not in made.manifest.weights
    assert all(graph.certificate and graph.certificate.worst <= 1e-4 for graph in made.manifest.graphs)
    assert runtime.load(tmp_path, device="sim").generate("Say one word.", **answer).token_ids == expected.token_ids

"""Faults in Ascend graphs, whose operators have no names of ours: found by the values that should be there and are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from staticvl.compiler import check, lower_ascend
from staticvl.compiler.ascend_graph import attention, operators
from staticvl.runtime.artifact import read_manifest
from staticvl.tools.comparing import ge_taps
from staticvl.tools.comparing.capture import capture
from staticvl.tools.comparing.open_side import open_side
from staticvl.tools.comparing.sides import Side
from staticvl.tools.comparing.static_side import StaticSide
from staticvl.tools.comparing.taps import Inspector

from .comparisons import compared, compiled, reference_of, samples_of
from .need_torchair import skip_without_torchair

skip_without_torchair()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Side, Path]]:
    artifact = compiled("qwen_vl", tmp_path_factory.mktemp("ascend") / "artifact", backend="ascend")
    side = reference_of("qwen_vl", artifact)
    yield side, artifact
    side.close()


def test_a_healthy_artifact_raises_no_alarm(reference: tuple[Side, Path]) -> None:
    result = compared(*reference, samples_of("qwen_vl"), inspect="always")
    assert result.passed, (result.broken, result.findings)
    assert result.precision == "float16" and max(own for own, _ in result.layers.values()) < 1e-4


@pytest.mark.parametrize("quant", ["w8a8+vision", "w8a16", "w4a16-g32"])
def test_quantised_artifacts_raise_none_either(reference: tuple[Side, Path], tmp_path: Path, quant: str) -> None:
    side = compiled("qwen_vl", tmp_path / "artifact", backend="ascend", quant=quant)
    result = compared(reference[0], side, samples_of("qwen_vl")[:1], inspect="always")
    assert result.passed, (result.broken, result.findings)
    assert max(own for own, _ in result.layers.values()) < 1e-4


def test_keys_written_one_row_late(reference: tuple[Side, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = attention._append, []

    def late(cache, new, lengths):
        calls.append(cache)
        behind = (lengths + 1).clamp(max=cache.shape[2] - new.shape[1])
        return right(cache, new, behind if len(calls) % 4 == 3 else lengths)  # the keys of layer 1

    monkeypatch.setattr(attention, "_append", late)
    monkeypatch.setattr(check, "_require", lambda *_: None)  # else the build would refuse it
    side = compiled("qwen_vl", tmp_path / "broken", backend="ascend")
    result = compared(reference[0], side, samples_of("qwen_vl"))
    assert result.first is not None
    assert (result.first.stage, result.first.where) == ("graph", "text.layers.1.attn cached_attention")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    side = reference_of("llava", compiled("llava", tmp_path_factory.mktemp("llava") / "artifact", backend="ascend"))
    yield side
    side.close()


def test_4_bits_packed_along_the_features_raise_none_either(whole: Side, tmp_path: Path) -> None:
    """Of a trained model: blocks of 128 change the perplexity of a random one beyond the limit."""
    artifact = compiled("llava", tmp_path / "artifact", backend="ascend", quant="w4a16")
    assert any(spec.dtype == "int32" for spec in read_manifest(artifact).weights.values())
    result = compared(whole, artifact, samples_of("llava"), inspect="always")
    assert result.passed, (result.broken, result.findings)
    assert max(own for own, _ in result.layers.values()) < 1e-4


def test_healthy_ranks_raise_no_alarm(whole: Side, tmp_path: Path) -> None:
    artifact = compiled("llava", tmp_path / "artifact", backend="ascend", tp=2)
    result = compared(whole, artifact, samples_of("llava"), inspect="always")
    assert result.passed, (result.broken, result.findings)
    assert 0 < max(own for own, _ in result.layers.values()) < 1e-4


def test_a_cache_in_pages(whole: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A healthy one raises no alarm; a table that names other pages is found where it is read first."""
    artifact = compiled("llava", tmp_path / "artifact", backend="ascend", kv="pages")
    result = compared(whole, artifact, samples_of("llava"), inspect="always")
    assert result.passed, (result.broken, result.findings)
    assert 0 < max(own for own, _ in result.layers.values()) < 1e-4
    original = ge_taps.GeGraph.run

    def other_pages(self, feed, *args):
        return original(self, {name: value + (name == "block_table") for name, value in feed.items()}, *args)

    monkeypatch.setattr(ge_taps.GeGraph, "run", other_pages)
    result = compared(whole, open_side(artifact), samples_of("llava"), inspect="always")
    assert any("attn" in each.where for each in result.findings)


def test_programs_are_looked_into_from_outside(whole: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = compiled("llava", tmp_path / "artifact", backend="ascend", eager=("prefill",))
    result = compared(whole, artifact, samples_of("llava"), inspect="always")
    assert result.passed, (result.broken, result.findings)
    original = ge_taps.GeGraph.run

    def late(self, feed, *args):
        return original(self, {name: value + (name == "lengths") for name, value in feed.items()}, *args)

    monkeypatch.setattr(ge_taps.GeGraph, "run", late)
    result = compared(whole, open_side(artifact), samples_of("llava"), inspect="always")
    eager = next(each for each in result.findings if each.graph.startswith("prefill"))
    assert eager.where == "text.layers.0.attn cached_attention (keys written)" and "rows lie 1 late" in eager.text


def test_one_rank_writes_one_row_late(whole: Side, tmp_path: Path) -> None:
    """Ranks share graphs, so here one of them is fed with another count of earlier rows."""
    artifact = compiled("llava", tmp_path / "artifact", backend="ascend", tp=2)
    side = open_side(artifact)
    assert isinstance(side, StaticSide)
    inspector = Inspector(side, 2e-4)
    prompts = [side.prepare(samples_of("llava")[0])]
    run = capture(side, prompts, [np.array([5, 6])], None)[0]
    assert inspector.inspect(run)[0] is None
    original = ge_taps.GeGraph.run

    def late(self, feed, caches, image):
        rank = self.backend.group.rank
        return original(self, feed | {"lengths": feed["lengths"] + rank}, caches, image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ge_taps.GeGraph, "run", late)
        culprit, _ = inspector.inspect(run)
    assert culprit is not None
    assert (culprit.rank, culprit.name) == (1, "text.layers.0.attn cached_attention")


def test_wrong_activation(reference: tuple[Side, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tanh form of gelu differs by little; in float32 it shows."""
    lowerings = lower_ascend.lowerings

    def changed():
        found = lowerings()
        gelu = next(op for op in found if "gelu" in str(op) and "quick" not in str(op))
        return found | {gelu: lambda x: operators.npu.npu_gelu.default(x, approximate="tanh")}

    monkeypatch.setattr(lower_ascend, "lowerings", changed)
    monkeypatch.setattr(check, "_require", lambda *_: None)
    side = compiled("qwen_vl", tmp_path / "broken", backend="ascend")
    result = compared(reference[0], side, samples_of("qwen_vl"), inspect="always")
    assert result.first is not None
    assert (result.first.where, result.first.graph) == ("vision.layers.0.mlp gelu", "vision-1")

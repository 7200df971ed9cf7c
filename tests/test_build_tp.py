"""Building artifacts of models that are cut among ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.export import ExportedProgram

from staticvl.compiler import build as build_module
from staticvl.compiler import emit_onnx
from staticvl.compiler.build import Report, build
from staticvl.compiler.check import CertificateError
from staticvl.compiler.graphs import GraphDef
from staticvl.compiler.lockstep import LockstepBackend
from staticvl.compiler.model_card import CARD
from staticvl.compiler.plan import Buckets, Options
from staticvl.compiler.segments import Cut
from staticvl.runtime.artifact import MANIFEST, ArtifactError, Collective, GraphSpec, open_artifact, rank_weights, verify
from staticvl.runtime.backends.base import Result
from staticvl.runtime.backends.ort import OrtBackend
from staticvl.runtime.locks import READERS
from staticvl.weights.tensors import WeightsError

from .checkpoints import tiny_llava
from .lockstep import reversed_gather

BUCKETS = Buckets(prefill=(8,), decode=(1, 2), vision=(1,), context=32, slots=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("tp") / "checkpoint").folder


@pytest.fixture(scope="module")
def pristine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tp") / "artifact"
    compile_into(checkpoint, out)
    return out


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "moved")


def compile_into(checkpoint: Path, out: Path, *, quant: str = "none", **changes: object) -> Report:
    """With candidates, which are found after the last collective."""
    return build(Options(checkpoint=checkpoint, out=out, tp=2, quant=quant, buckets=replace(BUCKETS, **changes), candidates=5))


def files(folder: Path) -> dict[str, int]:
    """Every file that the manifest may list, with the time it was written."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".build.lock", READERS, MANIFEST, CARD))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


def test_an_artifact_of_two_ranks_is_whole(pristine: Path) -> None:
    manifest = verify(pristine).manifest
    assert manifest.tp == 2 and set(files(pristine)) == set(manifest.files)
    for graph in manifest.graphs:
        assert graph.certificate is not None and graph.certificate.passed
        assert {step.ranks for step in graph.plan if isinstance(step, Collective)} == {2}
    by_rank = [rank_weights(manifest.weights, 2, rank) for rank in range(2)]
    assert by_rank[0] == manifest.weights
    of_ranks = [{spec.file for spec in weights.values()} for weights in by_rank]
    assert all(name.startswith(f"weights/rank-{rank}/") for rank, names in enumerate(of_ranks) for name in names)
    assert set().union(*of_ranks) == {name for name in manifest.files if name.startswith("weights/")}


def test_nothing_changed_does_nothing(checkpoint: Path, artifact: Path) -> None:
    before = files(artifact)
    report = compile_into(checkpoint, artifact)
    assert not report.traced and not report.converted and files(artifact) == before


def test_only_what_is_damaged_is_made_again(checkpoint: Path, artifact: Path) -> None:
    manifest = open_artifact(artifact).manifest
    before, graph = files(artifact), manifest.graph("decode", 2)
    (artifact / graph.files[3]).write_bytes(b"")
    report = compile_into(checkpoint, artifact)
    assert report.traced == ("decode-2",) and not report.converted
    changed = {name for name, time in files(artifact).items() if before[name] != time}
    assert changed == set(graph.files) and before.keys() == files(artifact).keys()


def test_a_rank_whose_weights_are_gone_gets_them_again(checkpoint: Path, artifact: Path) -> None:
    shutil.rmtree(artifact / "weights" / "rank-1")
    with pytest.raises(ArtifactError, match=r"rank-1/.* is missing"):
        open_artifact(artifact)
    report = compile_into(checkpoint, artifact)
    assert report.converted and not report.traced
    verify(artifact)


def test_what_is_no_longer_named_is_removed_and_nothing_else(checkpoint: Path, artifact: Path) -> None:
    notes = [artifact / "decode-notes" / "mine.txt", artifact / "results" / "decode.txt"]
    for note in notes:
        note.parent.mkdir()
        note.write_text("keep")
    gone = artifact / open_artifact(artifact).manifest.graph("decode", 1).file
    compile_into(checkpoint, artifact, decode=(2,))
    assert not gone.exists() and all(note.read_text() == "keep" for note in notes)
    manifest = build(Options(checkpoint=checkpoint, out=artifact, buckets=BUCKETS)).manifest  # one rank after two
    assert manifest.tp == 1 and not list((artifact / "weights").glob("rank-*"))
    assert set(files(artifact)) == {*manifest.files, "decode-notes/mine.txt", "results/decode.txt"}


def test_a_broken_off_build_goes_on(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    monkeypatch.setattr(build_module, "write_manifest", stop)
    with pytest.raises(StopError):
        compile_into(checkpoint, tmp_path / "a")
    monkeypatch.undo()
    report = compile_into(checkpoint, tmp_path / "a")
    assert not report.traced and len(report.reused) == 4
    verify(tmp_path / "a")


@pytest.mark.parametrize("quant", ["w8a8+vision", *(pytest.param(each, marks=pytest.mark.slow) for each in ("w8a16", "w4a16"))])
def test_quantised_every_rank_is_checked_through_a_twin(checkpoint: Path, tmp_path: Path, quant: str) -> None:
    for graph in compile_into(checkpoint, tmp_path / "a", quant=quant).manifest.graphs:
        assert graph.certificate is not None and graph.certificate.passed
        assert (graph.certificate.rounding is None) == (graph.kind == "vision" and quant != "w8a8+vision")
    assert not list((tmp_path / "a").rglob("*.partial"))


# --- What certificates would find ------------------------------------------------------------------------------------------


def one_rank_with_the_others_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staticvl.runtime.backends.ort.weights_folder", lambda group: "weights/rank-0")


def a_sum_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = emit_onnx.cut

    def wrong(graph: GraphDef, program: ExportedProgram) -> Cut:
        found = right(graph, program)
        last = max(i for i, step in enumerate(found.steps) if isinstance(step, Collective) and step.op == "all_reduce")
        return replace(found, steps=found.steps[:last] + found.steps[last + 1 :])

    monkeypatch.setattr(emit_onnx, "cut", wrong)


@pytest.mark.parametrize("fault", [reversed_gather, one_rank_with_the_others_weights, a_sum_left_out])
def test_a_wrong_build_is_stopped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    with pytest.raises(CertificateError, match=r"differs from its definition|does not compute what rank 0 computes"):
        compile_into(checkpoint, tmp_path / "a")
    assert not (tmp_path / "a" / MANIFEST).exists()


def test_ranks_that_disagree_are_found(pristine: Path) -> None:
    manifest = open_artifact(pristine).manifest
    backend = LockstepBackend(2, lambda group: OrtBackend(pristine, manifest.cache, threads=1, group=group))
    right = OrtBackend.run

    def odd(self: OrtBackend, graph: GraphSpec, *arguments: object) -> Result:
        result = right(self, graph, *arguments)  # type: ignore[arg-type]
        return Result((result.first + 1).__getitem__) if self is backend.ranks[1] else result

    graph = manifest.graph("vision", 1)
    feed = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.inputs}
    backend.run(graph, feed)
    backend.ranks[1].run = odd.__get__(backend.ranks[1])  # type: ignore[method-assign]
    with pytest.raises(CertificateError, match="vision-1: rank 1 does not compute what rank 0 computes"):
        backend.run(graph, feed)


def test_what_cannot_be_cut_is_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="3"):
        build(Options(checkpoint=checkpoint, out=tmp_path / "a", tp=3, buckets=BUCKETS))
    assert not (tmp_path / "a").exists()

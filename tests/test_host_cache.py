"""Packed weights: shared by all graphs, the same numbers, made again when they must be, never in the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import verify
from staticvl.runtime.backends import host_cache, ort

from .checkpoints import tiny_llava

# Weights of a megabyte and more are packed; the vision tower's are smaller here, as in a small real one.
DIMS = {
    "none": {"hidden": 512, "heads": 8, "kv_heads": 8, "head_dim": 64, "intermediate": 768, "layers": 2},
    "w8a16": {"hidden": 1024, "heads": 16, "kv_heads": 16, "head_dim": 64, "intermediate": 1152, "layers": 2},
}
BUCKETS = Buckets(prefill=(4, 8), decode=(1, 2), vision=(1,), context=64, slots=2)


@pytest.fixture(scope="module", params=["none", "w8a16"])
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    tiny = tiny_llava(folder / "checkpoint", **DIMS[request.param])
    build(Options(checkpoint=tiny.folder, out=folder / "a", buckets=BUCKETS, quant=request.param))
    return folder / "a"


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ort, "WORTH_PACKING", 0)
    return shutil.copytree(pristine, tmp_path / "a", ignore=shutil.ignore_patterns(".host"))


def answer(artifact: Path) -> np.ndarray:
    return (
        runtime.load(artifact)
        .generate("one two three four five six", max_new_tokens=6, ignore_eos=True, return_logits=True)
        .logits
    )


def packed(artifact: Path) -> list[Path]:
    return sorted((artifact / host_cache.FOLDER).glob("*/*.onnx"))


def test_same_numbers_as_without(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ort, "WORTH_PACKING", 1 << 60)
        alone = answer(artifact)
        assert not packed(artifact)
    for _ in range(2):  # made, then used again
        shared = answer(artifact)
        assert len(packed(artifact)) == 5
        assert np.abs(shared - alone).max() <= 1e-5 * np.abs(alone).max()
    verify(artifact)  # a cache beside the artifact, not part of it


def test_graphs_refer_to_packed_weights(artifact: Path) -> None:
    import onnx

    answer(artifact)
    for path in packed(artifact):
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        with_packed = {t.name for t in tensors if any(e.key.startswith("prepacked") for e in t.external_data)}
        last = "projector.down.weight" if path.name.startswith("vision") else "text.layers.1.mlp.down."
        assert any(name.startswith(last) for name in with_packed), path.name


def test_made_again_for_another_machine_and_for_new_graphs(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(artifact)
    first = packed(artifact)
    monkeypatch.setattr(host_cache, "_cpu", lambda: "another")
    answer(artifact)
    second = packed(artifact)
    assert len(second) == len(first)
    assert not set(first) & set(second)


def test_made_again_when_a_file_was_mended(artifact: Path) -> None:
    """Packed while a weight file was damaged: the damage must not outlive the file."""
    weights = next((artifact / "weights").iterdir())
    good, right = weights.read_bytes(), answer(artifact)
    shutil.rmtree(artifact / host_cache.FOLDER)
    mended = weights.with_suffix(".mended")
    weights.write_bytes(good[: len(good) // 2] + bytes(1000) + good[len(good) // 2 + 1000 :])
    answer(artifact)
    mended.write_bytes(good)
    mended.replace(weights)
    assert np.array_equal(answer(artifact), right)


def test_left_out_where_files_cannot_be_linked(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    assert np.isfinite(answer(artifact)).all()
    assert not packed(artifact)
    assert "no hard links here" in caplog.text


def test_left_out_where_it_cannot_be_made(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0))  # type: ignore[attr-defined]
    assert np.isfinite(answer(artifact)).all()
    assert not packed(artifact)
    assert "are free" in caplog.text


def test_an_interrupted_attempt_leaves_nothing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(host_cache, "_refer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(artifact)
    assert [path.name for path in (artifact / host_cache.FOLDER).iterdir()] == ["lock"]
    assert np.isfinite(answer(artifact)).all()


def test_weights_are_held_once(artifact: Path) -> None:
    """Every graph opened and run in a process of its own: its private memory does not grow with the number of graphs."""
    answer(artifact)  # packs
    code = (
        "import sys, psutil\nfrom staticvl import runtime\nfrom staticvl.runtime.backends import ort\n"
        "from staticvl.runtime.feeds import new_feed\nort.WORTH_PACKING = 0\n"
        "engine = runtime.load(sys.argv[1]).engine\n"
        "graphs = [g for g in engine.manifest.graphs if g.kind != 'vision']\n"
        "for graph in graphs[:int(sys.argv[2])]: engine.backend.run(graph, new_feed(graph))\n"
        "print(psutil.Process().memory_full_info().pss)\n"
    )
    few, many = (
        int(subprocess.run([sys.executable, "-c", code, artifact, count], capture_output=True, text=True, check=True).stdout)
        for count in ("2", "4")
    )
    weights = sum(path.stat().st_size for path in (artifact / "weights").iterdir())
    assert weights > 8e6
    assert many - few < 0.5 * weights  # two more copies would add twice as much

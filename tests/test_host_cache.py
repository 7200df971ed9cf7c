"""Packed weights: shared by all graphs, the same numbers, made again when they must be, never in the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import ArtifactError, GraphSpec, Kind, Manifest, verify
from staticvl.runtime.backends import host_cache, ort
from staticvl.runtime.backends.open import open_backend
from staticvl.runtime.locks import READERS

from .checkpoints import tiny_llava
from .fakes import FACTS, fake_manifest
from .lockstep import array_group, run_ranks
from .rank_models import Model, model_of, steps, worst_errors, write_steps
from .wide_models import write_random

# Weights of a megabyte and more are packed; the vision tower's are smaller here, as in a small real one.
DIMS = {
    "none": {"hidden": 512, "heads": 8, "kv_heads": 8, "head_dim": 64, "intermediate": 768, "layers": 2},
    "w8a16": {"hidden": 1024, "heads": 16, "kv_heads": 16, "head_dim": 64, "intermediate": 1152, "layers": 2},
}
DIMS["w8a8"] = DIMS["w8a16"]
BUCKETS = Buckets(prefill=(4, 8), decode=(1, 2), vision=(1,), context=64, slots=2)


@pytest.fixture(scope="module", params=["w8a16", *(pytest.param(quant, marks=pytest.mark.slow) for quant in ("none", "w8a8"))])
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
    with runtime.load(artifact) as model:  # a model that is open holds what it uses
        out = model.generate("one two three four five six", max_new_tokens=6, ignore_eos=True, return_logits=True)
    assert out.logits is not None
    return out.logits


def files(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """What would change if a file were made again."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


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
        in_text = ("text.layers.1.mlp.down.", "text.layers.1.attn.k.")  # a large one and a small one
        for prefix in ("projector.down.weight",) if path.name.startswith("vision") else in_text:
            assert any(name.startswith(prefix) for name in with_packed), (path.name, prefix)


def test_a_whole_model_has_one_folder(artifact: Path) -> None:
    answer(artifact)
    (key,) = (path for path in (artifact / host_cache.FOLDER).iterdir() if path.is_dir())
    graphs = {path.name for path in artifact.glob("*.onnx")}
    weights = {f"weights/{path.name}" for path in (artifact / "weights").iterdir()}
    assert {str(path.relative_to(key)) for path in files(key)} == {
        *graphs,
        *weights,
        "vision.bin",
        "prefill.bin",
        host_cache.FILES,
        READERS,
    }


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
        "from staticvl.runtime.backends.base import new_feed\nort.WORTH_PACKING = 0\n"
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


# --- Ranks -------------------------------------------------------------------------------------------------------------------

RANKS = 2
PRODUCTS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
# Half a megabyte of one rank's part of each product of attention, a whole one of the MLP's.
WIDTHS = {
    "none": {
        "hidden_size": 512,
        "head_dim": 64,
        "intermediate_size": 1152,
        "layers": 2,
        "vocab_size": 1024,
        "embed_rows": 1100,
    },
    "w8a16": {
        "hidden_size": 1024,
        "head_dim": 128,
        "intermediate_size": 2304,
        "layers": 1,
        "vocab_size": 1024,
        "embed_rows": 1100,
    },
}


@dataclass(frozen=True)
class Ranks:
    """An artifact for two ranks, and what they find without packing."""

    model: Model
    manifest: Manifest
    alone: list[list[np.ndarray]]

    @property
    def host(self) -> list[Path]:
        return [self.model.out / host_cache.FOLDER / f"rank-{rank}" for rank in range(RANKS)]

    def answers(self) -> list[list[np.ndarray]]:
        """What every rank finds; all of them pack at the same time, where they do."""

        def work(rank: int) -> list[np.ndarray]:
            cache = self.manifest.cache
            specs: dict[Kind, GraphSpec] = {graph.kind: graph for graph in self.manifest.graphs}
            backend = open_backend("onnx", self.model.out, cache, threads=1, manifest=self.manifest, group=array_group(RANKS))
            return steps(backend, specs, list(cache.buffers()))

        return run_ranks(RANKS, work)[0]

    def check(self) -> None:
        for found, expected in zip(self.answers(), self.alone, strict=True):
            assert max(worst_errors(self.model, [found], expected)) <= 1e-5


@pytest.fixture(scope="module", params=["none", pytest.param("w8a16", marks=pytest.mark.slow)])
def pristine_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder, quant = tmp_path_factory.mktemp("ranks"), request.param
    model = replace(model_of("llava", 8, folder / "checkpoint"), out=folder / "a", quant=quant)
    config = replace(model.config, text=replace(model.config.text, **WIDTHS[quant]))
    model = replace(model, config=config)
    model.folder.mkdir()
    write_random(config, model.folder)
    stored = [model.converted(RANKS, rank) for rank in range(RANKS)]
    graphs = write_steps(model, RANKS, stored[0].weights)
    manifest = msgspec.structs.replace(
        fake_manifest(FACTS, model.cache(RANKS), tuple(graphs.values())), quant=quant, tp=RANKS, weights=stored[0].weights
    )
    ranks = Ranks(model, manifest, [])
    assert sum(spec.nbytes for spec in manifest.weights.values()) < ort.WORTH_PACKING
    return replace(ranks, alone=ranks.answers())


@pytest.fixture
def ranks(pristine_ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(ort, "WORTH_PACKING", 0)
    out = shutil.copytree(pristine_ranks.model.out, tmp_path / "a")
    return replace(pristine_ranks, model=replace(pristine_ranks.model, out=out))


def test_ranks_open_what_each_has_packed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    one_ranks = sum(spec.nbytes for spec in ranks.manifest.weights.values())
    free = int(2.3 * one_ranks)  # room for one rank's at a time, as far as a rank can know
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
    opened: list[Path] = []
    session = ort.ort.InferenceSession

    def recorded(model: Path, *args: Any, **named: Any) -> object:
        opened.append(Path(model))
        return session(model, *args, **named)

    ranks.check()
    made = files(ranks.model.out / host_cache.FOLDER)
    monkeypatch.setattr(ort.ort, "InferenceSession", recorded)
    ranks.check()
    assert files(ranks.model.out / host_cache.FOLDER) == made  # nothing was made again
    segments = [file for graph in ranks.manifest.graphs for file in graph.files]
    for host in ranks.host:
        (key,) = (path for path in host.iterdir() if path.is_dir())
        assert sorted(path for path in opened if key in path.parents) == sorted(
            key / file.replace("/", ".") for file in segments
        )
    assert len(opened) == RANKS * len(segments)


def test_each_weight_of_a_rank_is_packed_once(ranks: Ranks) -> None:
    import onnx

    ranks.answers()
    places: dict[str, set[tuple[tuple[str, str], ...]]] = {}  # of each packed weight, in whatever segment
    users: dict[str, set[Kind]] = {}
    for graph in ranks.manifest.graphs:
        for file in graph.files:
            (path,) = ranks.host[1].glob(f"*/{file.replace('/', '.')}")
            for tensor in onnx.load(path, load_external_data=False).graph.initializer:
                entry = {e.key: e.value for e in tensor.external_data}
                if any(key.startswith("prepacked") for key in entry):
                    places.setdefault(tensor.name, set()).add(tuple(sorted(entry.items())))
                    users.setdefault(tensor.name, set()).add(graph.kind)
    part = "qweight" if ranks.manifest.quant == "w8a16" else "weight"
    products = {f"text.layers.{i}.{name}.{part}" for i in range(ranks.model.config.text.layers) for name in PRODUCTS}
    assert products <= places.keys()
    assert all(len(each) == 1 for each in places.values())
    assert all(users[name] == {"prefill", "decode"} for name in products)
    locations = {dict(place)["location"] for (place,) in places.values()}
    assert {path.name for path in ranks.host[1].glob("*/*.bin")} == locations


def lose_everything(ranks: Ranks) -> None:
    shutil.rmtree(ranks.host[0])


def lose_a_segment(ranks: Ranks) -> None:
    next(ranks.host[0].glob("*/decode*.onnx")).unlink()


def cut_packed_weights_short(ranks: Ranks) -> None:
    packed = next(ranks.host[0].glob("*/*.bin"))
    with packed.open("r+b") as file:
        file.truncate(packed.stat().st_size // 2)


def mend_weights(ranks: Ranks) -> None:
    weights = next((ranks.model.out / "weights" / "rank-0").glob("*.safetensors"))
    shutil.copyfile(weights, weights.with_suffix(".mended"))
    weights.with_suffix(".mended").replace(weights)


@pytest.mark.parametrize("pristine_ranks", ["none"], indirect=True)
@pytest.mark.parametrize("fault", [lose_everything, lose_a_segment, cut_packed_weights_short, mend_weights])
def test_one_rank_makes_its_own_again(ranks: Ranks, fault: Callable[[Ranks], None]) -> None:
    ranks.answers()
    first, second = map(files, ranks.host)
    fault(ranks)
    # Of another machine, of a build for more ranks, and of one for a whole model.
    stale = [ranks.host[0] / "old", ranks.host[0].parent / "rank-2" / "old", ranks.host[0].parent / "old"]
    for folder in stale:
        folder.mkdir(parents=True)
    ranks.check()
    assert files(ranks.host[1]) == second
    again = files(ranks.host[0])
    assert len(again) == len(first)
    assert not {path: stat for path, stat in first.items() if path.suffix == ".bin"}.items() & again.items()
    assert not any(folder.exists() for folder in stale)


@pytest.mark.parametrize("pristine_ranks", ["none"], indirect=True)
def test_nothing_is_packed_for_a_rank_alone(ranks: Ranks) -> None:
    graph = ranks.manifest.graphs[0]
    backend = open_backend("onnx", ranks.model.out, ranks.manifest.cache, manifest=ranks.manifest)
    with pytest.raises(ArtifactError, match="for one of 2 ranks, but its group has 1; open all 2 ranks together"):
        backend.load(graph)
    assert not (ranks.model.out / host_cache.FOLDER).exists()

"""Artifacts of which one file is damaged: the answer is right, or ArtifactError names the file and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.model_card import CARD
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import ArtifactError
from staticvl.runtime.backends import host_cache, ort
from staticvl.tools.cli import main

from .checkpoints import tiny_llava
from .damage import DAMAGES, Damage, cut, directory, empty, fifo, flip, link_out, linked_copy, missing, swap, zero

BUCKETS = Buckets(prefill=(8, 16), decode=(1, 2), vision=(1,), context=64, slots=2)
REMEDY = r"(compile|fetch|copy|verify|remove)"
KEEPS_SIZE = (flip, zero, link_out)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "onnx")


def built(tmp_path_factory: pytest.TempPathFactory, backend: str) -> Path:
    folder = tmp_path_factory.mktemp(backend)
    checkpoint = tiny_llava(folder / "checkpoint").folder
    build(Options(checkpoint=checkpoint, out=folder / "artifact", buckets=BUCKETS, backend=backend))  # type: ignore[arg-type]
    return folder / "artifact"


def names(artifact: Path) -> list[str]:
    """All files of an artifact that are read, the manifest among them."""
    return sorted(
        str(path.relative_to(artifact))
        for path in artifact.rglob("*")
        if path.is_file() and path.name != CARD and not any(part.startswith(".") for part in path.relative_to(artifact).parts)
    )


def answer(artifact: Path, *, device: str = "cpu", verify: bool = False) -> list[str]:
    """Runs every kind of graph."""
    image = Image.new("RGB", (8, 8), "red")
    with runtime.load(artifact, device=device, verify=verify) as model:
        outs = model.generate(["one", "two"], [image, None], max_new_tokens=3, ignore_eos=True, temperature=0)
        return [out.text for out in outs]


def other_file(artifact: Path, name: str) -> Path:
    """Another of the same kind, where there is one."""
    path = artifact / name
    same = sorted(artifact.glob(f"*{path.suffix}"))
    return next(p for p in (*same, artifact / "manifest.json", *sorted(artifact.glob("*.*"))) if p != path)


def check(artifact: Path, copy: Path, name: str, damage: Damage, right: list[str], device: str = "cpu") -> None:
    """One damage of one file, opened with every check and without those that are optional."""
    linked_copy(artifact, copy)
    damage(copy / name, other_file(copy, name))
    with pytest.raises(ArtifactError, match=REMEDY) as caught:
        answer(copy, device=device, verify=True)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 1000
    if name.startswith("weights/") and device == "cpu" and damage in (flip, zero):
        try:  # nobody reads all of it; whatever it makes of the numbers, it is an answer or one sentence
            answer(copy, device=device)
        except ArtifactError as error:
            assert "staticvl verify" in str(error)
        return
    with pytest.raises(ArtifactError, match=REMEDY) as caught:
        assert answer(copy, device=device) == right
    assert name in str(caught.value)


@pytest.mark.parametrize("damage", [flip, cut, fifo], ids=lambda each: each.__name__)
def test_one_damaged_file(artifact: Path, tmp_path: Path, damage: Damage) -> None:
    right = answer(artifact)
    for place, name in enumerate(names(artifact)):
        check(artifact, tmp_path / str(place) / "a", name, damage, right)


@pytest.mark.parametrize("damage", [zero, swap, missing, empty, directory, link_out], ids=lambda each: each.__name__)
@pytest.mark.parametrize("kind", ["manifest.json", "prefill-8", "weights/", "tokenizer-"])
def test_other_damages(artifact: Path, tmp_path: Path, damage: Damage, kind: str) -> None:
    name = next(name for name in names(artifact) if name.startswith(kind))
    if (name, damage) == ("manifest.json", link_out):
        copy = linked_copy(artifact, tmp_path / "b" / "a")  # a manifest may lie elsewhere: its bytes are those that were sealed
        damage(copy / name, copy)
        assert answer(copy, verify=True) == answer(artifact)
        return
    check(artifact, tmp_path / "b" / "a", name, damage, answer(artifact))


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("backend", ["onnx", "ascend"])
def test_every_damage_of_every_file(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, backend: str, damage: Damage
) -> None:
    artifact, device = built(tmp_path_factory, backend), "cpu" if backend == "onnx" else "sim"
    right = answer(artifact, device=device)
    for place, name in enumerate(names(artifact)):
        if (name, damage) != ("manifest.json", link_out):
            check(artifact, tmp_path / str(place) / "a", name, damage, right, device)


def test_a_command_says_one_sentence(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = linked_copy(artifact, tmp_path / "a")
    flip(next(copy.glob("decode-1-*.onnx")), copy)
    for command in (["generate", str(copy), "--prompt", "x"], ["show", str(copy)], ["verify", str(copy)], ["serve", str(copy)]):
        assert main([*command, *(("--port", "0") if command[0] == "serve" else ())]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) == 1
        assert "decode-1-" in output.err


def test_what_onnxruntime_raises_is_one_sentence(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A graph that is damaged once the artifact is open, and opened then."""
    copy = linked_copy(artifact, tmp_path / "a")
    for damage in (zero, cut, empty, missing):
        with runtime.load(copy) as model:
            path = next(copy.glob("decode-1-*.onnx"))
            data = path.read_bytes()
            damage(path, path)
            with pytest.raises(ArtifactError, match=rf"{path.name} cannot be used .*staticvl verify"):
                model.generate("one", max_new_tokens=3, ignore_eos=True)
            path.write_bytes(data)


def test_a_run_that_fails_names_its_graph(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's errors are none of Python's."""
    with runtime.load(artifact) as model:
        backend = model.engine.backend
        assert isinstance(backend, ort.OrtBackend)

        def fail(*_: object) -> None:
            raise ort.ort_errors.Fail("no such row")

        model.generate("one", max_new_tokens=2, ignore_eos=True)
        for bound in backend.bound.values():
            bound.calls[:] = [fail]
        with pytest.raises(ArtifactError, match=r"\.onnx failed when it ran \(no such row\); check .*staticvl verify"):
            model.generate("one", max_new_tokens=2, ignore_eos=True)


@pytest.fixture
def packed(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact whose weights were packed for this machine."""
    monkeypatch.setattr(ort, "WORTH_PACKING", 0)
    monkeypatch.setattr(ort, "SMALL", 0)
    copy = linked_copy(artifact, tmp_path / "a")
    answer(copy)
    return copy


def packed_files(packed: Path) -> list[Path]:
    """What can be damaged: neither locks, nor links to the artifact's own files."""
    own = [path for path in sorted((packed / host_cache.FOLDER).rglob("*")) if path.is_file() and path.stat().st_nlink == 1]
    files = [path for path in own if path.name not in ("lock", ".readers.lock")]
    assert {path.suffix for path in files} >= {".onnx", ".json"}
    return files


def check_made_again(packed: Path, path: Path, damage: Damage, right: list[str]) -> None:
    """Where a damaged file keeps its size, packed numbers are only read to the end by `verify`."""
    damage(path, next(other for other in packed_files(packed) if other != path))
    assert answer(packed, verify=damage in KEEPS_SIZE) == right
    again = [p for p in (packed / host_cache.FOLDER).rglob("*") if p.is_file() and p.name == path.name]
    assert len(again) == 1


PACKED_DAMAGES = [damage for damage in DAMAGES if damage is not link_out]


def test_packed_weights_are_made_again(packed: Path) -> None:
    """Every file and every damage at least once; all pairs are slow."""
    right, files = answer(packed), packed_files(packed)
    for place in range(max(len(files), len(PACKED_DAMAGES))):
        check_made_again(packed, files[place % len(files)], PACKED_DAMAGES[place % len(PACKED_DAMAGES)], right)


@pytest.mark.slow
@pytest.mark.parametrize("damage", PACKED_DAMAGES, ids=lambda each: each.__name__)
def test_packed_weights_are_made_again_after_every_damage(packed: Path, damage: Damage) -> None:
    right = answer(packed)
    for path in packed_files(packed):
        check_made_again(packed, path, damage, right)


def test_verify_removes_damaged_packed_weights(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((packed / host_cache.FOLDER).rglob("*.onnx"))
    flip(path, path)
    with runtime.load(packed):  # made again
        assert main(["verify", str(packed)]) == 0
        assert host_cache.FILES not in capsys.readouterr().out
    flip(path, path)
    assert main(["verify", str(packed)]) == 0
    assert f"{path} does not match its sha256 in {host_cache.FILES}: removed" in capsys.readouterr().out
    assert not path.exists()

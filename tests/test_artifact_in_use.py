"""An artifact that is compiled again while it is in use: those who have it open go on with it, and then the old files go."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.leftovers import WAITING
from staticvl.compiler.model_card import CARD
from staticvl.compiler.plan import Buckets, Options
from staticvl.compiler.progress import Progress
from staticvl.runtime import locks
from staticvl.runtime.artifact import ArtifactError, open_artifact, verify
from staticvl.runtime.backends import host_cache, ort
from staticvl.runtime.locks import READERS, alone
from staticvl.tools.cli import main

from .checkpoints import tiny_llava
from .damage import linked_copy

OLD = Buckets(prefill=(8, 16), decode=(1, 2), vision=(1,), context=64, slots=2)
NEW = Buckets(prefill=(12,), decode=(1, 3), vision=(2,), context=96, slots=3)

FEW = Buckets(prefill=(12,), decode=(1,), vision=(1,), context=64, slots=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("in_use") / "checkpoint").folder


@pytest.fixture(scope="module")
def pristine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("in_use") / "artifact"
    build(Options(checkpoint=checkpoint, out=out, buckets=OLD))
    return out


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "a")


class Told(Progress):
    """Remembers what a build says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def compiled_again(checkpoint: Path, artifact: Path, buckets: Buckets = NEW, *, tune: bool = False) -> str:
    """What the build says."""
    recorder = Told()
    build(Options(checkpoint=checkpoint, out=artifact, buckets=buckets, tune=tune), recorder)
    return "\n".join(recorder.lines)


def answers(model: runtime.Model) -> list[str]:
    """Runs every graph of OLD."""
    image = Image.new("RGB", (8, 8), "red")
    few = model.generate("a", max_new_tokens=3, ignore_eos=True, temperature=0)
    both = model.generate(["a b c d e f g h i", "c"], [image, None], max_new_tokens=3, ignore_eos=True, temperature=0)
    return [few.text, *(out.text for out in both)]


def stray(artifact: Path) -> set[str]:
    """Files that the manifest does not name."""
    found = {str(path.relative_to(artifact)) for path in artifact.rglob("*") if path.is_file()}
    kept = {"manifest.json", CARD, ".build.lock", READERS, *open_artifact(artifact).manifest.files}
    return {name for name in found - kept if not name.startswith(".host/")}


@pytest.mark.parametrize(("buckets", "tune", "cleaner"), [(NEW, False, "build"), (FEW, True, "verify")])
def test_an_open_model_goes_on(
    pristine: Path, checkpoint: Path, artifact: Path, buckets: Buckets, cleaner: str, tune: bool
) -> None:
    """Graphs that were never opened included; afterwards the next build or `verify` removes what the old one had."""
    with runtime.load(pristine) as other:
        right = answers(other)
    with runtime.load(artifact) as model:
        assert model.generate("a", max_new_tokens=1, ignore_eos=True).token_ids  # opens one graph of five
        assert "the earlier artifact is in use: " in compiled_again(checkpoint, artifact, buckets, tune=tune)
        assert main(["verify", str(artifact)]) == 0  # removes nothing while it is in use
        assert stray(artifact)
        assert answers(model) == right
    assert stray(artifact) > {WAITING}
    if cleaner == "build":
        assert "in use" not in compiled_again(checkpoint, artifact, buckets, tune=tune)
    else:
        assert main(["verify", str(artifact)]) == 0
    assert stray(artifact) == set()
    verify(artifact).close()
    with runtime.load(artifact) as model:
        assert model.artifact.manifest.buckets("decode") == buckets.decode


def test_a_model_of_each_build(checkpoint: Path, artifact: Path) -> None:
    """Three artifacts in one folder, one after another, each in use: nothing goes before the last one has left."""
    with runtime.load(artifact) as first:
        right = answers(first)
        compiled_again(checkpoint, artifact)
        with runtime.load(artifact):
            compiled_again(checkpoint, artifact, OLD)
        first.engine.unload()
        assert answers(first) == right
        assert stray(artifact)
    compiled_again(checkpoint, artifact, OLD)
    assert stray(artifact) == set()


@pytest.fixture
def reader(artifact: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the artifact open."""
    code = "import sys\nfrom staticvl import runtime\nmodel = runtime.load(sys.argv[1])\nprint('open', flush=True)\ninput()\n"
    command = [sys.executable, "-c", code, str(artifact)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_a_reader_that_is_killed_keeps_nothing(checkpoint: Path, artifact: Path, reader: subprocess.Popen[str]) -> None:
    assert "in use" in compiled_again(checkpoint, artifact)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    assert main(["verify", str(artifact)]) == 0
    assert stray(artifact) == set()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_nothing_fails(checkpoint: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    with runtime.load(artifact) as model:
        model.open_graphs()
        right = answers(model)
        assert "in use" not in compiled_again(checkpoint, artifact)
        assert stray(artifact) == set()
        assert answers(model) == right  # what was opened stays open


def test_a_folder_that_cannot_be_written_is_locked_all_the_same(artifact: Path) -> None:
    """The lock is a file to read; where it is missing and cannot be made, there is none."""
    (artifact / READERS).unlink(missing_ok=True)
    (artifact / READERS).touch(0o444)
    with runtime.load(artifact), alone(artifact / READERS) as free:
        assert not free


def test_a_reader_without_a_lock_file(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(locks, "_open", refuse)
    with runtime.load(artifact) as model:
        assert answers(model)


def test_verify_leaves_an_unfinished_build_alone(artifact: Path) -> None:
    """Its finished parts are in no list of what waits."""
    unfinished = artifact / "prefill-99-0123456789ab.onnx"
    unfinished.write_bytes(b"finished")
    (artifact / WAITING).write_text('["../outside", "prefill-1-0123456789ab.onnx"]')
    outside = artifact.parent / "outside"
    outside.touch()
    assert main(["verify", str(artifact)]) == 0
    assert unfinished.exists()
    assert outside.exists()
    assert not (artifact / WAITING).exists()


def test_packed_weights_in_use_stay(checkpoint: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another artifact in the same folder packs its own and leaves those alone that somebody uses."""
    monkeypatch.setattr(ort, "WORTH_PACKING", 0)
    monkeypatch.setattr(ort, "SMALL", 0)
    folders = lambda: {path for path in (artifact / host_cache.FOLDER).iterdir() if path.is_dir()}  # noqa: E731
    with runtime.load(artifact) as model:
        old = folders()
        compiled_again(checkpoint, artifact)
        with runtime.load(artifact) as other:
            assert answers(other)
            assert len(folders()) == 2
        opened: list[str] = []
        session = ort.ort.InferenceSession
        monkeypatch.setattr(
            ort.ort, "InferenceSession", lambda path, *a, **k: opened.append(str(path)) or session(path, *a, **k)
        )
        assert answers(model)
        assert opened
        assert all(str(next(iter(old))) in path for path in opened)
    monkeypatch.setattr(host_cache, "_cpu", lambda: "another")
    with runtime.load(artifact):
        assert len(folders()) == 1


@pytest.mark.slow
def test_every_rank_holds_the_artifact(two_ranks: Path, tmp_path: Path) -> None:
    artifact = linked_copy(two_ranks, tmp_path / "a")
    with runtime.load(artifact) as model:
        model.artifact.close()  # rank 0's own hold
        with alone(artifact / READERS) as free:
            assert not free
    with alone(artifact / READERS) as free:
        assert free


def test_a_lock_that_is_no_file_does_not_hang(artifact: Path, checkpoint: Path) -> None:
    import os

    (artifact / READERS).unlink(missing_ok=True)
    os.mkfifo(artifact / READERS)
    with runtime.load(artifact) as model:
        assert answers(model)
    with pytest.raises(OSError, match="is not a regular file; remove it"):
        compiled_again(checkpoint, artifact)


def test_an_artifact_that_is_refused_is_not_held(artifact: Path) -> None:
    next(artifact.glob("decode-1-*.onnx")).unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        open_artifact(artifact)
    with alone(artifact / READERS) as free:
        assert free

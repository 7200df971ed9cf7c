"""The tiny model that attacks are made on: its artifacts, and a question whose right answer is known."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options

from .case import REPO

EMBEDDED = REPO / "tools" / "assets" / "tiny_llava15"
QUESTION = "What is in the picture?"
IMAGE = EMBEDDED.parent / "shapes.png"
BUCKETS = {
    "onnx": Buckets(prefill=(16, 64), decode=(1, 2), vision=(1,), context=256, slots=2),
    "ascend": Buckets(prefill=(32,), decode=(1,), vision=(1,), context=128, slots=1),
}
DEVICES = {"onnx": "cpu", "ascend": "sim"}
TOKENS = {"onnx": 8, "ascend": 2}
HONEST_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Model:
    """An artifact and what it answers while it is whole."""

    folder: Path
    backend: str
    answer: str

    def files(self) -> list[str]:
        """Paths of its files, within its folder; those whose names begin with a dot are no part of it."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))

    def copied(self, folder: Path) -> Path:
        """A copy that shares its files: one that is to change has to be unlinked first."""
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.folder, folder, copy_function=_link))


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def compiled(folder: Path, backend: str) -> Path:
    """The artifact of the tiny model within `folder`, compiled where it is not there yet."""
    out = folder / backend
    if not (out / "manifest.json").exists():
        build(Options(checkpoint=EMBEDDED, out=out, backend=backend, buckets=BUCKETS[backend]))
    return out


def known(folder: Path, backend: str) -> Model:
    artifact = compiled(folder, backend)
    return Model(artifact, backend, answer(artifact, backend))


def answer(artifact: Path, backend: str) -> str:
    """To the question about the image, greedy."""
    with runtime.load(artifact, device=DEVICES[backend]) as model:
        return model.generate(QUESTION, [IMAGE], max_new_tokens=TOKENS[backend], temperature=0).text

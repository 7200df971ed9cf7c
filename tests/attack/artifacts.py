"""Damage to any file of an artifact: it is named, or it did not matter."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from staticvl.runtime.artifact import WEIGHTS, verify

from .case import Attempt, Kind
from .models import Model, answer, known
from .mutate import BYTES, shuffled


@dataclass(frozen=True, slots=True)
class Ground:
    models: tuple[Model, ...]
    copy: Path
    menu: tuple[tuple[Model, str, str], ...]  # model, file, damage


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    """The model for ONNX Runtime, and for the simulator of Ascend where torchair is there."""
    backends = ("onnx", "ascend") if "STATICVL_TORCH_NPU" in os.environ else ("onnx",)
    models = tuple(known(folder, backend) for backend in backends)
    menu = [(model, file, damage) for model in models for file in model.files() for damage in (*BYTES, *STRUCTURE)]
    yield Ground(models, folder / "artifacts-copy", tuple(shuffled(menu)))


def make(ground: Ground, rng: random.Random, index: int) -> Attempt:
    model, file, damage = ground.menu[index % len(ground.menu)]
    copy = model.copied(ground.copy)
    path = copy / file
    if damage in BYTES:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(BYTES[damage](rng, data))
    else:
        STRUCTURE[damage](rng, path)
    return Attempt(f"{damage} {file} of the {model.backend} artifact", lambda: _judge(copy, model, file))


def _judge(artifact: Path, model: Model, file: str) -> str:
    """How a use of a damaged copy ends. The contents of weights need not be read before they are used: damage there may be
    left to `verify`."""
    if answer(artifact, model.backend) == model.answer:
        return "right answer"
    if file.startswith(WEIGHTS):
        verify(artifact)
    return "wrong answer"


def _missing(_: random.Random, path: Path) -> None:
    path.unlink()


def _folder(_: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def _other(rng: random.Random, path: Path) -> None:
    """The contents of another file of the artifact."""
    others = [each for each in sorted(path.parent.rglob("*")) if each.is_file() and each.name != path.name]
    data = rng.choice(others).read_bytes() if others else b"other"
    path.unlink()
    path.write_bytes(data)


def _loop(_: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _gone(_: random.Random, path: Path) -> None:
    """All of its folder."""
    shutil.rmtree(path.parent)


STRUCTURE: dict[str, Callable[[random.Random, Path], None]] = {
    "missing": _missing, "a folder in place of": _folder, "another file in place of": _other,
    "a link to itself in place of": _loop, "without the folder of": _gone,
}  # fmt: skip

KIND = Kind(
    name="artifacts",
    what="every file of an artifact flipped, cut, zeroed, swapped, lengthened, emptied, replaced or missing",
    endings=("ArtifactError", "right answer"),
    limit_s=20,
    count=500,
    ground=ground,
    make=make,
)

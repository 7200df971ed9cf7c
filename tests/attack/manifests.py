"""Manifests that say something else under the right digest."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from staticvl.runtime.artifact import MANIFEST, Manifest, encode_manifest

from .case import Attempt, Kind
from .models import Model, answer, known
from .mutate import Change, json_menu, shuffled


@dataclass(frozen=True, slots=True)
class Ground:
    model: Model
    copy: Path
    menu: tuple[Change, ...]


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    model = known(folder, "onnx")
    document = json.loads((model.folder / MANIFEST).read_text(encoding="utf-8"))
    files = {*model.files(), document["tokenizer"], *(graph["file"] for graph in document["graphs"])}
    menu = json_menu(document, is_path=lambda value: isinstance(value, str) and value in files)
    yield Ground(model, folder / "manifests-copy", tuple(shuffled(menu)))


def make(ground: Ground, rng: random.Random, index: int) -> Attempt:
    change = ground.menu[index % len(ground.menu)]
    copy = ground.model.copied(ground.copy)
    path = copy / MANIFEST
    path.unlink()
    path.write_bytes(sealed(change.apply(rng)))

    def run() -> str:
        return "right answer" if answer(copy, ground.model.backend) == ground.model.answer else "another answer"

    return Attempt(change.what, run)


def sealed(text: str) -> bytes:
    """The text of a manifest with the digest that belongs to it, where it can be read as one."""
    data = text.encode(errors="surrogatepass")
    try:
        own = encode_manifest(msgspec.json.decode(data, type=Manifest))
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return data
    digest = json.loads(own)["digest"]
    return re.sub(rb'"digest": "[0-9a-f]{64}"', b'"digest": "%b"' % digest.encode(), data, count=1)


KIND = Kind(
    name="manifests",
    what="every number, path, key and kind of value of a manifest, sealed again; deep and long documents",
    # A sealed manifest is the definition of its model: some changes make another sound one, or one that holds less.
    endings=("ArtifactError", "right answer", "another answer", "ContextError", "PromptError"),
    limit_s=20,
    count=1500,
    ground=ground,
    make=make,
)

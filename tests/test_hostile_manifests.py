"""Manifests that say what they must not, under a right seal: refused in one sentence, before memory or time is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from staticvl import runtime
from staticvl.runtime.artifact import ArtifactError, FileSpec, Manifest, _digest, open_artifact, read_manifest, write_manifest
from staticvl.tools.cli import main

from .damage import linked_copy, rewritten

Change = Callable[[dict[str, Any]], object]


def sealed(folder: Path, change: Change) -> None:
    """Change the JSON of a manifest and seal it again, as far as what it says can be sealed."""
    path = folder / "manifest.json"
    data = json.loads(path.read_bytes())
    change(data)
    text = json.dumps(data).encode()
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
        data["digest"] = _digest(manifest)
    except msgspec.MsgspecError:
        pass  # no seal is looked at
    rewritten(path, json.dumps(data).encode())


@pytest.fixture
def copy(embedded_artifact: Path, tmp_path: Path) -> Path:
    return linked_copy(embedded_artifact, tmp_path / "in" / "a")


def graph(data: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(each for each in data["graphs"] if each["kind"] == kind)


def tensor(data: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    """An input or output of a graph."""
    return next(each for each in (*graph(data, kind)["inputs"], *graph(data, kind)["outputs"]) if each["name"] == name)


def weight(data: dict[str, Any]) -> dict[str, Any]:
    return next(iter(data["weights"].values()))


def renamed(data: dict[str, Any], name: str) -> None:
    data["files"][name] = data["files"].pop(next(n for n in data["files"] if n.startswith("decode-1-")))


HOSTILE: dict[str, tuple[Change, str]] = {
    "file above": (lambda d: renamed(d, "../x.onnx"), "a path outside the artifact"),
    "file at the root": (lambda d: renamed(d, "/etc/passwd"), "a path outside the artifact"),
    "graph above": (lambda d: graph(d, "decode").update(file="../x.onnx"), "a path outside the artifact"),
    "graph unlisted": (lambda d: graph(d, "decode").update(file="x.onnx"), "not listed under files"),
    "tokenizer above": (lambda d: d.update(tokenizer=".."), "a path outside the artifact"),
    "weight above": (lambda d: weight(d).update(file="../w"), "not listed under files"),
    "weight after the end": (lambda d: weight(d).update(offset=1 << 40), "ends after the end"),
    "weight before the beginning": (lambda d: weight(d).update(offset=-1), "Expected `int` >= 0"),
    "weight of another size": (lambda d: weight(d).update(shape=[3, 3]), "but .* bytes"),
    "weight of an unknown type": (lambda d: weight(d).update(dtype="complex128"), r"matching regex .* at `\$\.weights"),
    "no end of a sequence": (lambda d: d["model"].update(eos_token_ids=[]), "length >= 1"),
    "a graph without inputs": (lambda d: graph(d, "decode").update(inputs=[]), "it has no input"),
    "a graph without outputs": (lambda d: graph(d, "decode").update(outputs=[]), "it has no inputs or no outputs"),
    "a graph without positions": (lambda d: tensor(d, "decode", "rope_sin").update(name="x"), "it has no input rope_sin"),
    "an unknown filter": (lambda d: d["model"]["image"].update(resample=9), "Expected `int` <= 5"),
    "rows without end": (lambda d: d["cache"].update(rows=10**12), "Expected `int` <="),
    "a huge cache": (lambda d: d["cache"].update(slots=1 << 24, rows=1 << 24, context=1 << 24), "larger than any machine"),
    "no slots": (lambda d: d["cache"].update(slots=0), "Expected `int` >= 1"),
    "fewer rows than tokens": (lambda d: d["cache"].update(context=1 << 20), "rows for a context of"),
    "other heads": (lambda d: d["cache"].update(kv_heads=d["cache"]["kv_heads"] + 1), "the cache"),
    "cache input": (lambda d: tensor(d, "decode", "k_cache.0").update(shape=[1, 1, 1, 1]), "k_cache.0 has shape"),
    "more rows than slots": (lambda d: graph(d, "decode").update(bucket=1000), "expected int32"),
    "cache of a layer too many": (lambda d: tensor(d, "decode", "k_cache.0").update(name="k_cache.99"), "no part of the cache"),
    "token ids": (lambda d: tensor(d, "prefill", "token_ids").update(shape=[1, 1 << 30]), "token_ids is"),
    "logits": (lambda d: tensor(d, "decode", "logits").update(shape=[1, 7]), "logits is"),
    "float pixels": (lambda d: tensor(d, "vision", "pixels").update(dtype="float32"), "pixels is"),
    "a huge tensor": (lambda d: tensor(d, "vision", "image_rows").update(shape=[1 << 40, 1 << 40]), "too large"),
    "a bucket without tokens": (lambda d: graph(d, "prefill").update(bucket=0), "Expected `int` >= 1"),
    "negative cost": (lambda d: graph(d, "prefill").update(cost_ms=-1.0), "Expected `float` >= 0"),
    "two of a kind": (lambda d: d["graphs"].append(graph(d, "decode")), "one kind and bucket"),
    "no decode graph": (lambda d: d.update(graphs=[g for g in d["graphs"] if g["kind"] != "decode"]), "no decode graph"),
    "a huge token id": (lambda d: d["model"].update(eos_token_ids=[10**9]), "Expected `int` <="),
    "a huge added token": (lambda d: d["model"]["tokenizer"].update(added_tokens={"x": 10**9}), "Expected `int` <="),
    "a huge vocabulary": (lambda d: d["model"].update(vocab_size=10**9), "Expected `int` <="),
    "a huge image": (lambda d: d["model"]["image"].update(size=10**6), "Expected `int` <="),
    "nothing to divide by": (lambda d: d["model"]["image"].update(std=[0.0, 1.0, 1.0]), "Expected `float` > 0"),
    "an infinite base": (lambda d: d["model"]["rope"].update(theta=float("inf")), "damaged"),
    "no number": (lambda d: d["model"]["rope"].update(theta=float("nan")), "damaged"),
    "many ranks": (lambda d: d.update(tp=10**6), "Expected `int` <="),
    "Ascend's facts": (lambda d: d.update(backend="ascend"), "`ascend` is missing"),
    "an unknown family": (lambda d: d["model"].update(family="x" * 10_000), "not known"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = HOSTILE[name]
    sealed(copy, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        runtime.load(copy)
    assert len(str(caught.value)) < 1000
    assert main(["generate", str(copy), "--prompt", "x"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


TEXTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "deep": (lambda data: b'{"x":' + b"[" * 200_000, "damaged"),
    "deep and unknown": (lambda data: data.rstrip()[:-1] + b',"x":' + b"[" * 200_000, "damaged"),
    "a key twice": (lambda data: data.replace(b'"quant":', b'"quant": "w4a16", "quant":', 1), "has one key twice"),
    "not UTF-8": (lambda data: data.replace(b'"quant": "none"', b'"quant": "\xff\xfe"', 1), "damaged"),
    "a number too large": (lambda data: data.replace(b'"theta": ', b'"theta": 1e999, "x": ', 1), "damaged"),
    "another type": (lambda data: b"[1, 2]", "damaged"),
    "nothing": (lambda data: b"", "damaged"),
    "text": (lambda data: b"hello", "damaged"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_manifests(copy: Path, name: str) -> None:
    change, message = TEXTS[name]
    path = copy / "manifest.json"
    rewritten(path, change(path.read_bytes()))
    with pytest.raises(ArtifactError, match=rf"manifest.json .*{message}.*(compile|fetch)"):
        runtime.load(copy)


def test_a_huge_manifest_is_not_read(copy: Path) -> None:
    path = copy / "manifest.json"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(ArtifactError, match="more than"):
        read_manifest(copy)


def test_a_folder_of_files_that_lies_elsewhere(copy: Path) -> None:
    """A part of the path is a link out of the artifact."""
    weights = copy / "weights"
    weights.rename(copy.parent / "weights")
    weights.symlink_to(copy.parent / "weights")
    with pytest.raises(ArtifactError, match=r"leads out of the artifact.*cp -rL"):
        open_artifact(copy)


def test_a_link_within_the_artifact_is_followed(copy: Path) -> None:
    path = next((copy / "weights").iterdir())
    path.rename(path.with_suffix(".there"))
    path.symlink_to(path.with_suffix(".there").name)
    open_artifact(copy).close()


def test_a_device_is_not_read(copy: Path) -> None:
    path = next((copy / "weights").iterdir())
    path.unlink()
    path.symlink_to(os.devnull)
    with pytest.raises(ArtifactError, match="leads out of the artifact"):
        open_artifact(copy)


def replaced(copy: Path, name: str, data: bytes) -> None:
    """Another file under a right seal."""
    import hashlib

    manifest = read_manifest(copy)
    file = next(each for each in manifest.files if each.endswith(name))
    rewritten(copy / file, data)
    (copy / "manifest.json").unlink()
    spec = FileSpec(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_manifest(copy, msgspec.structs.replace(manifest, files={**manifest.files, file: spec}))


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'{"model": {}}', b"\xff\xff"])
def test_a_sealed_file_that_is_no_tokenizer(copy: Path, data: bytes) -> None:
    replaced(copy, "tokenizer.json", data)
    with pytest.raises(ArtifactError, match=r"tokenizer-.*tokenizer\.json.*staticvl verify"):
        runtime.load(copy)


def test_a_token_with_a_huge_id(copy: Path) -> None:
    path = next(copy.glob("tokenizer-*/tokenizer.json"))
    tokenizer = json.loads(path.read_bytes())
    tokenizer["model"]["vocab"]["far away"] = 10**9
    replaced(copy, "tokenizer.json", json.dumps(tokenizer).encode())
    with pytest.raises(ArtifactError, match="a token with the id 1000000000; expected less than"):
        runtime.load(copy)


def test_a_sealed_template_that_is_no_text(copy: Path) -> None:
    replaced(copy, "chat_template.jinja", b"\xff\xfe{{")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja cannot be used .*staticvl verify"):
        runtime.load(copy)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x08\x07" * 1000])
def test_a_sealed_file_that_is_no_graph(copy: Path, data: bytes) -> None:
    name = next(name for name in read_manifest(copy).files if name.startswith("decode-1-"))
    replaced(copy, name, data)
    with runtime.load(copy) as model, pytest.raises(ArtifactError, match=rf"{name} cannot be used .*staticvl verify"):
        model.open_graphs()

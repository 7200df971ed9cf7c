"""The model card of an artifact: what it says is of the manifest, it is reproducible, and an edited one is kept."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from PIL import Image

from staticvl.compiler import model_card as card_module
from staticvl.compiler.build import BuildError, build
from staticvl.compiler.licence import NOT_STATED, Licence, read_licence
from staticvl.compiler.model_card import CARD, Origin, model_card, origin
from staticvl.compiler.plan import Buckets, Options
from staticvl.compiler.progress import Progress
from staticvl.runtime.artifact import AscendInfo, Manifest, read_manifest, verify
from staticvl.runtime.signature import check_signature, new_key, sign
from staticvl.tools.cli import build_parser

from .checkpoints import tiny_llava
from .checkpoints_mllama import tiny_mllama
from .conftest import EMBEDDED

BUCKETS = Buckets(prefill=(8,), decode=(1, 2), vision=(1,), context=64, slots=2)
APACHE = Licence("apache-2.0", "`apache-2.0`, as README.md of the checkpoint says.")
HERE = Origin("tiny", "", APACHE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("card") / "my-llava").folder


@pytest.fixture(scope="module")
def pristine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "artifact"
    build(options(checkpoint, out))
    return out


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "there" / pristine.name)


def options(checkpoint: Path, out: Path, **changes: Any) -> Options:
    return Options(checkpoint=checkpoint, out=out, buckets=replace(BUCKETS, **changes))


class Said(Progress):
    """What a build says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def front_matter(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def facts(card: str) -> dict[str, str]:
    """The rows of two cells."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))


# ---- what it says


def test_the_card_of_the_embedded_model(embedded_artifact: Path) -> None:
    card, manifest = (embedded_artifact / CARD).read_text(encoding="utf-8"), read_manifest(embedded_artifact)
    assert front_matter(card) == {
        "library_name": "staticvl",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
    }
    rows = facts(card)
    assert rows["model"] == "LLaVA-1.5 (hf layout), hidden size 128, vocabulary 640"
    assert rows["checkpoint"] == "the folder `tiny_llava15`"
    assert rows["digest of checkpoint and settings"] == f"`{manifest.build.key}`"
    assert (rows["quantisation"], rows["context"]) == ("none", "512 tokens, 4 at once")
    assert rows["made by"].startswith(f"staticvl {manifest.build.staticvl}, ")
    weights = (EMBEDDED / "model.safetensors").read_bytes()
    assert rows["`model.safetensors`"] == hashlib.sha256(weights).hexdigest()
    assert "Of the weights: `apache-2.0`, as README.md of the checkpoint says." in card


def test_the_worst_error_of_each_kind(embedded_artifact: Path) -> None:
    card, manifest = (embedded_artifact / CARD).read_text(encoding="utf-8"), read_manifest(embedded_artifact)
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (\w+) \| ([\d, ]+) \| (\S+) \| (\S+) \| (\S+) \|$", card, re.M)}
    assert set(rows) == {"vision", "prefill", "decode"}
    for kind, (buckets, worst, allowed, _) in rows.items():
        graphs = [graph for graph in manifest.graphs if graph.kind == kind]
        assert buckets == ", ".join(str(graph.bucket) for graph in sorted(graphs, key=lambda graph: graph.bucket))
        errors = [case.error for graph in graphs for case in graph.certificate.cases]  # type: ignore[union-attr]
        assert worst == f"{max(errors):.1e}"
        assert float(worst) <= float(allowed)


@pytest.mark.parametrize("name", ["llava-7b", "two words", "a'b"])
def test_commands_parse(embedded_artifact: Path, name: str) -> None:
    manifest = read_manifest(embedded_artifact)
    ascend = AscendInfo(python="3.11", torch="2", torch_npu="2", cache_format="1", soc="Ascend910B")
    for each in (manifest, msgspec.structs.replace(manifest, backend="ascend", ascend=ascend)):
        card = model_card(each, HERE, name)
        lines = "".join(re.findall(r"```sh\n(.*?)```", card, re.DOTALL)).splitlines()
        commands = [shlex.split(line)[1:] for line in lines]
        assert [command[0] for command in commands] == ["verify", "generate", "serve", "compile"]
        parsed = [build_parser().parse_args(command) for command in commands]
        assert {str(args.artifact) for args in parsed[:3]} == {name}
        assert parsed[1].device == ("cpu" if each is manifest else "npu")
        (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        compile(python, "card", "exec")
        assert ("Ascend910B, torch_npu 2, Python 3.11" in card) == (each is not manifest)


def test_its_python_runs(artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(artifact.parent)
    Image.new("RGB", (40, 30), "red").save("cat.jpg")
    (python,) = re.findall(r"```python\n(.*?)```", (artifact / CARD).read_text(encoding="utf-8"), re.DOTALL)
    exec(python.replace("images=", "max_new_tokens=2, ignore_eos=True, images="), {})
    assert capsys.readouterr().out.strip()


def test_ranks_and_images_of_cross_attention(two_ranks: Path, tmp_path: Path) -> None:
    rows = facts((two_ranks / CARD).read_text(encoding="utf-8"))
    assert rows["processes"] == "2"
    buckets = Buckets(prefill=(8,), decode=(1,), images=(1,), context=48, slots=1)
    build(Options(checkpoint=tiny_mllama(tmp_path / "checkpoint").folder, out=tmp_path / "looking", buckets=buckets))
    card, manifest = (tmp_path / "looking" / CARD).read_text(encoding="utf-8"), read_manifest(tmp_path / "looking")
    cross = manifest.cache.cross
    assert cross and facts(card)["context"] == f"48 tokens, 1 at once, {cross.images} images of {cross.rows} keys in each"
    assert f"Llama-3.2-Vision, compiled by staticvl to {len(manifest.graphs)} graphs" in card


def test_graphs_that_were_not_certified_say_so(embedded_artifact: Path) -> None:
    manifest = read_manifest(embedded_artifact)
    graphs = tuple(msgspec.structs.replace(graph, certificate=None) for graph in manifest.graphs)
    assert "| vision | 1, 2 | not certified | - | - |" in model_card(
        msgspec.structs.replace(manifest, graphs=graphs), HERE, "a"
    )


# ---- where it came from


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, NOT_STATED),
        ({"README.md": "# A model\nlicense: mit\n"}, NOT_STATED),
        ({"README.md": "---\nlicense: apache-2.0\n---\n", "config.json": '{"license": "mit"}'}, APACHE),
        ({"README.md": "---\r\ntags: [a]\r\nlicense: 'apache-2.0' # yes\r\n---\r\n"}, APACHE),
        (
            {"README.md": "---\nlicense: other\nlicense_name: Tongyi Qianwen\n---\n"},
            Licence("other", "`Tongyi Qianwen`, as README.md of the checkpoint says."),
        ),
        (
            {"README.md": "---\nlicense: llama3.2\nextra: |\n  ---\n---\n"},
            Licence("llama3.2", "`llama3.2`, as README.md of the checkpoint says."),
        ),
        ({"config.json": '{"license": "MIT"}'}, Licence("mit", "`MIT`, as config.json of the checkpoint says.")),
        ({"config.json": '{"license": 3}'}, NOT_STATED),
        (
            {"LICENSE.txt": "\n  LLAMA 3.2 <b>`COMMUNITY` LICENSE\nmore\n"},
            Licence("other", "The file `LICENSE.txt` of the checkpoint, which begins: `LLAMA 3.2 <b>COMMUNITY LICENSE`"),
        ),
        ({"README.md": b"\xff\xfe", "config.json": b"[", "LICENSE": b"\xff"}, NOT_STATED),
    ],
)
def test_licences(tmp_path: Path, files: Mapping[str, str | bytes], licence: Licence) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_licence(tmp_path) == licence


def test_a_front_matter_of_any_length_ends_soon(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n" + "license: " * 50_000 + "\n" + "a: b\n" * 50_000)
    assert read_licence(tmp_path) == NOT_STATED


def test_the_name_of_a_model_from_a_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    made = origin(Options(checkpoint=snapshot, out=tmp_path / "a"))
    assert (made.folder, made.base_model, made.licence) == ("0123abc", "llava-hf/llava-1.5-7b-hf", NOT_STATED)
    assert origin(Options(checkpoint=tmp_path, out=tmp_path / "a")).base_model == ""


def test_a_base_model_is_in_the_front_matter(embedded_artifact: Path) -> None:
    card = model_card(read_manifest(embedded_artifact), Origin("0123", "llava-hf/llava", NOT_STATED), "a")
    assert front_matter(card)["base_model"] == "llava-hf/llava"
    assert front_matter(card)["license"] == "unknown"
    assert facts(card)["checkpoint"] == "llava-hf/llava, the folder `0123`"


def test_names_cannot_break_the_card(embedded_artifact: Path) -> None:
    """Folders may be called anything."""
    card = model_card(read_manifest(embedded_artifact), Origin("a`b|c", 'x: "y', Licence("other", "x")), "na|me\n# no")
    assert front_matter(card)["base_model"] == 'x: "y'
    assert "| the folder `ab c` |" in card.replace('x: "y, ', "")
    assert "# na|me# no\n" in card


# ---- when it is written


def test_it_is_the_same_every_time(checkpoint: Path, pristine: Path, tmp_path: Path) -> None:
    """Though the manifests differ, by the times that were measured."""
    build(options(checkpoint, tmp_path / pristine.name))
    assert (tmp_path / pristine.name / CARD).read_bytes() == (pristine / CARD).read_bytes()


def test_an_unchanged_build_does_not_touch_it(checkpoint: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (artifact / CARD).read_bytes()
    monkeypatch.setattr(card_module, "write_atomically", _never)
    assert not build(options(checkpoint, artifact)).traced
    assert (artifact / CARD).read_bytes() == before


def _never(path: Path, data: bytes) -> None:
    raise AssertionError(f"{path} is written")


def test_another_build_writes_another(checkpoint: Path, artifact: Path) -> None:
    build(options(checkpoint, artifact, prefill=(8, 16)))
    card = (artifact / CARD).read_text(encoding="utf-8")
    assert "| prefill | 8, 16 |" in card


def test_an_edited_one_stays(checkpoint: Path, artifact: Path) -> None:
    edited = (artifact / CARD).read_text(encoding="utf-8").replace("## Run it", "## Run it, please")
    (artifact / CARD).write_text(edited, encoding="utf-8")
    said = Said()
    build(options(checkpoint, artifact), said)
    assert not [line for line in said.lines if CARD in line]  # it is the same artifact
    build(options(checkpoint, artifact, prefill=(8, 16)), said)
    assert (artifact / CARD).read_text(encoding="utf-8") == edited
    (line,) = [line for line in said.lines if CARD in line]
    assert "was edited and stays, though the artifact is another one; remove it for a new one" in line
    (artifact / CARD).unlink()
    build(options(checkpoint, artifact, prefill=(8, 16)))
    assert "| prefill | 8, 16 |" in (artifact / CARD).read_text(encoding="utf-8")


def test_no_reader_needs_it(artifact: Path, tmp_path: Path) -> None:
    """Artifacts of earlier releases have none; a signature holds whatever becomes of it."""
    key = tmp_path / "key"
    public = new_key(key)
    sign(artifact, read_manifest(artifact), key)
    (artifact / CARD).write_text("mine")
    check_signature(artifact, verify(artifact).manifest, public)
    (artifact / CARD).unlink()
    check_signature(artifact, verify(artifact).manifest, public)
    assert CARD not in read_manifest(artifact).files


def test_an_old_artifact_gets_one(checkpoint: Path, artifact: Path) -> None:
    before: Manifest = read_manifest(artifact)
    (artifact / CARD).unlink()
    report = build(options(checkpoint, artifact))
    assert (report.traced, report.converted, report.manifest) == ((), False, before)
    assert (artifact / CARD).is_file()


def test_a_folder_with_another_readme_is_not_an_artifact(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / CARD).write_text("my notes")
    with pytest.raises(BuildError, match=r"holds other files \(README\.md"):
        build(options(checkpoint, tmp_path / "work"))
    assert (tmp_path / "work" / CARD).read_text() == "my notes"
    (artifact / "manifest.json").unlink()  # damaged, but ours: the card is no reason to refuse it
    build(options(checkpoint, artifact))
    verify(artifact)

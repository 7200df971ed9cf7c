"""The examples run as a newcomer runs them, and what they print and write is right."""

from __future__ import annotations

import ast
import csv
import json
import re
import runpy
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import yaml
from nbclient import NotebookClient
from PIL import Image
from traitlets.config import Config

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.artifact import read_manifest
from staticvl.tools import demo
from staticvl.tools.comparing.samples import built_in_samples
from staticvl.tools.demo import IMAGE

from .conftest import REPO
from .servers import serving

EXAMPLES = REPO / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
QUESTION = "What is in the picture?"
BOX_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: the red circle."
NEAR = 0.05 * 480  # pixels: the model writes steps of a twentieth of the image
CELL_S = 300  # that a cell may take on a busy machine

Run = Callable[..., str]


@pytest.fixture(scope="module")
def model(embedded_artifact: Path) -> Iterator[runtime.Model]:
    with runtime.load(embedded_artifact, threads=1) as loaded:
        yield loaded


@pytest.fixture
def place(embedded_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory in which the embedded model is compiled already."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / demo.FOLDER).symlink_to(embedded_artifact)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script by its name with arguments; returns what it prints."""

    def run_script(name: str, *arguments: str) -> str:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def indented(output: str) -> str:
    """Output as a docstring shows it."""
    return "".join(f"    {line}\n" for line in output.splitlines())


def shown_by(name: str, output: str) -> bool:
    """Whether both the script's docstring and the README show this output."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")), clean=False)
    return indented(output) in str(docstring) and f".py\n{output}```" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


# --- scripts -----------------------------------------------------------------------------------------------------------


def test_describe(run: Run, model: runtime.Model) -> None:
    output = run("describe")
    assert output == model.generate(QUESTION, images=[IMAGE]).text + "\n"
    assert shown_by("describe", output)


def test_describe_takes_an_artifact_an_image_and_a_question(
    run: Run, model: runtime.Model, embedded_artifact: Path, place: Path
) -> None:
    (place / demo.FOLDER).unlink()
    Image.open(IMAGE).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(place / "turned.png")
    question = "Where is the red circle?"
    output = run("describe", "--artifact", str(embedded_artifact), "--image", "turned.png", "--question", question)
    assert output == "At the top left.\n" == model.generate(question, images=["turned.png"]).text + "\n"
    assert not (place / demo.FOLDER).exists()


def test_boxes(run: Run, model: runtime.Model, place: Path) -> None:
    """The frame, and nothing else, is drawn, and it lies around the circle."""
    output = run("boxes")
    (box,) = model.generate(BOX_QUESTION, images=[IMAGE]).boxes
    assert f"box {box.pixels}\n" in output
    assert shown_by("boxes", output)
    before, after = np.asarray(Image.open(IMAGE).convert("RGB")), np.asarray(Image.open(place / "boxes.png"))
    rows, columns = np.nonzero((before != after).any(axis=-1))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == box.pixels
    height, width = before.shape[:2]
    assert 0 <= box.pixels[0] < box.pixels[2] < width and 0 <= box.pixels[1] < box.pixels[3] < height
    rows, columns = np.nonzero((before[..., 0] > 180) & (before[..., 1:] < 80).all(axis=-1))  # what is red
    np.testing.assert_allclose((columns.min(), rows.min(), columns.max(), rows.max()), box.pixels, atol=NEAR)


def test_chat(run: Run, model: runtime.Model) -> None:
    turns = (QUESTION, "How many shapes are there?")
    with model.chat() as chat:
        outs = [chat.send(turn, [IMAGE] if turn is QUESTION else None) for turn in turns]
    output = run("chat", "--turns", *turns)
    lines = output.splitlines()
    assert lines[::3] == [f"> {turn}" for turn in turns]
    assert lines[1::3] == [out.text for out in outs]
    assert outs[1].reused_tokens > outs[0].prompt_tokens  # the image, the question and the answer
    assert lines[5] == f"[{outs[1].prompt_tokens} prompt tokens, {outs[1].reused_tokens} of them in the cache]"
    docstring = (EXAMPLES / "chat.py").read_text(encoding="utf-8")
    assert indented(output) in docstring and output in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_chat_drops_a_turn_that_does_not_fit(run: Run, model: runtime.Model) -> None:
    """The image goes with the next one."""
    too_long = "What is this? " * model.artifact.manifest.cache.context
    output = run("chat", "--turns", too_long, QUESTION)
    assert re.search(r"^\[not sent: the prompt has \d+ text tokens .* but the artifact holds 512; ", output, re.MULTILINE)
    assert model.generate(QUESTION, images=[IMAGE]).text in output.splitlines()


def test_chat_is_typed(run: Run, model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter((QUESTION, ""))
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert run("chat").splitlines()[0] == model.generate(QUESTION, images=[IMAGE]).text


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three images, a text, and half an image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    image = Image.open(IMAGE).convert("RGB")
    for turns, name in enumerate(("a.png", "c.jpg", "e.webp")):
        image.rotate(90 * turns).save(folder / name)
    (folder / "b.txt").write_text("no image")
    (folder / "d.png").write_bytes(IMAGE.read_bytes()[:900])
    return folder


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_folder(run: Run, model: runtime.Model, photos: Path, place: Path, suffix: str) -> None:
    assert run("folder", str(photos), "--out", f"t.{suffix}") == f"wrote t.{suffix}: 3 answers, 2 errors\n"
    with (place / f"t.{suffix}").open(encoding="utf-8", newline="") as file:
        rows: list[Any] = list(csv.DictReader(file)) if suffix == "csv" else [json.loads(line) for line in file]
    assert [row["image"] for row in rows] == ["a.png", "b.txt", "c.jpg", "d.png", "e.webp"]
    for row in rows[::2]:
        assert row["answer"] == model.generate(QUESTION, images=[photos / row["image"]]).text and not row["error"]
    assert len({row["answer"] for row in rows}) == 4  # three different ones, and none
    assert not rows[1]["answer"] and "b.txt is not an image" in rows[1]["error"]
    assert not rows[3]["answer"] and "d.png is damaged or cut short" in rows[3]["error"]


def test_folder_shows_a_bar_and_needs_no_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["folder.py"])
    runpy.run_path(str(EXAMPLES / "folder.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert "1/1" in err and shown_by("folder", out)
    monkeypatch.setattr("sys.argv", ["folder.py", "no such folder"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "folder.py"), run_name="__main__")
    assert "no such folder is not a folder" in capsys.readouterr().err


def test_serve_client(run: Run, model: runtime.Model) -> None:
    """It asks a process, which has ended when the script has."""
    output = run("serve_client")
    serving_line, answer, tokens = output.splitlines()
    out = model.generate(QUESTION, images=[IMAGE])
    assert answer == out.text
    assert tokens == f"{out.prompt_tokens} prompt tokens, {len(out.token_ids)} of the answer"
    address = re.fullmatch(r"serving \S+ at http://(127\.0\.0\.1):(\d+)", serving_line)
    assert address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address[1], int(address[2])))
    known = output.replace(serving_line, "serving demo-artifact at http://127.0.0.1:40321")
    assert shown_by("serve_client", known)


def test_serve_client_without_the_package(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(EXAMPLES / "serve_client.py"))
    body = example["request"]("model", IMAGE, QUESTION)
    with serving(model) as server:
        by_package = example["ask"](server.url, body)
        monkeypatch.setitem(sys.modules, "openai", None)  # as where it is not installed
        by_urllib = example["ask"](server.url, body)
    out = model.generate(QUESTION, images=[IMAGE])
    for answer in (by_package, by_urllib):
        assert answer["choices"][0]["message"]["content"] == out.text
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (78, len(out.token_ids))


def test_serve_client_says_that_the_server_ended(run: Run, place: Path) -> None:
    (place / "empty").mkdir()
    with pytest.raises(SystemExit, match="the server ended with status 1 before it served; its log says why"):
        run("serve_client", "--artifact", "empty")


def test_the_embedded_model_is_compiled_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Buckets(prefill=(32,), decode=(1,), vision=(1,), context=320, slots=1)
    monkeypatch.setitem(demo.BUCKETS, "onnx", small)
    monkeypatch.chdir(tmp_path)
    artifact = demo.embedded_artifact()
    assert artifact == Path("demo-artifact") and "prefill-32" in capsys.readouterr().out
    assert runtime.generate(artifact, "Where is the red circle?", [IMAGE]).text == "At the top right."
    written = (artifact / "manifest.json").stat().st_mtime_ns
    monkeypatch.setitem(demo.BUCKETS, "onnx", Buckets())
    assert demo.embedded_artifact() == artifact and not capsys.readouterr().out
    assert (artifact / "manifest.json").stat().st_mtime_ns == written


# --- notebooks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Executes a notebook by its name, and an expression after its last cell; returns the expression's value."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        (place / name).mkdir()
        monkeypatch.setenv(name, str(place / name))

    def execute(name: str, expression: str) -> Any:
        notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))"))
        # Sockets of this folder, since other tests take ports.
        connection = {"transport": "ipc", "connection_file": str(place / "kernel.json")}
        NotebookClient(notebook, timeout=CELL_S, startup_timeout=CELL_S, config=Config({"KernelManager": connection})).execute()
        return json.loads(notebook.cells[-1].outputs[-1].text)

    return execute


def test_tuning(computed: Callable[[str, str], Any], model: runtime.Model, place: Path) -> None:
    found = computed(
        "tuning",
        "{'lengths': {str(k): v for k, v in workload.every_length.items()}, 'ms': [c.ms for c in covers], 'answers': answers, "
        "'padding': [c.padding for c in covers], 'frontier': [best.cost for best in frontier]}",
    )
    with (place / "tuning-files" / "trace.csv").open(encoding="utf-8") as file:
        requests = list(csv.DictReader(file))
    tokens = [int(r["prompt_tokens"]) + 64 * int(r["images"]) for r in requests]
    assert Counter({int(length): n for length, n in found["lengths"].items()}) == Counter(tokens)
    chosen = yaml.safe_load((place / "tuning-files" / "buckets.yaml").read_text(encoding="utf-8"))
    assert chosen["context"] >= max(t + int(r["generated_tokens"]) for t, r in zip(tokens, requests, strict=True))
    manifest = read_manifest(place / "tuning-files" / "tuned")
    for kind in ("prefill", "decode", "vision"):
        assert chosen[kind] == sorted(graph.bucket for graph in manifest.graphs if graph.kind == kind)
    assert (chosen["context"], chosen["slots"]) == (manifest.cache.context, manifest.cache.slots)
    assert all(0 <= padding < 1 for padding in found["padding"])
    assert found["ms"][0] <= found["ms"][3] * (1 + 1e-9)  # of as many graphs these are the best
    assert found["frontier"] == sorted(found["frontier"], reverse=True)
    assert found["answers"] == [model.generate(QUESTION, images=[IMAGE]).text] * 2


@pytest.mark.slow
def test_comparing(computed: Callable[[str, str], Any], model: runtime.Model) -> None:
    found = computed(
        "comparing",
        "{'texts': texts, 'healthy': healthy.plain(), 'broken': broken.plain(), 'conclusion': conclusion(broken)}",
    )
    for sample in (each for each in built_in_samples() if each.name in found["texts"]):
        out = model.generate(sample.messages[-1].text, list(sample.images), max_new_tokens=64, temperature=0)
        assert found["texts"][sample.name] == [out.text, out.text]
    assert len(found["texts"]) == 3
    assert found["healthy"]["passed"] and found["healthy"]["edges"] and not found["healthy"]["findings"]
    assert 0 < max(each["figures"]["bands"][-1]["relative"] for each in found["healthy"]["samples"]) < 1e-4
    assert not found["broken"]["passed"]
    (finding,) = found["broken"]["findings"]
    assert (finding["stage"], finding["where"]) == ("weights", "text.layers.1.mlp.down.weight")
    assert finding["error"] == pytest.approx(0.1, rel=1e-4)
    readme = " ".join((EXAMPLES / "README.md").read_text(encoding="utf-8").split())
    assert found["conclusion"][2].startswith("fault in candidate's weights") and found["conclusion"][2] in readme


# --- what they are -----------------------------------------------------------------------------------------------------


def code_of(path: Path) -> ast.Module:
    if path.suffix == ".py":
        return ast.parse(path.read_text(encoding="utf-8"))
    cells = nbformat.read(path, as_version=4).cells
    return ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))


def test_there_are_five_scripts_and_two_notebooks() -> None:
    assert (len(SCRIPTS), len(NOTEBOOKS)) == (5, 2)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_show_their_command(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    assert f"\n    python examples/{path.name}\n" in str(ast.get_docstring(code_of(path), clean=False))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    assert max(len(cell.source.splitlines()) for cell in code) <= 24 and len(cells) - len(code) >= len(code) / 2


@pytest.mark.parametrize("path", [*SCRIPTS, *NOTEBOOKS], ids=lambda path: path.name)
def test_examples_use_public_names_alone(path: Path) -> None:
    nodes = list(ast.walk(code_of(path)))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("staticvl")]
    names |= {part for node in imports for part in (*str(node.module).split("."), *(alias.name for alias in node.names))}
    assert imports and not [name for name in names if name.startswith("_") and not name.startswith("__")]
    assert {str(node.module).split(".")[1:2] == ["tools"] or node.module == "staticvl" for node in imports} == {True}


def test_the_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\S+)\]\(\1\)", text, re.MULTILINE)) == {path.name for path in (*SCRIPTS, *NOTEBOOKS)}
    commands = re.findall(r"^(?:\$ )?(?:python|jupyter notebook) (examples/\S+)", text, re.MULTILINE)
    assert {REPO / command for command in commands} == {*SCRIPTS, *NOTEBOOKS}
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", text) if not (EXAMPLES / link).is_file()]

"""The comparison of healthy sides raises no alarm, and the command says what it found."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from staticvl.model_defs.config import ConfigError, decode_config, encode_config, read_config
from staticvl.runtime.artifact import DEFINITION, read_manifest, write_manifest
from staticvl.tools.cli import main
from staticvl.tools.comparing.open_side import open_side
from staticvl.tools.comparing.page import page
from staticvl.tools.comparing.report import conclusion
from staticvl.tools.comparing.result import Scores
from staticvl.tools.comparing.samples import Sample, built_in_samples, user_sample
from staticvl.tools.comparing.samples import image as built_in_image
from staticvl.tools.comparing.thresholds import DEFAULTS
from staticvl.tools.drawings import parse_box

from .ascend import CHECKPOINTS
from .comparisons import check_healthy, compared, compiled, reference_of, samples_of
from .parity import image_files
from .seeded import copied, weight


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("llava", tmp_path_factory.mktemp("llava") / "artifact")


def test_a_healthy_artifact_of_llava_next_raises_no_alarm(tmp_path: Path) -> None:
    artifact = compiled("llava_next", tmp_path / "artifact", candidates=6)
    reference = reference_of("llava_next", artifact)
    check_healthy(reference, artifact, "llava_next")
    reference.close()


def test_transformers_and_an_artifact_agree_on_everything(llava: Path, tmp_path: Path) -> None:
    """Among other things on answers, boxes and how images are cut, which are given as objects and as files."""
    reference = reference_of("llava", llava, by="transformers")
    box = next(each for each in built_in_samples() if each.name == "image, box")
    right = parse_box(box.answer or "")
    assert right is not None
    known = user_sample("known", box.messages[0].text, box.images, expected=box.answer, boxes=(right,))
    files = odd_images(tmp_path)
    names = {sample.name for sample in files}
    result = compared(reference, llava, [*samples_of("llava"), *files, known], new_tokens=20)
    frames = reference.prepare(files[0]).frames
    reference.close()
    assert [(frame.image_width, frame.image_height) for frame in frames] == [(61, 90)], "turned, for its boxes too"
    assert result.passed, (result.broken, result.findings)
    assert names < {sample.name for sample in result.samples}
    scores = result.samples[-1].scores
    assert scores == Scores(reference_exact=True, candidate_exact=True, reference_iou=1.0, candidate_iou=1.0)


def odd_images(folder: Path) -> list[Sample]:
    """Questions about images that each are loaded by a rule of their own, the turned one first."""
    paths = image_files(folder)
    names = (
        "turned.jpg",
        "rgba.png",
        "palette_transparent.png",
        "16-bit.png",
        "1x1.png",
        "7x301.png",
        "cmyk.jpg",
        "palette.png",
    )
    for name in names[3:]:
        paths[name] = folder / name
    Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)).save(paths["16-bit.png"])
    drawing = built_in_image(3)
    drawing.resize((1, 1)).save(paths["1x1.png"])
    drawing.resize((7, 301)).save(paths["7x301.png"])
    return [user_sample(name, "What is this?", (paths[name],)) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "by"), [("llava_next", "transformers"), ("mllama", "transformers"), ("qwen_vl", "eager")])
def test_odd_images_raise_no_alarm(family: str, by: str, tmp_path: Path) -> None:
    artifact = compiled(family, tmp_path / "artifact")
    reference = reference_of(family, artifact, by=by)
    result = compared(reference, artifact, odd_images(tmp_path), with_edges=False)
    reference.close()
    assert result.passed, (result.broken, result.findings)
    assert len(result.samples) == 8


def test_two_artifacts(llava: Path, tmp_path: Path) -> None:
    """One against itself; against one with another weight; and an artifact from before sizes were kept."""
    side = open_side(llava, threads=1)
    assert compared(side, llava, samples_of("llava")[:1]).passed
    other = copied(llava, tmp_path / "other")
    down = weight(other, "text.layers.3.mlp.down.weight")
    down *= 1.5
    down.flush()
    result = compared(side, other, samples_of("llava")[:1], with_edges=False)
    assert [each.where for each in result.findings] == ["text.layers.3.mlp.down.weight"]
    assert "it is 1.5 times the reference's" in result.findings[0].text


def test_other_numbers_of_tokens_are_a_finding(llava: Path) -> None:
    """No sample can be compared then, and none is run."""
    other = open_side(llava, threads=1)
    other.info = msgspec.structs.replace(other.info, vocab_size=704)
    result = compared(open_side(llava, threads=1), other, samples_of("llava")[:1])
    assert (result.passed, [each.where for each in result.findings]) == (False, ["vocab_size"])
    assert not result.samples and "no sample was run: vocab_size differs" in result.notes[-1]
    assert json.loads(json.dumps(result.plain()))["fault"]["where"] == "vocab_size"
    assert "<td" not in page(result) and "vocab_size is 704" in page(result).split("<h2>")[0]


def test_what_has_no_effect_is_called_so(llava: Path, tmp_path: Path) -> None:
    """A token that no prompt has."""
    other = copied(llava, tmp_path / "other")
    table = weight(other, "text.embed.weight")
    table[600] *= 1.001
    table.flush()
    result = compared(open_side(llava, threads=1), other, samples_of("llava")[:1], with_edges=False)
    assert not result.passed and not result.broken
    assert "it differs, without effect at these prompts: every limit of the logits holds" in conclusion(result)


def test_rounding_explains_broken_limits(tmp_path: Path) -> None:
    """A healthy tiny model in 4 bits breaks default limits, and passes; limits that a user sets stay limits."""
    four = compiled("qwen_vl", tmp_path / "four", quant="w4a16")
    reference, rounded = reference_of("qwen_vl", four), "every weight and operator is what the quantisation says"
    result = compared(reference, four, samples_of("qwen_vl")[:1], with_edges=False)
    assert result.passed and result.broken and rounded in conclusion(result)[-1]
    own = {**DEFAULTS, "w4a16": dataclasses.replace(DEFAULTS["w4a16"], kl=1e-4)}
    result = compared(reference, four, samples_of("qwen_vl")[:1], with_edges=False, limits=own)
    assert not result.passed and not result.findings and rounded in conclusion(result)[-1]
    own["w8a16"] = dataclasses.replace(DEFAULTS["w8a16"], relative=1e-6)
    result = compared(reference, four, samples_of("qwen_vl")[:1], with_edges=False, limits=own, inspect="never")
    reference.close()
    assert not result.passed and not result.rounding, "its kernels round activations by more than that"


def test_what_stops_a_stage_is_a_finding(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("cannot reshape array of size 512 into shape (32,32)")

    side, candidate = open_side(llava, threads=1), open_side(llava, threads=1)
    monkeypatch.setattr(candidate, "run_forced", fails)
    result = compared(side, candidate, samples_of("llava")[:1])
    assert result.first is not None and (result.first.where, result.passed) == ("samples", False)
    assert "cannot reshape array of size 512" in result.first.text


def test_artifacts_of_other_buckets(llava: Path, tmp_path: Path) -> None:
    """Graphs of both are looked into, each side by its own buckets; they differ by less than matters."""
    few = copied(llava, tmp_path / "few")
    norm = weight(few, "text.norm.weight")
    norm *= 1 + 5e-7
    norm.flush()
    manifest = read_manifest(few)
    graphs = tuple(graph for graph in manifest.graphs if (graph.kind, graph.bucket) != ("prefill", 8))
    write_manifest(few, msgspec.structs.replace(manifest, graphs=graphs))
    result = compared(open_side(few, threads=1), llava, samples_of("llava")[:1], inspect="always")
    assert result.passed, (result.broken, result.findings)
    assert "prefill-8" in {edge.graph for edge in result.edges}


def test_an_artifact_without_sizes_is_compared_as_far_as_it_goes(llava: Path, tmp_path: Path) -> None:
    old = copied(llava, tmp_path / "old")
    manifest = read_manifest(old)
    (old / manifest.tokenizer / DEFINITION).unlink()
    files = {name: spec for name, spec in manifest.files.items() if not name.endswith(DEFINITION)}
    write_manifest(old, msgspec.structs.replace(manifest, files=files))
    side = open_side(old, threads=1)
    assert side.config is None
    result = compared(side, open_side(old, threads=1), samples_of("llava")[:1], with_edges=False)
    assert result.passed and result.samples[0].figures.relative == 0


# --- sizes of the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_sizes_are_kept_as_they_are(family: str) -> None:
    config = read_config(CHECKPOINTS[family])
    assert decode_config(encode_config(config), "x") == config
    assert decode_config(encode_config(config.of_stage(1, 2)), "x") == config


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'{"family": "llava", "text": {}, "vision": {}}'])
def test_damaged_sizes(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"place is damaged .*compile the checkpoint again"):
        decode_config(data, "place")


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text('{"prompt": "Name three colours.", "answer": "Red and blue."}\n')
    yield path


def test_the_command_passes(llava: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.html"
    arguments = ["compare", str(CHECKPOINTS["llava"]), str(llava), "--reference-by", "eager", "--data", str(data)]
    assert main([*arguments, "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"passed: 1 samples and \d+ edge cases within the limits", out) and f"wrote {report}" in out
    text = report.read_text()
    assert text.count("<svg") == 3 and "prefill-32" in text
    assert "http" not in text.replace("http://www.w3.org", "").split("<svg")[0]
    assert re.search(r"made on \d{4}-\d\d-\d\d, .* cores, .*torch 2\.", text) and text.count("<table>") == 2
    assert main([*arguments, "--report", str(tmp_path / "again.html")]) == 0
    made = r"made on \S+"
    assert re.sub(made, "", (tmp_path / "again.html").read_text()) == re.sub(made, "", text), "the same for the same input"
    capsys.readouterr()


def test_the_command_fails_and_names_the_fault(
    llava: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copied(llava, tmp_path / "broken")
    values = weight(broken, "text.norm.weight")
    values *= 0.5
    values.flush()
    arguments = ["compare", str(llava), str(broken), "--data", str(data), "--no-edges"]
    assert main([*arguments, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is False and printed["fault"]["where"] == "text.norm.weight"
    assert printed["samples"][0]["tokens"] and printed["limits"] == dataclasses.asdict(DEFAULTS["float32"])
    limits = tmp_path / "limits.yaml"
    limits.write_text("float32: {relative: 10, kl: 10, agreement: 0, perplexity: 10}\n")
    assert main([*arguments, "--thresholds", str(limits)]) == 1, "a wrong tensor is a fault whatever the logits say"
    limits.write_text("float32: {relative: 10, kl: 10, agreement: 0, perplexity: 10, weights: 1}\n")
    assert main([*arguments, "--thresholds", str(limits)]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["nowhere"], "nowhere is not a folder; expected a checkpoint or an artifact"),
        (["EMPTY"], "holds neither manifest.json nor config.json"),
        (["--data", "DATA", "--samples", "0"], "--samples is 0; expected at least 1"),
        (["--image-folder", "x"], "--image-folder is for the images of --data"),
        (["--candidate-by", "eager"], "is an artifact, which runs its own graphs; leave out the choice of eager"),
        (["--report", "EMPTY"], "is a folder; expected a file to write"),
        (["--device", "sim"], "device 'sim' cannot run"),
        (["--reference-device", "npu", "--reference-by", "eager"], "is a checkpoint, which runs on the CPU"),
        (["OTHER"], "are of the families llava and qwen_vl; compare two sides of one model"),
        (["--data", "LONG"], "long.jsonl|line 1: the prompt has .* text tokens"),
    ],
)
def test_bad_input_is_one_sentence(
    llava: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "colour " * 400, "answer": "x"}) + "\n")
    places = {"EMPTY": tmp_path / "empty", "DATA": data, "LONG": tmp_path / "long.jsonl"}
    if change == ["OTHER"]:
        sides = [str(llava), str(CHECKPOINTS["qwen_vl"])]
    elif not change[0].startswith("--"):
        sides = [str(CHECKPOINTS["llava"]), str(places.get(change[0], change[0]))]
    else:
        sides = [str(CHECKPOINTS["llava"]), str(llava)]
    options = [str(places.get(each, each)) for each in change] if change[0].startswith("--") else []
    by = [] if "--reference-by" in options or change == ["OTHER"] else ["--reference-by", "eager"]
    assert main(["compare", *sides, *by, *options]) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(said, error) and error.startswith("staticvl: ") and "\n" not in error
    assert main(["compare", *sides, *by, *options, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False

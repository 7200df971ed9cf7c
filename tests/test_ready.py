"""What a command needs in the end is looked for before it begins: devices, packages, folders to write to."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from staticvl.compiler import build as building
from staticvl.runtime.artifact import ArtifactError, AscendInfo, read_manifest, write_manifest
from staticvl.runtime.backends.ascend import readiness, torchair_host
from staticvl.runtime.backends.ascend.readiness import check_ready
from staticvl.tools import compare, demo, generate, tune_buckets
from staticvl.tools.cli import main

from .conftest import EMBEDDED
from .test_cli import error


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this is the long work that must not begin")


@pytest.fixture
def without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on this machine, whatever it is."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch_npu that sees one card."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("class npu:\n    device_count = staticmethod(lambda: 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def ascend_artifact(embedded_artifact: Path, tmp_path: Path) -> Path:
    """The manifest of an Ascend artifact; it is never opened further."""
    manifest = read_manifest(embedded_artifact)
    info = AscendInfo(python="3.11", torch="2", torch_npu="2", cache_format="1", soc="Ascend910B")
    (tmp_path / "npu").mkdir()
    shutil.copytree(embedded_artifact, tmp_path / "npu", dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    write_manifest(tmp_path / "npu", msgspec.structs.replace(manifest, backend="ascend", ascend=info))
    return tmp_path / "npu"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("npu", "device npu needs torch_npu, which is not installed: pip install torch_npu=="),
        ("npu:3", "device npu:3 needs torch_npu, which is not installed"),
        ("npu:x", "device 'npu:x' is unknown; expected npu, or npu:1 for the second card"),
        ("cuda", "device 'cuda' is unknown; expected one of cpu, npu, sim"),
    ],
)
def test_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, without_torch_npu: None, device: str, message: str
) -> None:
    monkeypatch.setattr(demo, "build", never)
    assert message in error(capsys, "demo", "--device", device)


def test_cards_are_counted_elsewhere(cards: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own: one that has imported torch_npu compiles nothing."""
    check_ready("npu")
    check_ready("npu:0")
    with pytest.raises(ArtifactError, match="device npu:1 was requested, but torch_npu sees 1 Ascend cards"):
        check_ready("npu:1")
    assert "torch_npu" not in sys.modules
    (tmp_path / "torch_npu" / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open')\n")
    with pytest.raises(ArtifactError, match=r"cannot be imported here \(ImportError: libhccl\.so: cannot open\)"):
        check_ready("npu")


def test_the_simulator_needs_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(torchair_host.VARIABLE, str(tmp_path))
    with pytest.raises(ArtifactError, match=r"torchair is not in .*; run `make ascend-sim`"):
        check_ready("sim")


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "bench"])
def test_commands_that_load(
    capsys: pytest.CaptureFixture[str], without_torch_npu: None, ascend_artifact: Path, command: str
) -> None:
    """No weights are read, no port is left open, no rank is started."""
    args = {"generate": ["--prompt", "x"], "serve": ["--port", "0"]}.get(command, [])
    status = main([command, str(ascend_artifact), "--device", "npu", *args])
    assert (status, "device npu needs torch_npu, which is not installed" in capsys.readouterr().err) == (1, True)


def test_ranks_are_not_started_for_a_device_that_cannot_run(
    capsys: pytest.CaptureFixture[str], two_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("staticvl.runtime.loading.spawn", never)
    assert "device 'npu' cannot run" in error(capsys, "generate", two_ranks, "--prompt", "x", "--device", "npu")


def test_compare(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    without_torch_npu: None,
    embedded_artifact: Path,
    ascend_artifact: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(compare, "open_side", never)
    pair = ("compare", EMBEDDED, ascend_artifact)
    assert "device npu needs torch_npu" in error(capsys, *pair, "--device", "npu")
    assert "device 'cpu' cannot run" in error(capsys, *pair, "--device", "cpu")
    assert "nowhere is not a folder; make it" in error(
        capsys, "compare", EMBEDDED, embedded_artifact, "--report", tmp_path / "nowhere" / "x.html"
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = error(capsys, "compare", EMBEDDED, embedded_artifact, "--report", tmp_path / "x.html")
    assert "needs the package matplotlib; pip install 'staticvl[tune]'" in report
    monkeypatch.setitem(sys.modules, "transformers", None)
    by = error(capsys, "compare", EMBEDDED, embedded_artifact, "--reference-by", "transformers")
    assert "needs the package transformers" in by


def test_tune_buckets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(tune_buckets, "choose", never)
    given = ("--prompts", "20-40", "--generated", "9", "--rate", "1", "--out", tmp_path / "b.yaml")
    assert "needs the package matplotlib" in error(capsys, "tune-buckets", *given, "--report", tmp_path / "r.html")


def test_generate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, embedded_artifact: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(generate.runtime, "load", never)
    ask = ("generate", embedded_artifact, "--prompt", "x")
    assert "--draw was given without --image" in error(capsys, *ask, "--draw", tmp_path / "x.png")
    assert "cannot be written" in error(capsys, *ask, "--image", "a.png", "--draw", tmp_path / "nowhere" / "x.png")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "needs the package llguidance; pip install 'staticvl[constrain]'" in error(capsys, *ask, "--regex", "a")


@pytest.mark.parametrize("what", ["compiler", "weights"])
def test_compile(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    """A compiler that is missing, and weights that do not fit, are known before the checkpoint's files are read whole."""
    monkeypatch.setattr(building, "fingerprint", never)
    folder = tmp_path / "checkpoint"
    shutil.copytree(EMBEDDED, folder)
    if what == "compiler":
        monkeypatch.setenv(torchair_host.VARIABLE, str(tmp_path))
        message = "torchair is not in"
    else:
        data = json.loads((folder / "config.json").read_text())
        data["text_config"]["num_hidden_layers"] += 1
        (folder / "config.json").write_text(json.dumps(data))
        message = "the checkpoint lacks language_model"
    backend = "ascend" if what == "compiler" else "onnx"
    assert message in error(capsys, "compile", folder, "--out", tmp_path / "a", "--backend", backend)


def test_what_is_missing_is_worded_once(without_torch_npu: None) -> None:
    with pytest.raises(ArtifactError) as caught:
        check_ready("npu")
    assert str(caught.value) == readiness.missing("npu")

"""The acceptance command for owners of a card: what it runs, what it needs, and how it says what is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from staticvl.runtime.artifact import ArtifactError, AscendInfo, read_manifest, write_manifest
from staticvl.tools import ascend_acceptance as acceptance
from staticvl.tools.operator_tests.outcome import DIFFERS, PASSED, CaseInfo, Outcome
from staticvl.tools.operator_tests.process import OperatorTestError
from staticvl.tools.operator_tests.tolerances import GRAPH, OPERATOR, in_words

from .conftest import REPO

INFO = CaseInfo("a product", {"rows": 1}, ("MatMul",), (), ("decode",))
GOOD, BAD = Outcome(INFO, PASSED, 1e-2, 1e-4, "out"), Outcome(INFO, DIFFERS, 1e-2, 0.7, "out")
ANSWER = {"text": "red", "token_ids": [1, 2], "ttft_ms": 3.0, "tpot_ms": 1.0}


@pytest.fixture
def artifact(embedded_artifact: Path, tmp_path: Path) -> Path:
    """The manifest of an Ascend artifact, whose graphs are never opened."""
    folder = tmp_path / "npu"
    shutil.copytree(embedded_artifact, folder, ignore=shutil.ignore_patterns(".*"))
    info = AscendInfo(python="3.11", torch="2", torch_npu="2", cache_format="1", soc="Ascend910B")
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), backend="ascend", ascend=info))
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices are there; operator tests pass, and so do graphs. What ran, in order."""
    done: list[str] = []

    def operators(_artifact: Path, device: str) -> list[Outcome]:
        done.append(f"operators on {device}")
        return [GOOD]

    def graphs(_args: Any, device: str, out: Path) -> tuple[Path, dict[str, Any]]:
        done.append(f"graphs on {device}")
        np.savez(out, **{"decode-1/0": np.array([[1.0, 2.0 + 0.05 * (device != "sim")]])})
        return out, ANSWER

    monkeypatch.setattr(acceptance, "check_ready", lambda _device: None)
    monkeypatch.setattr(acceptance, "run_operator_tests", operators)
    monkeypatch.setattr(acceptance, "_run", graphs)
    return done


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    status = acceptance.main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_operators_come_first(artifact: Path, calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, data = report(capsys, artifact, "--tolerance", "0.1")
    assert (status, data["failed"], calls) == (0, [], ["operators on npu:0", "graphs on sim", "graphs on npu:0"])
    assert data["operators"][0]["case"] == "a product" and data["graphs"][0]["graph"] == "decode-1"
    assert data["graphs"][0]["distance"] == pytest.approx(0.05 / 5**0.5)
    assert acceptance.main([str(artifact), "--tolerance", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 operator tests passed" in shown and "decode-1" in shown and "3.0 ms" in shown


def test_operators_only(
    artifact: Path, calls: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, data = report(capsys, artifact, "--operators-only", "--device", "npu:1")
    assert (status, calls, "graphs" in data) == (0, ["operators on npu:1"], False)
    monkeypatch.setattr(acceptance, "run_operator_tests", lambda *_: [GOOD, BAD])
    status, data = report(capsys, artifact, "--operators-only")
    assert (status, data["failed"]) == (1, ["a product"])
    assert [row["status"] for row in data["operators"]] == ["passed", "differs"]


def test_an_operator_that_differs_fails_though_graphs_agree(
    artifact: Path, calls: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "run_operator_tests", lambda *_: [BAD])
    assert report(capsys, artifact, "--tolerance", "0.1")[0] == 1
    assert calls == ["graphs on sim", "graphs on npu:0"]  # they run all the same


@pytest.mark.parametrize(("dtype", "status"), [("float16", 1), ("bfloat16", 0)])
def test_the_tolerance_is_that_of_the_dtype(
    artifact: Path,
    calls: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    status: int,
) -> None:
    """The graph is 0.022 away."""
    manifest = read_manifest(artifact)
    cache = msgspec.structs.replace(manifest.cache, dtype=dtype)
    opened = SimpleNamespace(manifest=msgspec.structs.replace(manifest, cache=cache))
    monkeypatch.setattr(acceptance, "open_artifact", lambda _folder: opened)
    assert report(capsys, artifact)[0] == status
    assert report(capsys, artifact, "--tolerance", "0.03")[0] == 0
    assert report(capsys, artifact, "--tolerance", "0.02")[0] == 1


def test_tolerances_are_stated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        acceptance.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    text = (REPO / "docs" / "ascend.md").read_text(encoding="utf-8")
    for dtype in ("float32", "float16", "bfloat16"):
        assert f"{GRAPH[dtype]:g} in {dtype}" in shown
        assert f"| {dtype} | {OPERATOR[dtype]:g} | {GRAPH[dtype]:g} |" in text
    assert in_words({"float16": 0.02, "bfloat16": 0.1}) == "0.02 in float16, 0.1 in bfloat16"


# ---- what is missing


@pytest.mark.parametrize("more", [[], ["--operators-only"]])
def test_without_torch_npu(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """One sentence: what is missing, what to install, and the other way."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    ready = acceptance.check_ready
    monkeypatch.setattr(acceptance, "check_ready", lambda device: None if device == "sim" else ready(device))
    assert acceptance.main([str(artifact), *more]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert "device npu:0 needs torch_npu, which is not installed: pip install torch_npu==" in shown.err
    assert shown.err.rstrip().endswith("; without a card, --device sim runs the same tests on the simulator")


def test_errors_are_one_line(
    artifact: Path, calls: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OperatorTestError("device 'npu:0' could not be opened; see the lines above")

    monkeypatch.setattr(acceptance, "run_operator_tests", fail)
    assert acceptance.main([str(artifact)]) == 1
    assert capsys.readouterr().err == "staticvl: device 'npu:0' could not be opened; see the lines above\n"

    def damaged(*_: Any, **__: Any) -> Any:
        raise ArtifactError("weights.bin is not the file that the manifest describes")

    monkeypatch.setattr("staticvl.runtime.load", damaged)
    assert acceptance.main([str(artifact), "--device", "sim", "--child", "out.npz"]) == 1
    assert capsys.readouterr().err.startswith("staticvl: weights.bin is not the file")


def test_other_artifacts_are_refused(embedded_artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert acceptance.main([str(embedded_artifact)]) == 1
    assert "was compiled for onnx, and cards are Ascend's; compile it with --backend ascend" in capsys.readouterr().err
    assert acceptance.main([str(tmp_path / "none")]) == 1
    assert "is not a folder" in capsys.readouterr().err

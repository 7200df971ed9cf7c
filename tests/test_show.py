"""`staticvl show`: text and JSON come from the same records, and docs/usage.md has every key."""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

import staticvl
from staticvl.runtime.artifact import KINDS, Manifest, read_manifest, write_manifest
from staticvl.tools import machine as machine_module
from staticvl.tools.artifact_facts import ArtifactFacts, Facts, facts
from staticvl.tools.cli import main
from staticvl.tools.machine import machine, versions

from .artifact_docs import items
from .conftest import REPO

USAGE = (REPO / "docs" / "usage.md").read_text(encoding="utf-8")
PARTS = {"artifact": "ArtifactFacts", "model": "ModelFacts", "graphs": "GraphFacts", "at_best": "CardBound"}
PARTS |= {"launches": "Launches", "communication": "RankTraffic", "capacity": "Capacity", "slots": "Held", "pages": "Held"}


def shown(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert main(["show", *map(str, args)]) == 0
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    return json.loads(shown(capsys, *args, "--json"))


def plain(record: Any) -> Any:
    return json.loads(msgspec.json.encode(record))


# ---- what it says


def test_a_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    made = document(capsys)
    assert made["artifact"] is None
    assert made["machine"] == machine()
    assert made["machine"]["system"] == platform.platform()
    assert (made["versions"]["staticvl"], made["versions"]["python"]) == (staticvl.__version__, platform.python_version())
    text = " ".join(shown(capsys).split())
    assert f"staticvl {staticvl.__version__}" in text and made["machine"]["processor"] in text


def test_packages_that_are_not_there_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy<3,>=1.26", "no-such-package>=1", 'torch==2.13.0; extra == "compile"', 'pytest<10,>=8; extra == "test"']
    monkeypatch.setattr(machine_module, "requires", lambda name: lines)
    made = versions()
    assert set(made) == {"python", "staticvl", "numpy", "no-such-package", "torch"}
    assert made["no-such-package"] is None and made["numpy"]


def test_the_manifest_in_the_document(capsys: pytest.CaptureFixture[str], embedded_artifact: Path) -> None:
    manifest, made = read_manifest(embedded_artifact), document(capsys, embedded_artifact)["artifact"]
    assert made["name"] == embedded_artifact.name
    for name in ("digest", "schema_version", "backend", "quant", "tp", "pp"):
        assert made[name] == getattr(manifest, name)
    for name in ("cache", "build", "ascend"):
        assert made[name] == plain(getattr(manifest, name))
    assert made["model"]["image"] == plain(manifest.model.image)
    files = [spec.nbytes for name, spec in manifest.files.items() if name.startswith("weights/")]
    assert 0 < made["weight_nbytes"] <= sum(files)
    assert (made["weight_tensors"], made["signature"], made["holds_code"]) == (len(manifest.weights), "none", False)
    assert made["communication"] == []


def test_graphs_and_their_certificates(capsys: pytest.CaptureFixture[str], embedded_artifact: Path) -> None:
    manifest, made = read_manifest(embedded_artifact), document(capsys, embedded_artifact)["artifact"]
    by_name = {graph["name"]: graph for graph in made["graphs"]}
    assert set(by_name) == {graph.name for graph in manifest.graphs}
    for graph in manifest.graphs:
        assert graph.certificate
        told = by_name[graph.name]
        errors = [case.error for case in graph.certificate.cases]
        assert (told["checks"], told["worst_error"], told["kind"]) == (len(errors), max(errors), graph.kind)
        least = 1e3 * max(graph.flops / 350e12, graph.nbytes / 1.6e12)  # of a 910B
        assert told["at_best"]["ms"] == pytest.approx(least)
        assert (told["at_best"]["tokens_per_s"] is None) == (graph.kind == "vision")
    other = document(capsys, embedded_artifact, "--card", "310P")["artifact"]
    assert other["card"] != made["card"]
    assert other["graphs"][0]["at_best"]["ms"] > made["graphs"][0]["at_best"]["ms"]


def test_graphs_without_certificates_and_forbidden_tokens(embedded_artifact: Path, tmp_path: Path) -> None:
    """Lists of tokens may have thousands: the document says how many."""
    manifest = read_manifest(embedded_artifact)
    graphs = tuple(msgspec.structs.replace(graph, certificate=None) for graph in manifest.graphs)
    sampling = msgspec.structs.replace(manifest.model.sampling, suppress_tokens=(3, 4), min_p=0.1)
    model = msgspec.structs.replace(manifest.model, sampling=sampling)
    made = _facts_of(msgspec.structs.replace(manifest, graphs=graphs, model=model), embedded_artifact, tmp_path)
    assert {(g.checks, g.worst_error, g.tolerance, g.rounding) for g in made.graphs} == {(None,) * 4}
    assert made.model.forbidden == {"suppress_tokens": 2}
    encoded = msgspec.to_builtins(made.model.sampling)
    assert "suppress_tokens" not in encoded and encoded["min_p"] == 0.1


def _facts_of(manifest: Manifest, artifact: Path, folder: Path) -> ArtifactFacts:
    copy = shutil.copytree(artifact, folder / "copy")
    write_manifest(copy, manifest)
    made = facts(copy, "910B").artifact
    assert made
    return made


def test_ranks(capsys: pytest.CaptureFixture[str], two_ranks: Path) -> None:
    manifest, made = read_manifest(two_ranks), document(capsys, two_ranks)["artifact"]
    told = {each["graph"]: each for each in made["communication"]}
    assert set(told) == {graph.name for graph in manifest.graphs}
    for graph in manifest.graphs:
        assert told[graph.name]["nbytes"] == graph.collective_bytes
        assert told[graph.name]["collectives"] == graph.collectives
    assert "on each rank" in shown(capsys, two_ranks)


def test_text_and_document_agree(
    capsys: pytest.CaptureFixture[str], embedded_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    made, text = document(capsys, embedded_artifact)["artifact"], shown(capsys, embedded_artifact)
    assert made["digest"][:16] in text and made["card"] in text
    for graph in made["graphs"]:
        assert f"{graph['worst_error']:.1e}" in text
        assert re.search(rf"{graph['name']}\b.*{graph['at_best']['ms']:.3g}", text)
    assert {graph["kind"] for graph in made["graphs"]} <= set(KINDS)
    for name, version in document(capsys)["versions"].items():
        assert version is None or f"{name} {version}" in text


def test_what_is_no_artifact_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["show", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "holds no manifest.json" in err


# ---- docs/usage.md


def rows() -> dict[str, set[str]]:
    """Key -> its fields, of the list of the document."""
    described = (each.split(": ", 1) for each in items(USAGE.split("has these keys:")[1].split("\n## ")[0].splitlines()))
    return {key.strip("`"): set(re.findall(r"`(\w+)`", fields)) for key, fields in described}


def records(name: str = "Facts", path: str = "(whole)") -> Iterator[tuple[str, set[str]]]:
    """Path and fields of every record of ours, by the JSON schema."""
    definitions = msgspec.json.schema(Facts)["$defs"]
    fields = definitions[name]["properties"]
    yield path, set(fields)
    for field, schema in fields.items():
        if part := PARTS.get(field):
            own = f"{field}[]" if schema.get("type") == "array" else field
            yield from records(part, own if path == "(whole)" else f"{path}.{own}")


def test_every_key_is_described(embedded_artifact: Path) -> None:
    table = rows()
    described = {path: fields - _values(path) for path, fields in table.items()}
    assert {path: described.get(path) for path, _ in records()} == dict(records())
    assert set(table) == {path for path, _ in records()} | {"versions", "machine"}
    assert described["machine"] == set(machine())
    assert {"python", "staticvl"} <= set(versions())


def _values(path: str) -> set[str]:
    """Words in backticks that are no fields."""
    return {"artifact": {"none", "stale", "present"}, "artifact.graphs[].at_best": {"card"}}.get(path, set())


def test_every_record_is_among_those_that_are_described() -> None:
    """A part that is not in PARTS would be left out of the test above."""
    module = sys.modules[Facts.__module__]
    ours = {each.__name__ for each in vars(module).values() if is_dataclass(each) and each.__module__ == module.__name__}
    elsewhere = {"CardBound", "Launches", "Capacity", "Held"}  # tools/forecast.py, tools/capacity.py
    assert ours | elsewhere == {"Facts", *PARTS.values()}

"""A build's keys depend on every source file that can run while graphs, weights and calibrations are made."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from staticvl.compiler import fingerprint, source_files
from staticvl.compiler.build import build
from staticvl.compiler.make import GraphMaker
from staticvl.compiler.plan import Buckets, Options
from staticvl.compiler.source_files import reachable
from staticvl.weights import convert as convert_module

from .checkpoints import tiny_llava
from .conftest import REPO
from .need_torchair import skip_without_torchair

BUCKETS = Buckets(prefill=(8,), decode=(1,), vision=(1,), context=32, slots=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("sources") / "checkpoint").folder


@contextmanager
def watched(found: set[str]) -> Iterator[None]:
    """Notes the files of ours whose functions are called, in every thread."""

    def look(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            found.add(frame.f_code.co_filename)

    sys.setprofile(look)
    threading.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def ours(files: set[str]) -> set[str]:
    inside = {Path(file) for file in files if file.startswith(f"{REPO}/")}
    names = {str(file.relative_to(REPO)) for file in inside}
    return {name for name in names if not name.startswith(("tests/", "tools/", ".venv/", "build/", "."))}


def watching(function: Callable[..., Any], found: set[str]) -> Callable[..., Any]:
    def watched_call(*args: Any, **kwargs: Any) -> Any:
        with watched(found):
            return function(*args, **kwargs)

    return watched_call


CASES = {
    "onnx, stages and ranks": ({"tp": 2, "pp": 2}, "onnx"),
    "onnx, quantised and tuned": ({"quant": "w8a8", "tune": True}, "onnx"),
    "ascend": ({"backend": "ascend", "eager": ("decode",)}, "ascend"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_file_that_makes_a_graph_is_in_its_key(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    settings, backend = CASES[case]
    if backend == "ascend":
        skip_without_torchair()
    found: set[str] = set()
    for name in ("__init__", "make"):
        monkeypatch.setattr(GraphMaker, name, watching(getattr(GraphMaker, name), found))
    build(Options(checkpoint=checkpoint, out=tmp_path / "artifact", buckets=BUCKETS, **settings))
    run = ours(found)
    assert "compiler/make.py" in run
    assert not run - set(reachable(("compiler.make",), fingerprint.OTHER_BACKENDS[backend]))


def test_every_file_that_makes_a_weight_is_in_its_key(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[str] = set()
    monkeypatch.setattr(convert_module, "convert", watching(convert_module.convert, found))
    build(Options(checkpoint=checkpoint, out=tmp_path / "artifact", buckets=BUCKETS, quant="w4a16", tp=2))
    run = ours(found) - {"compiler/build.py", "compiler/progress.py"}  # they report and keep what was made
    assert "weights/convert.py" in run
    assert not run - set(reachable(("weights.convert",)))


def test_every_data_file_of_the_product_is_in_the_key_of_ascend_graphs() -> None:
    """Whatever is no Python file was made to be read by a module; today these are the dtypes of a card's operators."""
    folders = ("compiler", "model_defs", "runtime", "weights")
    found = {path for folder in folders for path in (REPO / folder).rglob("*") if path.is_file()}
    data = {str(path.relative_to(REPO)) for path in found if path.suffix not in (".py", ".pyc")}
    assert data == {"runtime/backends/ge_simulator/card_rules/registry_910b.json"}
    assert data <= set(reachable(("compiler.make",), fingerprint.OTHER_BACKENDS["ascend"]))
    assert not data & set(reachable(("compiler.make",), fingerprint.OTHER_BACKENDS["onnx"]))


CHANGED = ["compiler/pipeline.py", "runtime/artifact.py", "runtime/backends/ge_simulator/card_rules/registry_910b.json"]


@pytest.mark.parametrize("module", [*CHANGED, "compiler/plan.py", "runtime/rope.py"])
def test_a_change_of_code_changes_the_key(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_files.code_digests("compiler.make")
    original = source_files._digest
    monkeypatch.setattr(
        source_files, "_digest", lambda file: "changed" if file == source_files.ROOT / module else original(file)
    )
    after = source_files.code_digests("compiler.make")
    assert {name for name in before if before[name] != after[name]} == {module}


def test_a_change_of_code_makes_graphs_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(checkpoint=checkpoint, out=tmp_path / "artifact", buckets=BUCKETS)
    assert len(build(options).traced) == 3
    assert build(options).traced == ()
    monkeypatch.setattr(
        fingerprint, "code_digests", lambda *modules, without=(): {"compiler/pipeline.py": "changed", **dict.fromkeys(modules)}
    )
    assert len(build(options).traced) == 3


def test_imports_are_followed_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "ROOT", tmp_path)
    files = {
        "a/__init__.py": "",
        "a/start.py": "from . import sibling\nfrom ..b.lazy import x\nfrom staticvl.c import name\nimport os\n",
        "a/sibling.py": "def f():\n    from ..b import deep\n",
        "b/__init__.py": "from . import unused\n",
        "b/lazy.py": "TABLE = 'table.json'\nif TYPE_CHECKING:\n    from .typed import T\nelse:\n    from .other import T\n",
        "b/deep.py": "from ..d.kept import y\nfrom ..d.out import z\n",
        "b/typed.py": "",
        "b/other.py": "",
        "b/unused.py": "",
        "c/__init__.py": "from .inner import name\n",
        "c/inner.py": "name = 1\n",
        "d/__init__.py": "",
        "d/kept.py": "",
        "d/out.py": "from . import kept\n",
        "b/table.json": "{}",
        "b/unnamed.json": "{}",
        "a/table.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    source_files.reachable.cache_clear()
    source_files._imports.cache_clear()
    source_files._data.cache_clear()
    try:
        expected = ["a/sibling.py", "a/start.py", "b/deep.py", "b/lazy.py", "b/other.py", "b/table.json"]
        expected += ["c/__init__.py", "c/inner.py"]
        assert list(reachable(("a.start",), ("d",))) == expected
        with pytest.raises(ValueError, match=r"no module a\.gone"):
            reachable(("a.gone",))
    finally:
        source_files.reachable.cache_clear()
        source_files._imports.cache_clear()

"""An installed wheel has all that it imports or starts, and nothing that only makes or tests things."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import REPO

FOLDERS = {"compiler", "model_defs", "runtime", "tools", "weights"}
CHECKOUT_ONLY = "tools/development"
NAMED_MODULE = re.compile(rf"staticvl\.(?:{'|'.join(FOLDERS)})(?:\.\w+)*")  # as `python -m` takes it


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel as they are before they are zipped: what site-packages has after an installation."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder / "build", "--build-lib", folder / "lib"]
    done = subprocess.run([str(part) for part in command], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def run(installed: Path, *arguments: str | Path) -> str:
    """What a command of the installed package prints; without .pth files, so that the checkout cannot be found."""
    packages = [folder for folder in sys.path if Path(folder).name == "site-packages"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *packages])}
    command = [sys.executable, "-S", "-m", "staticvl.tools.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(installed: Path) -> dict[str, Path]:
    """Dotted name -> file, packages included."""
    names = {path.relative_to(installed).with_suffix(""): path for path in sorted(installed.rglob("*.py"))}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in names.items()}


def imported(name: str, path: Path) -> Iterator[str]:
    """Every module that a file imports, lazily or not; `from . import x` counts as `.x`, be it a module or not."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1])
            yield from [f"{base}.{node.module}"] if node.module else (f"{base}.{alias.name}" for alias in node.names)


def defined(path: Path) -> set[str]:
    """Names that a package's __init__ binds."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_everything_but_what_a_checkout_needs(installed: Path) -> None:
    """A folder without __init__.py would be left out in silence."""
    top = {path.name for path in installed.iterdir()}
    assert top == {"staticvl"}
    assert {path.name for path in (installed / "staticvl").iterdir()} == FOLDERS
    here = {path.relative_to(REPO) for folder in FOLDERS for path in (REPO / folder).rglob("*.py")}
    there = {path.relative_to(installed / "staticvl") for path in installed.rglob("*.py")}
    left_out = here - there
    assert there <= here and left_out
    assert all(path.is_relative_to(CHECKOUT_ONLY) for path in left_out), left_out
    assert not any(path.is_relative_to(CHECKOUT_ONLY) for path in there)


def test_what_is_no_module(installed: Path) -> None:
    """Models and drawings of the demo, and the server's page."""
    kept = {path.relative_to(REPO / "tools") for path in (REPO / "tools" / "assets").rglob("*") if path.is_file()}
    assert any(path.name == "model.safetensors" for path in kept)
    others = (path for path in installed.rglob("*") if path.is_file() and path.suffix != ".py")
    assert {path.relative_to(installed / "staticvl" / "tools") for path in others} == {*kept, Path("serving/page.html")}


def test_imports_stay_inside(installed: Path) -> None:
    """Imports inside functions, and those for type checkers alone, count too."""
    known = modules(installed)
    outside = {path.stem for path in REPO.iterdir() if path.suffix == ".py" or path.is_dir()}
    seen = 0
    for name, path in known.items():
        for module in imported(name, path):
            package, _, last = module.rpartition(".")
            inside = module in known or (package in known and last in defined(known[package]))
            ours = module.startswith("staticvl.")
            seen += ours
            assert inside if ours else module.split(".")[0] not in outside, (
                f"{name} imports {module}, which is not in the wheel"
            )
    assert seen > len(known)


def test_modules_that_are_started_are_inside(installed: Path) -> None:
    """Other processes are started by a module's name, which no import shows."""
    known = modules(installed)
    named = {
        node.value
        for path in known.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED_MODULE.fullmatch(node.value)
    }
    assert "staticvl.runtime.backends.distributed" in named
    assert named <= known.keys(), f"not in the wheel: {sorted(named - known.keys())}"


def test_help_and_demo(installed: Path) -> None:
    assert "tune-buckets" in run(installed, "--help")
    assert "A: A " in run(installed, "demo")


def test_models_known_by_name(installed: Path, tmp_path: Path) -> None:
    """Neither their weights nor their tokenizers are at hand."""
    options = ("--checkpoint", "llava-1.5-7b-hf", "--card", "910B", "--prompts", "20-40", "--generated", "4-8", "--rate", "1")
    run(installed, "tune-buckets", *options, "--out", tmp_path / "buckets.yaml", "--max-graphs", "6")
    assert "prefill" in (tmp_path / "buckets.yaml").read_text(encoding="utf-8")

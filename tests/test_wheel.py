"""An installed wheel has all that it imports or starts, and nothing that only makes or tests things."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import staticvl
from staticvl.tools.cli import EXTRAS

from .conftest import REPO

FOLDERS = {"compiler", "model_defs", "runtime", "tools", "weights"}
DTYPES = Path("runtime/backends/ge_simulator/card_rules/registry_910b.json")
CHECKOUT_ONLY = "tools/development"
PACKAGE = "tools/package"  # what is installed as staticvl/ itself
BUILT_FROM = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", *sorted(FOLDERS))
NAMED_MODULE = re.compile(rf"staticvl\.(?:{'|'.join(FOLDERS)})(?:\.\w+)*")  # as `python -m` takes it


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel as they are before they are zipped: what site-packages has after an installation."""
    folder = tmp_path_factory.mktemp("wheel")
    setup(REPO, "build", "--build-base", folder / "build", "--build-lib", folder / "lib")
    return folder / "lib"


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a source distribution unpacks into; made from a copy, since setuptools works beside setup.py."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in BUILT_FROM:
        source, copy = REPO / name, folder / "copy" / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    setup(folder / "copy", "sdist", "--dist-dir", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from_sdist")
    setup(unpacked_sdist, "bdist_wheel", "--dist-dir", folder)
    (path,) = folder.glob("*.whl")
    return path


def setup(folder: Path, *arguments: str | Path) -> None:
    """Run a command of setup.py."""
    command = [sys.executable, "setup.py", "-q", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def run(installed: Path, *arguments: str | Path, module: str = "staticvl.tools.cli") -> str:
    """What a command of the installed package prints; without .pth files, so that the checkout cannot be found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *dependencies()])}
    command = [sys.executable, "-S", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dependencies() -> list[str]:
    """Folders of the packages that ours needs."""
    return [folder for folder in sys.path if Path(folder).name == "site-packages"]


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
    assert {path.name for path in (installed / "staticvl").iterdir()} == FOLDERS | {"__init__.py", "__main__.py", "py.typed"}
    here = {path.relative_to(REPO) for folder in FOLDERS for path in (REPO / folder).rglob("*.py")}
    copies = {path.relative_to(installed / "staticvl") for path in installed.rglob("*.py")}
    there = {path if len(path.parts) > 1 else Path(PACKAGE) / path for path in copies}
    assert len(there) == len(copies), f"{PACKAGE} is in the wheel twice"
    left_out = here - there
    assert there <= here and left_out
    assert all(path.is_relative_to(CHECKOUT_ONLY) for path in left_out), left_out
    assert not any(path.is_relative_to(CHECKOUT_ONLY) for path in there)


def test_what_is_no_module(installed: Path) -> None:
    """Models and drawings of the demo, the server's page, the dtypes of a card's operators, and the mark that tells type
    checkers to read our annotations."""
    kept = {path.relative_to(REPO / "tools") for path in (REPO / "tools" / "assets").rglob("*") if path.is_file()}
    assert any(path.name == "model.safetensors" for path in kept)
    others = (path for path in installed.rglob("*") if path.is_file() and path.suffix != ".py")
    tools = {Path("tools") / path for path in (*kept, Path("serving/page.html"))}
    assert {path.relative_to(installed / "staticvl") for path in others} == {*tools, DTYPES, Path("py.typed")}


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


def test_help(installed: Path) -> None:
    assert "tune-buckets" in run(installed, "--help")


def test_a_wheel_that_has_run_is_uninstalled_without_trace(wheel: Path, tmp_path: Path) -> None:
    """Neither in the environment, where running writes byte code, nor in the user's folders, nor in temporary ones."""
    place, home, temporary = (tmp_path / name for name in ("venv", "home", "temporary"))
    home.mkdir()
    temporary.mkdir()
    venv.create(place, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "--quiet"]
    before = files_of(place)
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], capture_output=True, check=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
        "PYTHONPATH": os.pathsep.join(dependencies()),
        "HOME": str(home),
        "TMPDIR": str(temporary),
    }
    command = [str(place / "bin" / "staticvl"), "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "A: A " in done.stdout, done.stderr
    assert any("staticvl/tools/__pycache__/demo" in name for name in files_of(place))
    subprocess.run([*pip, "uninstall", "--yes", "staticvl"], capture_output=True, check=True)
    assert files_of(place) == before
    assert not list(place.rglob("staticvl*"))  # no empty folder either
    assert [files_of(home), files_of(temporary)] == [set(), set()]


def test_the_package_is_a_command_and_has_a_version(installed: Path) -> None:
    assert run(installed, "--version", module="staticvl") == f"staticvl {staticvl.__version__}\n"
    assert "usage: staticvl " in run(installed, "--help", module="staticvl")


def test_importing_the_package_imports_nothing_else(installed: Path) -> None:
    code = "import sys; before = set(sys.modules); import staticvl; print(*set(sys.modules) - before)"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=installed, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["staticvl"]


def test_the_package_has_no_other_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'verison'"):
        staticvl.verison  # noqa: B018


def test_sdist_builds_the_same_wheel(installed: Path, unpacked_sdist: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = {name for name in files.namelist() if ".dist-info/" not in name}
        (text,) = (files.read(name) for name in files.namelist() if name.endswith(".dist-info/METADATA"))
    assert names == files_of(installed)
    assert not (unpacked_sdist / "tests").exists(), "half of the tests"
    Metadata.from_email(text)  # refuses unknown fields and wrong values


def test_metadata(unpacked_sdist: Path) -> None:
    metadata = Metadata.from_email((unpacked_sdist / "PKG-INFO").read_bytes())
    assert (metadata.name, str(metadata.version), metadata.license_expression) == (
        "staticvl",
        staticvl.__version__,
        "Apache-2.0",
    )
    assert metadata.description_content_type == "text/markdown"
    assert (metadata.description or "").strip() == (REPO / "README.md").read_text(encoding="utf-8").strip()
    assert metadata.requires_python and "3.11" in metadata.requires_python and "3.10" not in metadata.requires_python
    versions = {name.rpartition(" ")[2] for name in metadata.classifiers or () if "Python :: 3." in name}
    assert versions == {"3.11", "3.12", "3.13"}
    assert metadata.keywords and metadata.summary
    assert {*EXTRAS.values(), "completion"} <= {*(metadata.provides_extra or ())}


def test_editors_find_a_strict_editable_installation(unpacked_sdist: Path, tmp_path: Path) -> None:
    """A .pth file names its folder of links; the usual one has an import hook, which type checkers cannot follow."""
    setup(unpacked_sdist, "editable_wheel", "--mode", "strict", "--dist-dir", tmp_path)
    venv.create(tmp_path / "venv", with_pip=False)
    (site_packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site_packages)
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text("from staticvl import __version__, runtime\n\nreveal_type(runtime.load)\nreveal_type(__version__)\n")
    pyright = [Path(sys.executable).parent / "pyright", "--outputjson", "--pythonpath", tmp_path / "venv" / "bin" / "python"]
    done = subprocess.run([*map(str, pyright), str(script)], cwd=script.parent, capture_output=True, text=True, check=False)
    messages = [each["message"] for each in json.loads(done.stdout)["generalDiagnostics"]]
    assert done.returncode == 0 and len(messages) == 2, messages
    assert messages[0].startswith('Type of "runtime.load" is "(artifact: str | Path, ') and messages[0].endswith('-> Model"')
    assert messages[1] == 'Type of "__version__" is "str"'


def test_models_known_by_name(installed: Path, tmp_path: Path) -> None:
    """Neither their weights nor their tokenizers are at hand."""
    options = ("--checkpoint", "llava-1.5-7b-hf", "--card", "910B", "--prompts", "20-40", "--generated", "4-8", "--rate", "1")
    run(installed, "tune-buckets", *options, "--out", tmp_path / "buckets.yaml", "--max-graphs", "6")
    assert "prefill" in (tmp_path / "buckets.yaml").read_text(encoding="utf-8")

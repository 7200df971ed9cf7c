"""The arrows between the folders, the homes of heavy packages, and what a runtime process may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from .conftest import EMBEDDED, REPO, SMALL_BUCKETS

FOLDERS = ("compiler", "model_defs", "runtime", "tools", "weights")

# folder -> modules of ours that it may import, by prefix
ALLOWED = {
    "model_defs": ("model_defs",),
    "runtime": ("runtime",),
    "weights": ("weights", "model_defs.config", "runtime.artifact", "runtime.files", "runtime.shown"),
    "compiler": ("compiler", "model_defs", "weights", "runtime"),
    "tools": FOLDERS,
}

# package -> the only files that may import it (a folder: every file in it)
HOMES = {
    "onnxruntime": ("runtime/backends",),
    "torch_npu": ("runtime/backends/ascend/backend.py",),
    "torchair": ("runtime/backends/ascend", "runtime/backends/ge_simulator", "compiler/emit_ascend.py"),
    "transformers": ("tools",),
    "torch": (
        "model_defs",
        "weights",
        "compiler",
        "tools",
        "runtime/backends/ge_simulator",
        "runtime/backends/ascend",
        "runtime/backends/distributed/group.py",
    ),
    "onnx": ("compiler/emit_onnx.py", "compiler/onnx_graph", "compiler/tap_onnx.py", "runtime/backends"),
    "tokenizers": ("runtime/processor/vocabularies.py", "tools"),
    "sentencepiece": ("runtime/processor/vocabularies.py", "tools"),
    "tiktoken": ("runtime/processor/tiktoken_vocabulary.py",),
    "llguidance": ("runtime/sampling/constraints.py", "runtime/sampling/form_check.py"),
    "PIL": ("runtime/processor/images.py", "runtime/processor/image_files.py", "runtime/processor/image_modes.py", "tools"),
    "jinja2": ("runtime/processor/chat_template.py", "runtime/processor/template_sandbox.py"),
    "rich": ("tools",),
    "matplotlib": ("tools/pages.py",),
    "fastapi": ("tools/serving",),
    "starlette": ("tools/serving",),
    "uvicorn": ("tools/serving",),
    "pydantic": ("tools/serving",),
    "prometheus_client": ("tools/serving",),
    "tqdm": ("tools",),
}

STDLIB_ONLY = ("model_defs/config/", "model_defs/clip_sizes.py")


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((REPO / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, lazily or not: (dotted name, whether it is ours)."""
    package = path.relative_to(REPO).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ()))
            # `from . import name` may name a module.
            names = [alias.name for alias in node.names] if not node.module or not base else [""]
            yield from ((".".join((*base, name)).strip("."), True) for name in names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPO)))
def test_imports_follow_the_arrows(path: Path) -> None:
    where = str(path.relative_to(REPO))
    for name, ours in imports(path):
        assert ours or not name.startswith("staticvl"), f"{where} imports {name} by its absolute name"
        if ours:
            allowed = ALLOWED[where.split("/", maxsplit=1)[0]]
            assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{where} must not import {name}"
            continue
        top = name.split(".")[0]
        homes = HOMES.get(top)
        assert homes is None or any(where == home or where.startswith(f"{home}/") for home in homes), f"{where} imports {top}"
        if where.startswith(STDLIB_ONLY):
            assert top in sys.stdlib_module_names, f"{where} imports {name}"


def test_the_walk_sees_imports() -> None:
    """The test above would pass on nothing: make sure that it finds what is known to be there."""
    found = set(imports(REPO / "compiler" / "build.py"))
    assert ("runtime.artifact", True) in found
    assert ("weights.convert", True) in found  # imported inside a function


def test_generating_loads_neither_torch_nor_transformers(embedded_artifact: Path) -> None:
    code = (
        "import sys\n"
        "from staticvl import runtime\n"
        f"print(runtime.generate({str(embedded_artifact)!r}, 'What is in the picture?', images=[{str(picture())!r}]).text)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'safetensors', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_unchanged_build_needs_no_torch(embedded_artifact: Path) -> None:
    """Which is why it is over at once."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from staticvl.compiler.build import build\n"
        "from staticvl.compiler.plan import Buckets, Options\n"
        f"buckets = Buckets(**{asdict(SMALL_BUCKETS)})\n"
        f"report = build(Options(checkpoint=Path({str(EMBEDDED)!r}), out=Path({str(embedded_artifact)!r}), buckets=buckets))\n"
        "assert not report.traced and not report.converted\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def picture() -> Path:
    return REPO / "tools" / "assets" / "shapes.png"


def test_every_module_imports_with_the_base_packages() -> None:
    """In one process without torch: all of runtime but the simulator and collectives, and what the command line needs before
    a command is chosen."""
    ascend = REPO / "runtime" / "ascend"
    on_torch = {ascend / "simulator.py", *(ascend / "ge_ops").glob("*.py"), REPO / "runtime" / "ranks" / "group.py"}
    paths = sorted({*(REPO / "runtime").rglob("*.py")} - on_torch)
    names = [str(p.relative_to(REPO).with_suffix("")).replace("/", ".") for p in paths]
    names = [name.removesuffix(".__init__") for name in names] + [
        "tools.cli",
        "tools.generate",
        "tools.verify",
        "tools.show",
        "tools.chat",
        "tools.bench",
    ]
    code = "import sys\nfor name in ('torch', 'transformers', 'onnx', 'safetensors', 'yaml'): sys.modules[name] = None\n"
    code += "import importlib\n" + "".join(f"importlib.import_module('staticvl.{name}')\n" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

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

# The rooms of runtime/, lowest first: a room imports from itself and from those below it. Modules at the top of the folder are
# the hallway, which all rooms share, and the surface, which stands on all of them.
HALLWAY = ("artifact", "files", "heap", "locks", "manifest", "opening", "rope", "shown", "signature", "soundness")
ROOMS = ("processor", "sampling", "backends", "engine")
# What the simulator of GE graphs needs of ours: the collectives of ranks, and how torchair names and reads what it makes.
SIMULATOR = "runtime.backends.ge_simulator"
SIMULATOR_NEEDS = (
    "runtime.backends.base",
    "runtime.backends.ascend.process_groups",
    "runtime.backends.ascend.torchair_host",
)

# package -> the only files that may import it (a folder: every file in it)
HOMES = {
    "onnxruntime": ("runtime/backends",),
    "torch_npu": (
        "runtime/backends/ascend/backend.py",
        "runtime/backends/ascend/compile_cache.py",
        "runtime/backends/ascend/weight_layout.py",
    ),
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
    "shtab": ("tools/root_options.py",),
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


def floor(module: str) -> int:
    """The height of a module of runtime/: 0 for the hallway, then the rooms, then the surface."""
    part = [*module.split("."), ""][1]
    return 0 if part in HALLWAY else 1 + ROOMS.index(part) if part in ROOMS else 1 + len(ROOMS)


def module_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {module_of(path) for path in sources()}
RUNTIME = [path for path in sources() if path.is_relative_to(REPO / "runtime")]


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: str(path.relative_to(REPO)))
def test_no_import_of_the_runtime_runs_up(path: Path) -> None:
    """Imports inside functions, and those for type checkers alone, count too."""
    own = module_of(path)
    for name, ours in imports(path):
        assert not ours or floor(name) <= floor(own), f"{own} imports {name}, which stands above it"


def test_the_simulator_could_leave() -> None:
    found = set().union(*(loaded_modules(path) for path in RUNTIME if module_of(path).startswith(SIMULATOR)))
    assert {name for name in found if not name.startswith(SIMULATOR)} <= set(SIMULATOR_NEEDS)


def run_statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from run_statements(node)


def loaded_modules(path: Path) -> set[str]:
    """Modules of ours that a file imports, `from package import module` included."""
    found: set[str] = set()
    package = path.relative_to(REPO).parent.parts
    for node in run_statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join((*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ())))
            named = {f"{base}.{alias.name}" for alias in node.names} & KNOWN
            found |= named or ({base} & KNOWN)
    return found


def test_no_circle() -> None:
    """Between modules, imports inside functions included; those for type checkers alone never run."""
    arrows = {module_of(path): loaded_modules(path) - {module_of(path)} for path in sources()}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(arrows.get(module, ())):
                walk(other, (*way, module))
            done.add(module)

    for module in arrows:
        walk(module, ())


def test_the_walk_sees_imports() -> None:
    """The test above would pass on nothing: make sure that it finds what is known to be there."""
    found = set(imports(REPO / "compiler" / "build.py"))
    assert ("runtime.artifact", True) in found
    found = set(imports(REPO / "compiler" / "stored_weights.py"))
    assert ("weights.convert", True) in found  # imported inside a function


def test_generating_loads_neither_torch_nor_transformers(embedded_artifact: Path) -> None:
    code = (
        "import sys\n"
        "from staticvl import runtime\n"
        f"print(runtime.generate({str(embedded_artifact)!r}, 'What is in the picture?', images=[{str(image())!r}]).text)\n"
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


def image() -> Path:
    return REPO / "tools" / "assets" / "shapes.png"


def test_every_module_imports_with_the_base_packages() -> None:
    """In one process without torch: all of runtime but the simulator and collectives, and what the command line needs before
    a command is chosen."""
    backends = REPO / "runtime" / "backends"
    simulator = backends / "ge_simulator"
    on_torch = {simulator / "simulator.py", *(simulator / "ge_ops").glob("*.py"), backends / "distributed" / "group.py"}
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

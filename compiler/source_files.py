"""Our own source files that a step of a build can run or read: its modules and all that they import, at any depth, and their
data files.

Imports are read from the source, those inside functions too. What is imported for type checkers alone is left out. The data of
a module are the files beside it that its source names.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
_ROOT_PACKAGE = __name__.split(".")[0]


def code_digests(*modules: str, without: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of every file that `modules` can run or read, by its path from the root; see `reachable`."""
    return {name: _digest(ROOT / name) for name in reachable(modules, without)}


@functools.cache
def reachable(modules: tuple[str, ...], without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Paths from the root, sorted, of modules such as "compiler.make", of all that they import, and of the data of these.

    `without`: modules that are not followed; a package stands for everything in it. Raises ValueError for an unknown module.
    """
    files: set[Path] = set()
    queue = [_file(module) for module in modules]
    while queue:
        file = queue.pop()
        if file in files:
            continue
        files |= {file, *_data(file)}
        queue += [_file(name) for name in _imports(file) if not _within(name, without)]
    return tuple(sorted(str(file.relative_to(ROOT)) for file in files))


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    raise ValueError(f"there is no module {module} below {ROOT}")


def _is_module(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@functools.cache
def _imports(file: Path) -> tuple[str, ...]:
    """The modules of ours that a file names in its imports, without the packages that they lie in, which only re-export."""
    own = list(file.relative_to(ROOT).with_suffix("").parts[:-1])
    imports: dict[str, None] = {}
    for node in _statements(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and (parts := _base(node, own)) is not None:
            names = [".".join([*parts, alias.name]) for alias in node.names]
            modules = [name for name in names if _is_module(name)]
            if parts and len(modules) < len(names):
                modules.append(".".join(parts))
            imports |= dict.fromkeys(modules)
    return tuple(imports)


@functools.cache
def _data(file: Path) -> tuple[Path, ...]:
    """The data files of a module."""
    tree = ast.parse(file.read_bytes())
    names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    data = {each.name: each for each in file.parent.iterdir() if each.is_file() and each.suffix != ".py"}
    return tuple(data[name] for name in sorted(names & data.keys()))


def _base(node: ast.ImportFrom, own: list[str]) -> list[str] | None:
    """The package of ours that names are imported from; None for another project's."""
    parts = node.module.split(".") if node.module else []
    if node.level:
        return [*own[: len(own) - node.level + 1], *parts]
    return parts[1:] if parts[:1] == [_ROOT_PACKAGE] else None


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for other in node.orelse:
                yield other
                yield from _statements(other)
            continue
        yield node
        yield from _statements(node)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

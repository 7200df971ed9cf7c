"""What the README says about files and commands is true."""

from __future__ import annotations

import re

from .conftest import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
LISTED = ("compiler", "model_defs", "runtime", "tools", "weights", "docs", "benchmarks")


def tree() -> set[str]:
    """Paths named in the README's file tree: `folder/` lines, and indented `name.py` lines below them."""
    block = re.search(r"## Files\n+```text\n(.*?)```", README, re.DOTALL)
    assert block, "the README has no file tree"
    paths, folders = set(), {}
    for line in block[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        depth = len(indent) // 2
        parent = folders.get(depth - 1, "") if depth else ""
        if name.endswith("/"):
            folders[depth] = parent + name
        paths.add(parent + name)
    return paths


def test_tree_names_every_file() -> None:
    listed = tree()
    missing = [name for name in listed if not (REPO / name).exists()]
    assert not missing, f"the README names files that are not there: {missing}"
    files = {
        str(path.relative_to(REPO))
        for folder in LISTED
        for path in (REPO / folder).rglob("*")
        if path.suffix in (".py", ".md", ".txt") and path.name != "__init__.py" and "assets" not in path.parts
    }
    assert files <= listed, f"files that the README's tree leaves out: {sorted(files - listed)}"


def test_commands_named_in_the_readme_exist() -> None:
    from staticvl.tools.cli import build_parser

    shell = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    commands = set(re.findall(r"^staticvl ([a-z-]+)", shell, re.MULTILINE))
    assert commands, "the README names no command"
    help_text = build_parser().format_help()
    assert not [name for name in commands if name not in help_text]
    targets = set(re.findall(r"^make ([a-z-]+)", shell, re.MULTILINE))
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= targets
    assert not [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)]


def exists(module: str) -> bool:
    path = REPO.joinpath(*module.removeprefix("staticvl.").split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_modules_that_documents_run_exist() -> None:
    """`python -m` of every document, and of the help and docstrings of what is run so."""
    folders = ("docs", "tools", "benchmarks")
    paths = [
        REPO / "README.md",
        REPO / "Makefile",
        *(p for f in folders for p in (REPO / f).rglob("*") if p.suffix in (".md", ".py")),
    ]
    named = {
        (str(path.relative_to(REPO)), module)
        for path in paths
        for module in re.findall(r"-m ((?:staticvl|benchmarks|tests)(?:\.[a-z_]\w*)+)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 40
    assert not [each for each in named if not exists(each[1])]


def test_every_benchmark_is_listed() -> None:
    """With its question and how long it takes."""
    listed = set(
        re.findall(
            r"^\| `(benchmarks(?:\.\w+)+)", (REPO / "benchmarks" / "README.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    runnable = {
        ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__main__")
        for pattern in ("*.py", "*/__main__.py", "studies/*.py")
        for path in (REPO / "benchmarks").glob(pattern)
        if re.search(r"^if __name__ == ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert listed == runnable

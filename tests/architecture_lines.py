"""References to code in the pages on architecture, and the lines that they link to.

A page names a definition as [`runtime/engine/engine.py:Engine.step`]. The block of links at the end of the page gives each of
these names its line. Do not edit the block: after a change of code

    python -m tests.architecture_lines --write

writes the blocks of all pages again; without `--write` it only says which pages are out of date.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parent.parent
DOCS = REPO / "docs"
COMMAND = "python -m tests.architecture_lines --write"
HEAD = f"<!-- Lines of the code above, by `{COMMAND}`. -->"
COLUMNS = 100
_REFERENCE = re.compile(r"\[(`([\w/]+\.py):([\w.]+)`)\](?![:(\[])")


class BrokenReferenceError(ValueError):
    """A reference to a file or a symbol that is not there."""


def pages() -> list[Path]:
    """The entry page, the chapters and the records of decisions."""
    chapters, decisions = (sorted((DOCS / folder).glob("*.md")) for folder in ("architecture", "decisions"))
    return [DOCS / "architecture.md", *chapters, *decisions]


def refreshed(page: Path, text: str) -> str:
    """The text of a page with the right block of links; raises BrokenReferenceError."""
    prose = text.partition(HEAD)[0].rstrip("\n")
    links = [_link(page, *reference) for reference in sorted(set(_REFERENCE.findall(prose)))]
    return "\n".join([prose, *(["", HEAD, *links] if links else []), ""])


def _link(page: Path, label: str, path: str, symbol: str) -> str:
    target = f"{os.path.relpath(REPO / path, page.parent)}#L{line_of(path, symbol)}"
    line = f"[{label}]: {target}"
    return line if len(line) <= COLUMNS else f"[{label}]:\n  {target}"


def line_of(path: str, symbol: str) -> int:
    """The line where a file of the repository defines a symbol, such as Engine.step; raises BrokenReferenceError."""
    if not (REPO / path).is_file():
        raise BrokenReferenceError(f"{path} is not a file of the repository; correct the reference to {symbol}")
    lines = definitions((REPO / path).read_text(encoding="utf-8"))
    if symbol not in lines:
        raise BrokenReferenceError(f"{path} does not define {symbol}; correct the reference")
    return lines[symbol]


@functools.cache
def definitions(source: str) -> dict[str, int]:
    """The line of each function, class, method, field and constant, by its dotted name; of overloads the last."""
    return dict(_defined(ast.parse(source).body, ""))


def _defined(statements: list[ast.stmt], prefix: str) -> Iterator[tuple[str, int]]:
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node.lineno
            yield from _defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((prefix + each.id, node.lineno) for each in targets if isinstance(each, ast.Name))


def main(arguments: list[str] | None = None) -> int:
    """Write or check the blocks of all pages; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.architecture_lines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the blocks; default: only name pages that are out of date")
    write = parser.parse_args(arguments).write
    stale = 0
    for page in pages():
        before = page.read_text(encoding="utf-8")
        try:
            after = refreshed(page, before)
        except BrokenReferenceError as error:
            print(f"{page.relative_to(REPO)}: {error}", file=sys.stderr)
            stale += 1
            continue
        if before != after:
            print(f"{page.relative_to(REPO)}: {'written' if write else 'out of date'}")
            stale += not write
            if write:
                page.write_text(after, encoding="utf-8")
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())

"""docs/troubleshooting.md quotes messages whose fixed words stand in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from .conftest import REPO

PAGE = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
PRODUCT = ("compiler", "model_defs", "runtime", "tools", "weights")
HOLE = "\0"  # stands for a value in an f-string


def template(node: ast.AST) -> str | None:
    """The text of a string in the source, with HOLE for each value of an f-string; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return None if left is None and right is None else (left or HOLE) + (right or HOLE)
    return None


def messages() -> Iterator[str]:
    for folder in PRODUCT:
        for path in (REPO / folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            yield from filter(None, map(template, nodes))


MESSAGES = list(messages())


def is_in_the_code(quoted: str) -> bool:
    """Whether the fixed words, in their order and with something in place of every `...`, are a part of one message."""
    pattern = re.compile(".+?".join(re.escape(part.strip()) for part in quoted.split("...")), re.DOTALL)
    return any(pattern.search(message) for message in MESSAGES)


def test_there_are_messages_of_every_command() -> None:
    assert len(QUOTED) >= 25
    assert len(set(QUOTED)) == len(QUOTED)
    sections = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    for command in ("compile", "generate", "serve", "tune-buckets", "compare"):
        assert any(command in section for section in sections), command


@pytest.mark.parametrize("quoted", QUOTED)
def test_its_fixed_words_are_in_the_code(quoted: str) -> None:
    assert is_in_the_code(quoted)


def test_other_words_are_not() -> None:
    """The test above would pass on a search that finds everything."""
    assert not is_in_the_code("context ... exceeds the model's ... positions; use at most twice that")
    assert not is_in_the_code("positions; use at most that ... context")

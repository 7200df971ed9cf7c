"""Documents use the field's words; for code see test_code_words.py."""

from __future__ import annotations

import re

import pytest

from .conftest import REPO

OLD_WORDS = re.compile(r"\b(behind|likeliest|whoever|as ever|beginning|nobody|told|pictures?)\b", re.IGNORECASE)
PAPERS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md", "benchmarks/README.md")
DOCUMENTS = (*PAPERS, *sorted(str(path.relative_to(REPO)) for path in (REPO / "docs").rglob("*.md")))
# What stays in documents, wherever it stands.
ALLOWED = (
    "What is in the picture?",  # the prompt that the tiny models were trained with
    "Picture 1: <img>",  # the form of Qwen-VL's prompts
    "`pictures`",  # a field of the manifest, which keeps its name
    'more spellings of "Picture n"',  # the changelog, of that form
    "image (not picture)",  # the changelog, of the change of words itself
)


def old_words(text: str) -> list[str]:
    """The old words of a text, across line ends."""
    return [word.lower() for word in OLD_WORDS.findall(" ".join(text.split()))]


def without_allowed(text: str) -> str:
    text = " ".join(text.split())
    for allowed in ALLOWED:
        text = text.replace(allowed, "")
    return text


def test_old_words_are_found() -> None:
    assert old_words("as\never, Behind the pictures; beginnings") == ["as ever", "behind", "pictures"]
    assert old_words(without_allowed('--prompt "What is in\nthe picture?" of a picture')) == ["picture"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(name: str) -> None:
    found = old_words(without_allowed((REPO / name).read_text(encoding="utf-8")))
    assert not found

"""Links of every document lead to files that exist, and to sections that both GitHub and the site have."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from staticvl.tools.development.site.markdown_text import (
    anchors,
    headings,
    is_external,
    links,
    slug,
    with_inline_targets,
    with_links,
)

from .conftest import REPO

DOCUMENTS = sorted(
    {*REPO.glob("*.md"), *(path for top in ("docs", "benchmarks", ".github") for path in (REPO / top).rglob("*.md"))}
)
IDS = [path.relative_to(REPO).as_posix() for path in DOCUMENTS]
ITEM = re.compile(r"[-*+] |1\. ")  # what can begin a list after a line of text

SAMPLE = """# One `two`: three_four

[a](b.md#c "title"), ![d](e.svg), [`f](g`](h.md), `[i](j.md)`, ``[k](`l.md)``.

```sh
[m](n.md)
# no heading
```

    ~~~
    [o](p.md)
    ~~~

[q]: r.md
[`z:1`]:
  z.py#L1
[note]: this is text
[s][q], [t](https://u.example/v.md), [w](#x)

## One [two](y.md)  ##
## What's new: 1.5 – 1.6, à la carte?
"""


def test_links_are_found_outside_code() -> None:
    assert links(SAMPLE) == ["b.md#c", "e.svg", "h.md", "r.md", "z.py#L1", "https://u.example/v.md", "#x", "y.md"]


def test_links_are_replaced_and_nothing_else() -> None:
    assert with_links(SAMPLE, lambda target: target) == SAMPLE
    assert with_links(SAMPLE, str.upper) == SAMPLE.replace("b.md#c", "B.MD#C").replace("e.svg", "E.SVG").replace(
        "h.md", "H.MD"
    ).replace("r.md", "R.MD").replace("z.py#L1", "Z.PY#L1").replace("https://u.example/v.md", "HTTPS://U.EXAMPLE/V.MD").replace(
        "#x", "#X"
    ).replace("y.md", "Y.MD")


def test_targets_of_code_are_put_where_it_is_named() -> None:
    text = (
        "[`a.py:A`]: first, [`a.py:A`](b.md) and [`c.py:C`], [d]; [`e`].\n\n```sh\n[`c.py:C`]\n```\n\n"
        "[`a.py:A`]: ../a.py#L1\n[`c.py:C`]:\n  ../c.py#L2\n[d]: d.md\n"
    )
    assert with_inline_targets(text) == (
        "[`a.py:A`](../a.py#L1): first, [`a.py:A`](b.md) and [`c.py:C`](../c.py#L2), [d]; [`e`].\n\n"
        "```sh\n[`c.py:C`]\n```\n\n[d]: d.md\n"
    )


def test_headings_and_their_anchors() -> None:
    """The anchors are GitHub's: letters and digits of any language stay, other signs go, each space is a hyphen."""
    assert headings(SAMPLE) == ["One two: three_four", "One two", "What's new: 1.5 – 1.6, à la carte?"]
    assert anchors(SAMPLE) == {"one-two-three_four", "one-two", "whats-new-15--16-à-la-carte"}
    assert slug("A B", "_") == "a_b"


def lines(path: Path) -> set[str]:
    """The anchors of a file's lines, as forges make them."""
    return {f"L{number}" for number, _ in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)}


def fault(path: Path, target: str) -> str | None:
    """What is wrong with a link of a document, or None."""
    if is_external(target):
        return None
    name, _, anchor = target.partition("#")
    linked = (path.parent / name).resolve() if name else path
    if name.startswith("/") or not linked.is_relative_to(REPO):
        return "leaves the repository"
    if not linked.exists():
        return "does not exist"
    if anchor and linked.suffix != ".md":
        return None if anchor in lines(linked) else "names a line that is not there"
    if anchor and anchor not in anchors(linked.read_text(encoding="utf-8")):
        return "names a section that is not there, or one of several with the same heading"
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [(target, what) for target in links(text) if (what := fault(path, target))]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("tuning.md", None),
        ("artifact.md#certificate", None),
        ("../compiler/plan.py", None),
        ("https://example.org/#x", None),
        ("artifact.md#certificates", "section"),
        ("tunings.md", "exist"),
        ("../../x.md", "repository"),
        ("/docs/tuning.md", "repository"),
        ("../setup.py#L3", None),
        ("../setup.py#L3000", "line"),
        ("../setup.py#setup", "line"),
    ],
)
def test_faults_are_found(target: str, expected: str | None) -> None:
    found = fault(REPO / "docs" / "usage.md", target)
    assert found is None if expected is None else found and expected in found


def read_differently(text: str) -> list[str]:
    """Lines that GitHub takes for a list or a table, and Python-Markdown for the paragraph before it.

    It wants an empty line before both, and four spaces before the items of a list in a list.
    """
    lines = re.sub(r"^ *(`{3,}|~{3,}).*?^ *\1", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
    nested = [line for line in lines if re.match(rf" {{1,3}}({ITEM.pattern})", line)]
    lists = [
        line
        for before, line in pairwise(lines)
        if ITEM.match(line) and before.strip() and not ITEM.match(before) and not before.startswith(" ")
    ]
    tables = [line for before, line in pairwise(lines) if line.startswith("|") and before.strip() and before[0] != "|"]
    return nested + lists + tables


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_lists_and_tables_are_lists_and_tables_everywhere(path: Path) -> None:
    assert not read_differently(path.read_text(encoding="utf-8"))


def test_what_is_read_differently_is_found() -> None:
    right = "Text:\n\n- one\n  more\n- two\n    - three\n\n| a |\n|---|\n\n```sh\nx\n- y\n```\n"
    assert not read_differently(right)
    assert read_differently("Text:\n- one\n") == ["- one"]
    assert read_differently("- one\n  - two\n") == ["  - two"]
    assert read_differently("Text:\n| a |\n|---|\n") == ["| a |"]

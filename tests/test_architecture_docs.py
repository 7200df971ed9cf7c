"""The pages on architecture: what they say of the code is there, at the lines that they link, and they are easy to read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .architecture_lines import COMMAND, DOCS, HEAD, REPO, BrokenReferenceError, definitions, line_of, pages, refreshed
from .test_readme import sentences

ENTRY = DOCS / "architecture.md"
DECISIONS = DOCS / "decisions"
RECORDS = sorted(DECISIONS.glob("[0-9]*.md"))
FOLDERS = ("benchmarks", "compiler", "docs", "model_defs", "runtime", "tests", "tools", "weights")
PARTS = ["Context", "Decision", "Consequence", "Evidence"]
each_page = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(DOCS)))
each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its block of links and its blocks of code."""
    return re.sub(r"```.*?```", "", read(page).partition(HEAD)[0], flags=re.DOTALL)


@each_page
def test_references_link_the_lines_of_their_definitions(page: Path) -> None:
    expected = refreshed(page, read(page)).splitlines()
    wrong = sorted(set(expected) ^ set(read(page).splitlines()))
    assert read(page).splitlines() == expected, f"{page.name} is out of date; run `{COMMAND}`: {wrong}"


@each_page
def test_paths_that_are_named_exist(page: Path) -> None:
    spans = [span.split(":")[0] for span in re.findall(r"`([^`\n]+)`", prose(page))]
    paths = [span for span in spans if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", span)]
    assert not [path for path in paths if not (REPO / path).exists()]


@each_page
def test_every_reference_to_a_symbol_is_a_link(page: Path) -> None:
    """So that none escapes the test of lines."""
    named = re.findall(r"(.?)`[\w/]+\.py:[\w.]+`(.?)", prose(page))
    assert all(around == ("[", "]") for around in named)


@each_page
def test_pages_are_easy_to_read(page: Path) -> None:
    assert not [line for line in read(page).splitlines() if len(line) > 100]
    assert not [each for each in sentences(prose(page)) if len(each.split()) > 40]


@each_page
def test_records_are_called_by_their_numbers(page: Path) -> None:
    called = re.findall(r"\[record\s+(\d+)\]\(\S*?(\d{4})-", read(page))
    assert all(int(number) == int(file) for number, file in called)


def test_the_entry_page_lists_every_chapter() -> None:
    linked = set(re.findall(r"\]\((architecture/\w+\.md)\)", read(ENTRY)))
    assert linked == {str(path.relative_to(DOCS)) for path in (DOCS / "architecture").glob("*.md")}
    assert "](decisions/index.md)" in read(ENTRY)


def test_the_index_lists_every_decision_by_its_title() -> None:
    listed = re.findall(r"^- (\d{4}) \[(.+?)\]\((\S+)\)", read(DECISIONS / "index.md").replace("\n  ", " "), re.MULTILINE)
    titles = [(record.name[:4], re.sub(r"^# \d+\. ", "", read(record).splitlines()[0]), record.name) for record in RECORDS]
    assert listed == titles
    assert [int(number) for number, _, _ in listed] == list(range(1, len(RECORDS) + 1))


@each_record
def test_a_record_says_why_and_how_it_is_known(record: Path) -> None:
    text = read(record)
    assert text.startswith(f"# {int(record.name[:4])}. ")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == PARTS
    evidence = text.partition("## Evidence")[2]
    assert re.search(r"`tests/test_\w+\.py`|python -m \w|\]\(\S+\.md", evidence), "no test, command or page"


SOURCE = """
LIMIT = 1

@decorated
def work():
    pass

class Box:
    size: int = 2

    @overload
    def open(self): ...

    def open(self):
        pass
"""


def test_definitions_by_hand() -> None:
    assert definitions(SOURCE) == {"LIMIT": 2, "work": 5, "Box": 8, "Box.size": 9, "Box.open": 14}


def test_a_line_that_has_moved_is_corrected() -> None:
    page = DOCS / "architecture" / "runtime.md"
    line = line_of("tests/architecture_lines.py", "line_of")
    text = "See [`tests/architecture_lines.py:line_of`].\n"
    right = f"{text}\n{HEAD}\n[`tests/architecture_lines.py:line_of`]: ../../tests/architecture_lines.py#L{line}\n"
    assert refreshed(page, text) == right
    assert refreshed(page, right.replace(f"#L{line}", f"#L{line + 1}")) == right
    assert refreshed(page, f"Nothing.\n\n{HEAD}\n[`gone`]: gone.py#L1\n") == "Nothing.\n"


@pytest.mark.parametrize("reference", ["runtime/gone.py:Engine", "runtime/engine/engine.py:Engine.gone"])
def test_a_reference_to_nothing_is_an_error(reference: str) -> None:
    with pytest.raises(BrokenReferenceError, match="correct the reference"):
        refreshed(DOCS / "architecture.md", f"See [`{reference}`].\n")

"""What the README and the documents say about files and commands is true, and the README is easy to read."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from benchmarks import flow_chart

from .conftest import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
USAGE = (REPO / "docs" / "usage.md").read_text(encoding="utf-8")
FILES = (REPO / "docs" / "files.md").read_text(encoding="utf-8")
PAGES = (REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")))
PAPERS = tuple(REPO / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "benchmarks/README.md"))
HOW_TO = tuple(page for page in PAGES if page.parent.name == "howto")
SHORT_SENTENCES = (
    *(REPO / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")),
    *(
        REPO / "docs" / f"{name}.md"
        for name in "adding_a_family artifact comparing glossary index server serving troubleshooting tuning usage".split()
    ),
    *HOW_TO,
)
LISTED = ("compiler", "model_defs", "runtime", "tools", "weights", "docs", "benchmarks", "examples")


def tree_lines() -> list[tuple[int, str, str]]:
    """Depth, name and caption of each line of the file tree of docs/files.md."""
    block = re.search(r"```text\n(.*?)```", FILES, re.DOTALL)
    assert block, "docs/files.md has no file tree"
    parts = (re.match(r"( *)(\S+) *(.*)", line) for line in block[1].splitlines())
    return [(len(part[1]) // 2, part[2], part[3]) for part in parts if part]


def tree() -> set[str]:
    """Paths named in the file tree of docs/files.md: `folder/` lines, and indented `name.py` lines below them."""
    paths, folders = set(), {}
    for depth, name, _ in tree_lines():
        parent = folders.get(depth - 1, "") if depth else ""
        if name.endswith("/"):
            folders[depth] = parent + name
        paths.add(parent + name)
    return paths


def test_tree_names_every_file() -> None:
    listed = tree()
    missing = [name for name in listed if not (REPO / name).exists()]
    assert not missing, f"docs/files.md names files that are not there: {missing}"
    files = {
        str(path.relative_to(REPO))
        for folder in LISTED
        for path in (REPO / folder).rglob("*")
        if path.suffix in (".py", ".md", ".txt", ".ipynb") and path.name != "__init__.py" and "assets" not in path.parts
    }
    assert files <= listed, f"files that docs/files.md leaves out: {sorted(files - listed)}"


def test_every_file_of_the_tree_has_a_caption() -> None:
    assert not [name for _, name, caption in tree_lines() if not caption]


def shell_blocks(*texts: str) -> str:
    """The commands of all `sh` blocks, those of list items without their indentation."""
    blocks = (block for text in texts for block in re.findall(r"^( *)```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE))
    return "".join(textwrap.dedent(block) for _, block in blocks)


def test_commands_that_documents_name_exist() -> None:
    from staticvl.tools.cli import build_parser

    shell = shell_blocks(*(page.read_text(encoding="utf-8") for page in PAGES))
    commands = set(re.findall(r"^staticvl ([a-z-]+)", shell, re.MULTILINE))
    help_text = build_parser().format_help()
    assert not [name for name in commands if name not in help_text]
    targets = set(re.findall(r"^make ([a-z-]+)", shell, re.MULTILINE))
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert not [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)]


def test_the_readme_and_the_usage_name_the_commands() -> None:
    own = shell_blocks(README)
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", own, re.MULTILINE))
    assert {"compile", "generate", "serve"} <= set(re.findall(r"^staticvl ([a-z-]+)", own, re.MULTILINE))
    named = set(re.findall(r"^staticvl ([a-z-]+)", shell_blocks(USAGE), re.MULTILINE))
    every = {"compile", "generate", "show", "verify", "sign", "bench", "chat", "tune-buckets", "compare", "serve"}
    assert every <= named


def staticvl_commands(text: str) -> list[str]:
    """Every `staticvl` command line of a page, continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", shell_blocks(text)).splitlines()
    return [part for line in lines if line.startswith("staticvl ") for part in line.split(" && ")]


@pytest.mark.parametrize("page", [REPO / "README.md", REPO / "docs" / "usage.md", *HOW_TO], ids=lambda page: page.stem)
def test_commands_have_the_options_that_documents_give_them(page: Path) -> None:
    from staticvl.tools.cli import build_parser

    commands = staticvl_commands(page.read_text(encoding="utf-8"))
    assert len(commands) >= (1 if page in HOW_TO else 4)
    parser = build_parser()
    for command in commands:
        arguments = shlex.split(command, comments=True)[1:]
        try:
            parser.parse_args(arguments)
        except SystemExit as end:
            assert not end.code, command


def sentences(text: str) -> list[str]:
    """Of paragraphs, list items and cells of tables, without code blocks; a link counts as its words."""
    prose = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    blocks = re.split(r"\n\s*\n|\n(?=[-#|] ?)|\|", prose)
    return [each for block in blocks for each in re.split(r"(?<=[.!?])\s+", " ".join(block.split())) if each]


def test_sentences_are_found() -> None:
    text = "# One\n\nTwo words\nhere. [Three](a.md#b) now.\n- four\n- five\n\n```sh\nsix\n```\n| seven | eight |\n"
    assert sentences(text) == ["# One", "Two words here.", "[Three] now.", "- four", "- five", "seven", "eight"]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160
    assert not long_sentences(README)


def test_the_readme_lists_every_extra() -> None:
    extras = (REPO / "setup.py").read_text(encoding="utf-8").partition("extras_require={")[2].partition("}")[0]
    listed = re.findall(r"^\| `(\w+)` \|", README.partition("| extra | for |")[2], re.MULTILINE)
    assert sorted(listed) == sorted(re.findall(r'"(\w+)":', extras))


def long_sentences(text: str) -> list[str]:
    return [each for each in sentences(text) if len(each.split()) > 40]


@pytest.mark.parametrize("page", SHORT_SENTENCES, ids=lambda page: page.stem)
def test_sentences_are_short(page: Path) -> None:
    """Of prose; a cell of a table may enumerate more."""
    text = page.read_text(encoding="utf-8")
    assert not long_sentences(re.sub(r"^ *\|.*$", "", text, flags=re.MULTILINE))


def wide_lines(text: str) -> list[str]:
    """Lines of more than 100 columns that are no image: prose, code, rows of tables."""
    return [line for line in text.splitlines() if len(line) > 100 and not line.lstrip().startswith("![")]


def test_wide_lines_are_found() -> None:
    text = f"{'a' * 101}\n| {'b' * 101} |\n![{'c' * 101}](d.svg)\n```sh\n{'e' * 101}\n```\n"
    assert wide_lines(text) == ["a" * 101, f"| {'b' * 101} |", "e" * 101]


@pytest.mark.parametrize("page", (*PAGES, *PAPERS), ids=lambda page: str(page.relative_to(REPO)))
def test_lines_are_at_most_100_columns(page: Path) -> None:
    assert not wide_lines(page.read_text(encoding="utf-8"))


def linked_pages(page: Path) -> set[Path]:
    """Pages of docs/ that a page links to."""
    targets = re.findall(r"\]\(([\w./-]+\.md)", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in targets} & {each.resolve() for each in PAGES}


def test_the_index_lists_every_page() -> None:
    """Those of docs/ and docs/howto/ itself; the pages of other folders by way of a page that it lists."""
    index = (REPO / "docs" / "index.md").resolve()
    listed = linked_pages(index)
    beneath = {each for page in listed for each in linked_pages(page) if each.parent != index.parent}
    pages = {page.resolve() for page in PAGES} - {index, (REPO / "README.md").resolve()}
    assert {page for page in pages if page.parent in (index.parent, index.parent / "howto")} <= listed
    assert pages <= listed | beneath


def test_the_drawing_of_the_readme_is_what_its_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["flow_chart", str(tmp_path / "flow.svg")])
    flow_chart.main()
    assert (tmp_path / "flow.svg").read_bytes() == (REPO / "docs" / "flow.svg").read_bytes()
    assert "](docs/flow.svg)" in README


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
        re.findall(r"^- `(benchmarks(?:\.\w+)+)", (REPO / "benchmarks" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    runnable = {
        ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__main__")
        for pattern in ("*.py", "*/__main__.py", "studies/*.py")
        for path in (REPO / "benchmarks").glob(pattern)
        if re.search(r"^if __name__ == ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert listed == runnable

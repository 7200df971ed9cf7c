"""The site of the documentation: mkdocs.yml, its nav, the reference, and links between files of the repository."""

from __future__ import annotations

import functools
import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from staticvl import runtime
from staticvl.tools.development.site import site_paths
from staticvl.tools.development.site.markdown_text import anchors
from staticvl.tools.development.site.navigation import expanded, pages
from staticvl.tools.development.site.package_folder import link_package

from .conftest import REPO

DOCS = REPO / "docs"
SETTINGS: dict[str, Any] = yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))
PYTHON_PAGE = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")


def directives() -> dict[str, list[str]]:
    """Dotted names of the page on Python -> the members that it shows; [] for all of them or none."""
    blocks = re.findall(r"^::: (\S+)\n((?:    .*\n)*)", PYTHON_PAGE, re.MULTILINE)
    named = {name: re.search(r"members: \[(.*)\]", options) for name, options in blocks}
    return {name: members[1].split(", ") if members else [] for name, members in named.items()}


def documented(name: str) -> Any:
    """What a dotted name stands for: a module as far as there is one, then attributes."""
    parts = name.split(".")
    depth = max(count for count in range(1, len(parts)) if is_module(".".join(parts[:count])))
    return functools.reduce(getattr, parts[depth:], import_module(".".join(parts[:depth])))


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# ---- mkdocs.yml


def test_nothing_is_fetched_by_readers() -> None:
    assert SETTINGS["theme"]["font"] is False
    assert not {"repo_url", "extra_css", "extra_javascript"} & set(SETTINGS)
    assert "analytics" not in SETTINGS["extra"]


def test_faults_of_links_are_errors() -> None:
    assert SETTINGS["strict"] is True
    assert SETTINGS["validation"]["links"] == dict.fromkeys(
        ("not_found", "anchors", "absolute_links", "unrecognized_links"), "warn"
    )
    assert SETTINGS["validation"]["nav"]["omitted_files"] == "warn"


def test_the_hooks_are_there() -> None:
    assert all((REPO / hook).is_file() for hook in SETTINGS["hooks"])


def test_the_nav_has_every_page_once() -> None:
    named = pages(expanded(SETTINGS["nav"], DOCS))
    own = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(named) == sorted(own | set(site_paths.INCLUDED.values()))


def test_included_files_exist() -> None:
    assert all((REPO / path).is_file() for path in site_paths.INCLUDED)


def test_patterns_of_a_nav(tmp_path: Path) -> None:
    for name in ("index.md", "b.md", "a.md", "z.md", "how/index.md", "how/b.md", "how/a.md", "how/c.svg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    nav = ["index.md", {"How": ["how/b.md", "how/*.md"]}, {"None": [{"Deeper": ["no/*.md"]}]}, {"Z": "z.md"}, "*.md", "*.md"]
    how = {"How": ["how/b.md", "how/index.md", "how/a.md"]}
    assert expanded(nav, tmp_path) == ["index.md", how, {"Z": "z.md"}, "a.md", "b.md"]


def test_a_page_that_is_named_must_not_vanish(tmp_path: Path) -> None:
    assert pages(expanded([{"A": ["gone.md", "gone*.md"]}], tmp_path)) == ["gone.md"]


# ---- pages of files outside docs/


@pytest.mark.parametrize(
    ("page", "target", "expected"),
    [
        ("usage.md", "tuning.md#x", "tuning.md#x"),
        ("usage.md", "#x", "#x"),
        ("usage.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("usage.md", "../README.md#python", "project/readme.md#python"),
        ("usage.md", "../compiler/plan.py", "source/compiler/plan.py.md"),
        ("usage.md", "../compiler/", "files.md"),
        ("usage.md", "../gone.md", "../gone.md"),
        ("usage.md", "../tools/assets/shapes.png", "source/tools/assets/shapes.png"),
        ("reference/python.md", "../../runtime/model.py", "../source/runtime/model.py.md"),
        ("reference/python.md", "cli.md", "cli.md"),
        ("project/readme.md", "docs/flow.svg", "../flow.svg"),
        ("project/readme.md", "docs/usage.md#work-on-it", "../usage.md#work-on-it"),
        ("project/readme.md", "LICENSE", "../source/LICENSE.md"),
        ("project/readme.md", "SECURITY.md", "security.md"),
        ("project/benchmarks.md", "../docs/scale.md", "../scale.md"),
    ],
)
def test_links_between_files_lead_to_their_pages(page: str, target: str, expected: str) -> None:
    assert site_paths.site_link(REPO, page, target) == expected


def test_linked_files_become_pages(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.py").touch()
    (tmp_path / "README.md").write_text("[a](a.py) [b](docs/b.md) [c](gone.py)")
    (tmp_path / "docs" / "b.md").write_text("[a](../a.py) [d](../LICENSE) [r](../README.md) [up](../../x.py) [f](../docs)")
    (tmp_path / "LICENSE").touch()
    assert site_paths.further_files(tmp_path, ["b.md", "project/readme.md"]) == ["LICENSE", "a.py"]


def test_a_page_shows_a_file_whole() -> None:
    text = "x = '''\n```sh\n````\n'''\n"
    page = site_paths.source_page("a/b.py", text)
    assert page.endswith(f'# a/b.py\n\n`````python linenums="1"\n{text}`````\n')
    assert yaml.safe_load(page.split("---")[1]) == {"search": {"exclude": True}}


# ---- the reference


def test_the_package_is_found_as_it_is_imported(tmp_path: Path) -> None:
    for _ in range(2):  # what is there is replaced
        link_package(REPO, tmp_path)
    assert (tmp_path / "staticvl" / "runtime" / "model.py").samefile(REPO / "runtime" / "model.py")
    assert (tmp_path / "staticvl" / "__init__.py").samefile(REPO / "tools" / "package" / "__init__.py")


def test_the_reference_has_every_public_name() -> None:
    listed = set(directives())
    assert {f"staticvl.runtime.{name}" for name in runtime.__all__} <= listed
    assert len(listed) == PYTHON_PAGE.count("\n::: ")


@pytest.mark.parametrize("name", directives())
def test_what_the_reference_names_exists(name: str) -> None:
    found = documented(name)
    members = directives()[name]
    assert not [member for member in members if member.startswith("_") or not hasattr(found, member)]
    home = getattr(found, "__module__", "staticvl.runtime")
    public = name.rpartition(".")[2] in runtime.__all__
    assert name.rpartition(".")[0] == ("staticvl.runtime" if public else home), "named by where it can be imported"


def test_the_page_says_of_errors_what_they_are() -> None:
    found = [each for each in map(documented, directives()) if inspect.isclass(each) and issubclass(each, Exception)]
    assert "The first eight are a `ValueError`, the others a\n`RuntimeError`." in PYTHON_PAGE
    assert [issubclass(error, ValueError) for error in found] == [True] * 8 + [False] * (len(found) - 8)
    assert all(issubclass(error, RuntimeError) for error in found[8:])


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; only where the extra `docs` is installed."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def ids(page: Path) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8")))


def test_pages_have_the_anchors_of_github(site: Path) -> None:
    for path in [*DOCS.rglob("*.md"), *map(REPO.joinpath, site_paths.INCLUDED)]:
        page = site / site_paths.page_of(path.relative_to(REPO).as_posix()).replace(".md", ".html")
        assert anchors(path.read_text(encoding="utf-8")) <= ids(page), path


def test_source_pages_have_the_lines_of_forges(site: Path) -> None:
    count = len((REPO / "runtime" / "model.py").read_text(encoding="utf-8").splitlines())
    found = {each for each in ids(site / "source" / "runtime" / "model.py.html") if re.fullmatch(r"L\d+", each)}
    assert found == {f"L{line}" for line in range(1, count + 1)}


def test_the_reference_has_its_docstrings(site: Path) -> None:
    page = site / "reference" / "python.html"
    members = {f"{name}.{member}" for name, shown in directives().items() for member in shown}
    assert set(directives()) | members <= ids(page)
    assert (inspect.getdoc(runtime.load) or "").partition("\n")[0] in page.read_text(encoding="utf-8")


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//|<link[^>]*href="(?:https?:)?//', text), page


def test_the_search_finds_pages_and_no_sources(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"usage.html", "reference/cli.html", "project/readme.html"} <= places
    assert (site / "source" / "LICENSE.html").is_file()
    assert not [place for place in places if place.startswith("source/")]

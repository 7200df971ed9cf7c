"""The papers at the top of the repository: they exist, they parse, and what they name is there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from .conftest import REPO

PAPERS = ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
YAML_FILES = (
    "CITATION.cff",
    ".github/ISSUE_TEMPLATE/bug_report.yml",
    ".github/ISSUE_TEMPLATE/feature_request.yml",
    ".github/workflows/ci.yml",
)
OTHERS = ("LICENSE", "NOTICE", ".github/pull_request_template.md")
TOPICS = (
    "a compile option",
    "an option of another command",
    "an op",
    "a model family",
    "a sampling setting",
    "a backend",
    "an operator rule of the GE simulator",
    "a metric of the server",
    "a benchmark",
)
IS_PATH = re.compile(r"[\w.-]+(/[\w.-]*)+|[\w-]+\.(py|md|toml|cff|yml|txt)")


def text(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def document(name: str) -> Any:
    return yaml.safe_load(text(name))


def code_spans(name: str) -> list[str]:
    """What stands in single backticks, blocks of commands left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text(name), flags=re.DOTALL))


def paths_named(name: str) -> set[str]:
    return {span for span in code_spans(name) if IS_PATH.fullmatch(span)}


def make_targets(name: str) -> set[str]:
    """The targets of every `make` command, in backticks and in blocks."""
    lines = [*code_spans(name), *"\n".join(re.findall(r"```sh\n(.*?)```", text(name), re.DOTALL)).splitlines()]
    commands = [line.split("#")[0].split() for line in lines]
    return {target for command in commands if command[:1] == ["make"] for target in command[1:]}


@pytest.mark.parametrize("name", (*PAPERS, *YAML_FILES, *OTHERS))
def test_it_exists(name: str) -> None:
    assert text(name).strip()


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml_parses(name: str) -> None:
    assert isinstance(document(name), dict)


def test_the_licence_is_whole() -> None:
    lines = [line.strip() for line in text("LICENSE").splitlines() if line.strip()]
    assert lines[:2] == ["Apache License", "Version 2.0, January 2004"]
    assert "APPENDIX: How to apply the Apache License to your work." in lines
    assert lines[-1] == "limitations under the License."


def test_the_package_and_its_citation_agree() -> None:
    setup = text("setup.py")
    citation = document("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert f'name="{citation["title"]}"' in setup
    assert f'VERSION = "{citation["version"]}"' in setup
    assert f'license_expression="{citation["license"]}"' in setup
    assert f'author="{citation["authors"][0]["name"]}"' in setup


def test_the_changelog_is_by_release() -> None:
    """The newest release is the version of the package; what comes after it stands above."""
    titles = re.findall(r"^## (.+)$", text("CHANGELOG.md"), re.MULTILINE)
    citation = document("CITATION.cff")
    assert titles[:2] == ["Unreleased", f"{citation['version']} - {citation['date-released']}"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+( - \d{4}-\d\d-\d\d)?", title) for title in titles[1:])


@pytest.mark.parametrize("name", (*PAPERS, ".github/pull_request_template.md"))
def test_paths_and_targets_that_are_named_exist(name: str) -> None:
    assert not [path for path in paths_named(name) if not (REPO / path).exists()]
    makefile = text("Makefile")
    assert not [target for target in make_targets(name) if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


def test_the_search_finds_what_is_known_to_be_named() -> None:
    """The test above would pass on nothing."""
    assert {".ci/run", "model_defs/ops.py", "weights/names/", "tests/test_papers.py", "docs/files.md"} <= paths_named(
        "CONTRIBUTING.md"
    )
    assert {"lint", "types", "test", "test-slow", "test-isa", "attack", "soak", "ascend-sim"} <= make_targets("CONTRIBUTING.md")


def test_the_map_has_an_entry_for_every_kind_of_addition() -> None:
    section = text("CONTRIBUTING.md").split("## Where things go")[1]
    entries = dict(re.findall(r"^- \*\*(.+?)\*\*: (.+?)(?=\n- |\n\n)", section, re.MULTILINE | re.DOTALL))
    assert not [topic for topic in TOPICS if "`" not in entries.get(topic, "")]


def test_assets_are_in_the_notice() -> None:
    """Every folder and file of tools/assets and tests/golden by its name."""
    notice = text("NOTICE")
    entries = [entry for folder in ("tools/assets", "tests/golden") for entry in (REPO / folder).iterdir()]
    assert not [entry.name for entry in entries if entry.name not in notice and entry.name[0] not in "._"]


def test_ci_runs_what_maintainers_run() -> None:
    steps = document(".github/workflows/ci.yml")["jobs"]["run"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert [step["with"]["python-version"] for step in steps if "with" in step] == ["3.11"]


def test_a_bug_report_asks_for_what_the_readme_says() -> None:
    fields = {field["id"]: field for field in document(".github/ISSUE_TEMPLATE/bug_report.yml")["body"] if "id" in field}
    command = "staticvl show ARTIFACT --json"
    assert f"Output of `{command}`" == fields["show"]["attributes"]["label"]
    assert command in text("README.md") and command in text("docs/usage.md")
    assert fields["show"]["validations"]["required"]

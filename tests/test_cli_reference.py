"""docs/reference/cli.md says what the parsers say."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys

import pytest

from staticvl.tools.cli import COMMANDS, build_parser
from staticvl.tools.command_help import help_of
from staticvl.tools.development import cli_reference

PAGE = cli_reference.PAGE.read_text(encoding="utf-8")
NAMES = [command.name for command in COMMANDS]


def section(name: str) -> str:
    """What the page says of a command."""
    return PAGE.split(f"\n## staticvl {name}\n")[1].split("\n## ")[0]


def help_text(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `staticvl NAME --help` prints."""
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        build_parser().parse_args([name, "--help"])
    return capsys.readouterr().out


def test_it_is_up_to_date() -> None:
    command = "python -m staticvl.tools.development.cli_reference"
    assert cli_reference.reference(build_parser()) == PAGE, f"run {command}"


def test_it_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert cli_reference.reference(build_parser()) == PAGE


def test_lines_are_short() -> None:
    assert not [line for line in PAGE.splitlines() if len(line) > 100]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_the_help_is_in_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its default: help and page are made by different code of the same parsers."""
    printed, written = help_text(name, monkeypatch, capsys), " ".join(section(name).replace("`", "").split())
    options = re.findall(r"^  (--[a-z-]+).*?(?:default: (.*))?$", printed, re.MULTILINE)
    assert options
    for option, default in options:
        item = re.search(rf"- {option}(?![a-z-])(.*?)(?= - --| - \[?[A-Z]|###|$)", written)
        assert item, option
        assert not default or f"Default: {default}." in item[1].replace("\\", ""), option


@pytest.mark.parametrize("name", NAMES)
def test_examples_can_be_run(name: str) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", section(name), re.DOTALL)
    commands = block.replace("\\\n", " ").splitlines()
    assert commands
    for command in commands:
        words = [
            word for word in shlex.split(re.split(r" [|>] ", command)[0], comments=True) if not re.match(r"STATICVL_\w+=", word)
        ]
        assert words[0] == "staticvl" and build_parser().parse_args(words[1:])


def test_a_parser_of_every_kind() -> None:
    parser = argparse.ArgumentParser(prog="tool")
    own = parser.add_subparsers().add_parser("run", **help_of("run it, to *the* end", "tool run a --to b"))
    own.add_argument("file", help="what <it> takes: some_name, __other__, [x]")
    own.add_argument("rest", nargs="?", metavar="REST", help="default: nothing")
    own.add_argument("--ids", type=int, nargs="+", metavar="ID", help="as --ratio takes them")
    own.add_argument("--hidden", help=argparse.SUPPRESS)
    group = own.add_argument_group("how")
    group.add_argument("-r", "--ratio", type=float, default=0.5, help="of %(metavar)s", metavar="R")
    either = group.add_mutually_exclusive_group(required=True)
    either.add_argument("--to", choices=("b", "c"))
    either.add_argument("--flag", action="store_true", help="do")
    page = cli_reference.reference(parser)
    assert page.split("## tool run\n")[1] == (
        "\nRun it, to *the* end.\n"
        "\n```text\ntool run [options] FILE [REST]\n```\n"
        "\n### run: arguments\n\n"
        "- `FILE`: what \\<it> takes: some_name, \\_\\_other\\_\\_, \\[x\\].\n"
        "- `[REST]`: Default: nothing.\n"
        "\n### run: options\n\n"
        "- `--ids ID [ID ...]`: as `--ratio` takes them. Default: none.\n"
        "\n### run: how\n\n"
        "- `-r R, --ratio R`: of R. Default: 0.5.\n"
        "- `--to {b,c}`\n"
        "- `--flag`: do. Default: off.\n"
        "\nExactly one of `--to`, `--flag`.\n"
        "\n### run: examples\n\n```sh\ntool run a --to b\n```\n"
    )


def test_it_is_made_without_torch() -> None:
    code = (
        "import sys\n"
        "from staticvl.tools.development.cli_reference import build_parser, reference\n"
        "reference(build_parser())\n"
        "assert not {'torch', 'onnxruntime'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

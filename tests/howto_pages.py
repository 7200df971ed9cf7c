"""What the tests of single how-to pages share: commands and blocks of a page, and runs with one bucket of each kind."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

from staticvl.tools.cli import main

from .test_readme import shell_blocks

SMALL_BUCKETS = "small_buckets.yaml"


def shell_commands(page: str) -> list[str]:
    """Every command of the `sh` blocks of a page: continued lines joined, comments left out."""
    lines = re.sub(r"\\\n\s*", " ", shell_blocks(page)).splitlines()
    commands = (re.sub(r"(^| +)# .*", "", line) for line in lines)
    return [" ".join(command.split()) for command in commands if command.strip()]


def code_block(page: str, start: str) -> str:
    """The block of a page whose text starts so, without its indentation."""
    blocks = re.findall(r"^ *```\w+\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    (block,) = [text for text in map(textwrap.dedent, blocks) if text.startswith(start)]
    return block


def write_small_buckets(folder: Path) -> None:
    """One bucket of each kind, for `run_command`."""
    text = "prefill: [32]\ndecode: [1]\nvision: [1]\ncontext: 320\nslots: 1\n"
    (folder / SMALL_BUCKETS).write_text(text, encoding="utf-8")


def run_command(command: str) -> int:
    """Run a `staticvl` command of a page in this process, a compilation with the small buckets; returns the exit status."""
    program, *arguments = shlex.split(command)
    assert program == "staticvl"
    if arguments[0] == "compile":
        arguments += ["--buckets", SMALL_BUCKETS]  # the last one counts
    return main(arguments)

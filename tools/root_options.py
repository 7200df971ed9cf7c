"""Options of `staticvl` itself, which print something and exit: the version, and scripts that complete commands in a shell."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SHELLS = ("bash", "fish", "zsh")


def add_root_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    text = "print a script that completes commands and options; pip install 'staticvl[completion]'"
    parser.add_argument("--completion", action=_Completion, choices=SHELLS, help=text)


class _Version(argparse.Action):
    """An option that looks the version up at its use: importing the metadata would delay every command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from importlib.metadata import version

        print(f"staticvl {version('staticvl')}")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.exit(1, "staticvl: --completion needs the package shtab; pip install 'staticvl[completion]'\n")
        _complete_paths(parser, shtab.FILE)
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _complete_paths(parser: argparse.ArgumentParser, files: Any) -> None:
    """Offer file names for options that take a path."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, files)
        elif action.type is Path:
            action.complete = files  # pyright: ignore[reportAttributeAccessIssue]  # where shtab looks

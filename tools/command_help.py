"""The help of a command: what it does, its arguments with their defaults, and examples."""

from __future__ import annotations

import argparse
from typing import Any


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that adds the default of every option, unless its help has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if not text or not action.option_strings or "default:" in text or isinstance(action, argparse._HelpAction):
            return text
        return f"{text}; required" if action.required else f"{text}; default: {_shown(action.default)}"


def _shown(default: object) -> str:
    """A default as the command line has it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in (None, "", []) else f"{default:g}" if isinstance(default, float) else str(default)


def help_of(text: str, examples: str) -> dict[str, Any]:
    """The arguments of argparse's add_parser for the help of a command."""
    return {
        "help": text,
        "description": text[0].upper() + text[1:] + ".",
        "epilog": "examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
        "formatter_class": HelpFormatter,
    }

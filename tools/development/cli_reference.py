"""Write docs/reference/cli.md: every command with its options, from the parsers of the command line.

    python -m staticvl.tools.development.cli_reference

The text depends on neither the width of a terminal nor the version of Python: nothing is laid out by argparse.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from ...runtime.files import write_atomically
from ..cli import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
COLUMNS = 100
INTRODUCTION = (
    "Made from the parsers by `python -m staticvl.tools.development.cli_reference`; a change belongs there. "
    "Every command has `--help` as well, which prints the same. "
    "Exit status: 0, 1 for an error that one line explains, 2 for a wrong command line, 130 after an interrupt. "
    "`{a,b}` stands for one of these words, `[ARTIFACT]` for what may be left out."
)
TITLES = {"positional arguments": "arguments"}


def main() -> int:
    write_atomically(PAGE, reference(build_parser()).encode())
    print(f"wrote {PAGE}")
    return 0


def reference(parser: argparse.ArgumentParser) -> str:
    """The whole page, in Markdown."""
    lines = ["# Command line", "", *_wrapped(INTRODUCTION)]
    for each in (parser, *_commands(parser)):
        lines += ["", f"## {each.prog}", "", *_command(each)]
    return "\n".join(lines) + "\n"


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of the commands, in their order."""
    of_commands = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [command for action in of_commands for command in action.choices.values()]


def _command(parser: argparse.ArgumentParser) -> list[str]:
    """The description, the usage, every group of arguments, and examples."""
    lines = [*_wrapped(parser.description or ""), "", "```text", _usage(parser), "```"]
    for group in parser._action_groups:
        if shown := [action for action in group._group_actions if _is_shown(action)]:
            title = TITLES.get(group.title or "", group.title)
            lines += ["", f"### {_name(parser)}: {title}", ""]
            lines += [line for action in shown for line in _argument(parser, action)]
    for exclusive in parser._mutually_exclusive_groups:
        lines += ["", *_wrapped(_choice(exclusive))]
    if parser.epilog:
        examples = textwrap.dedent(parser.epilog.partition("\n")[2]).splitlines()
        shell = [part for example in examples for part in _shell_lines(example)]
        lines += ["", f"### {_name(parser)}: examples", "", "```sh", *shell, "```"]
    return lines


def _shell_lines(command: str) -> list[str]:
    """A command of the shell in lines of at most COLUMNS, broken before options."""
    lines = [""]
    for word in re.split(r" (?=--)", command):
        if lines[-1] and len(f"{lines[-1]} {word} \\") > COLUMNS:
            lines[-1] += " \\"
            lines.append(f"  {word}")
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines


def _name(parser: argparse.ArgumentParser) -> str:
    """The command alone; the program for its own parser."""
    return parser.prog.rpartition(" ")[2]


def _is_shown(action: argparse.Action) -> bool:
    hidden = argparse._HelpAction | argparse._SubParsersAction
    return not isinstance(action, hidden) and action.help is not argparse.SUPPRESS


def _usage(parser: argparse.ArgumentParser) -> str:
    """The command with its arguments, and the options that it must have."""
    words = [parser.prog, "[options]"]
    for action in filter(_is_shown, parser._actions):
        if not action.option_strings or action.required:
            words.append(_spelling(action))
    return " ".join([*words, *("COMMAND [...]" for _ in _commands(parser)[:1])])


def _spelling(action: argparse.Action) -> str:
    """An argument as it is written: its names, and what it takes."""
    value = _value(action)
    if not action.option_strings:
        return f"[{value}]" if action.nargs == "?" else value
    return ", ".join(f"{name} {value}".rstrip() for name in action.option_strings)


def _value(action: argparse.Action) -> str:
    """What an argument takes; "" for a flag."""
    if action.nargs == 0:
        return ""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    name = action.metavar if isinstance(action.metavar, str) else choices
    return f"{name} [{name} ...]" if action.nargs == "+" else name


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> list[str]:
    """One item of a list: the spelling, what it does, and the default."""
    formatter = parser.formatter_class(prog=parser.prog)
    sentences = _sentences(formatter._expand_help(action)) if action.help else []
    text = " ".join(_marked(sentence) for sentence in sentences)
    return _wrapped(f"- `{_spelling(action)}`" + (f": {text}" if text else ""), "  ")


def _sentences(text: str) -> Iterator[str]:
    """The help, then its default, or that the option is required, as sentences of their own."""
    match = re.fullmatch(r"(.*?)(?:(?:^|; )default: (.*)|; (required))?", text, re.DOTALL)
    assert match, "every text matches"
    help_text, default, required = match.groups()
    if help_text:
        yield f"{help_text}."
    if default:
        yield f"Default: {default}."
    if required:
        yield "Required."


def _choice(group: argparse._MutuallyExclusiveGroup) -> str:
    names = ", ".join(f"`{action.option_strings[-1]}`" for action in group._group_actions)
    return f"{'Exactly' if group.required else 'At most'} one of {names}."


def _marked(text: str) -> str:
    """Plain text in Markdown: options as code, and nothing else that would be taken for markup."""
    escaped = re.sub(r"([\\`*<\[\]]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)
    return re.sub(r"(?<![\w-])--[a-z][a-z-]*", lambda match: f"`{match[0]}`", escaped)


def _wrapped(text: str, indent: str = "") -> list[str]:
    """Lines of at most COLUMNS; code is not broken."""
    joined = re.sub(r"`[^`]+`", lambda match: match[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(joined, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


if __name__ == "__main__":
    sys.exit(main())

"""Messages of the command line about mistakes; none repeats a long argument in full, and each names a near match."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

_LONGEST = 60  # characters of a word that is compared; a longer one is no mistyped option or value


def sentence_of(error: Exception) -> str:
    """The text of an error, with a long file name shortened."""
    from ..runtime.shown import shown

    name = error.filename if isinstance(error, OSError) else None
    return str(error) if name is None else str(error).replace(str(name), shown(name))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, without regard to case; None where none is near, or `word` is one of them."""
    plain = {each.lower(): each for each in known}
    if len(word) > _LONGEST or word in plain.values():
        return None
    close = difflib.get_close_matches(word.lower(), plain, n=1, cutoff=0.6)
    return plain[close[0]] if close else None


class Parser(argparse.ArgumentParser):
    """A parser whose errors shorten long arguments, and name the option or the value that a mistyped one resembles."""

    arguments: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.arguments = tuple(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        from ..runtime.shown import shown

        for argument in self.arguments:
            message = message.replace(argument, shown(argument))
        near = [f"{shown(word)}: did you mean {known}?" for word, known in self._mistyped()]
        super().error("; ".join([message, *near]))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = nearest(str(value), map(str, action.choices or ()))
            error.message += f"; did you mean {near}?" if near else ""
            raise

    def _mistyped(self) -> list[tuple[str, str]]:
        """Each option that no parser here has, with the one that it resembles."""
        words = itertools.takewhile(lambda word: word != "--", self.arguments)
        given = dict.fromkeys(word.split("=", 1)[0] for word in words if word[:1] == "-" and word.lstrip("-")[:1].isalpha())
        known = self._known_options()
        unknown = (word for word in given if not any(option.startswith(word) for option in known))
        return [(word, near) for word in unknown if (near := nearest(f"--{word.lstrip('-')}", known))]

    def _known_options(self) -> set[str]:
        """The options of this parser, and of the command that the arguments name."""
        parsers: list[argparse.ArgumentParser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += [action.choices[word] for word in self.arguments if word in action.choices][:1]
        actions = [action for parser in parsers for action in parser._actions if action.help != argparse.SUPPRESS]
        return {option for action in actions for option in action.option_strings}

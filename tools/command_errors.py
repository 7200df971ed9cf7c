"""Messages of the command line about mistakes; none repeats a long argument in full."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn


def sentence_of(error: Exception) -> str:
    """The text of an error, with a long file name shortened."""
    from ..runtime.shown import shown

    name = error.filename if isinstance(error, OSError) else None
    return str(error) if name is None else str(error).replace(str(name), shown(name))


class Parser(argparse.ArgumentParser):
    """A parser whose errors shorten long arguments."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.arguments = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        from ..runtime.shown import shown

        for argument in self.arguments:
            message = message.replace(argument, shown(argument))
        super().error(message)

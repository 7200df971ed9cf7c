"""What the command line says about a mistake, without repeating all that was given."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn


def sentence_of(error: Exception) -> str:
    """An error's own sentence; those of the system name a file in full, however long."""
    from ..runtime.shown import shown

    name = error.filename if isinstance(error, OSError) else None
    return str(error) if name is None else str(error).replace(str(name), shown(name))


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument without repeating a long one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        from ..runtime.shown import shown

        for each in self.given:
            message = message.replace(each, shown(each))
        super().error(message)

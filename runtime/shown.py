"""Given values, shortened for error messages."""

from __future__ import annotations

LONGEST = 200  # characters
_CUT = "..."
_HEAD = 120  # of a text that is cut; its end, which names the file of a path, has the rest


def shown(value: object) -> str:
    """`value` as text of at most LONGEST characters; of a longer one, both ends."""
    text = str(value)
    return text if len(text) <= LONGEST else text[:_HEAD] + _CUT + text[_HEAD + len(_CUT) - LONGEST :]


def quoted(value: object) -> str:
    """`repr(value)`, likewise."""
    return shown(repr(value))

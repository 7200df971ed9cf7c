"""The licence of a checkpoint, as its own files state it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..model_defs.config import ConfigError
from ..runtime.files import read_regular
from .json_values import read_settings

_MOST = 1 << 20  # bytes of a README or a licence
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")  # as model hubs have them, such as apache-2.0
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(
    r"^(license|license_name):[ \t]*([^\s#'\"|>\[{&*!][^\n#]*|'[^'\n]*'|\"[^\"\n]*\")[ \t]*(?:#.*)?$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Licence:
    """`name` is one that model hubs have; the sentence names the licence and its source."""

    name: str  # "other": one of its own; "unknown": not stated
    sentence: str


NOT_STATED = Licence("unknown", "Not stated: see the checkpoint.")


def read_licence(checkpoint: Path) -> Licence:
    """The first that is stated by README.md, config.json or a file LICENSE of the folder. What cannot be read states none."""
    return next(_stated(checkpoint), NOT_STATED)


def _stated(checkpoint: Path) -> Iterator[Licence]:
    if match := _FRONT_MATTER.match(_text(checkpoint / "README.md")):
        entries = {key: value.strip().strip("'\"") for key, value in _ENTRY.findall(match[1])}
        if own := entries.get("license"):
            yield _named(entries.get("license_name", own) if own == "other" else own, "README.md")
    if isinstance(own := _config(checkpoint).get("license"), str) and own.strip():
        yield _named(own.strip(), "config.json")
    for path in sorted(checkpoint.glob("LICEN[CS]E*")):
        if title := next((line.strip() for line in _text(path).splitlines() if line.strip()), ""):
            yield Licence("other", f"The file {_plain(path.name)} of the checkpoint, which begins: {_plain(title)}")


def _named(words: str, file: str) -> Licence:
    name = words.lower() if _NAME.fullmatch(words.lower()) else "other"
    return Licence(name, f"{_plain(words)}, as {file} of the checkpoint says.")


def _config(checkpoint: Path) -> dict[str, object]:
    try:
        return dict(read_settings(checkpoint / "config.json"))
    except ConfigError:
        return {}


def _text(path: Path) -> str:
    try:
        return read_regular(path, _MOST).decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""


def _plain(words: str) -> str:
    """Words of others as code in Markdown, which can hold neither links nor HTML."""
    return f"`{''.join(c for c in words if c.isprintable() and c != '`')[:200]}`"

"""Checks of a checkpoint's files: regular files only, and JSON objects whose keys have one value each."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .types import ConfigError

SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".jinja", ".tiktoken")  # of the files that a checkpoint is read from
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def irregular(folder: Path) -> str | None:
    """A sentence about the first entry of a checkpoint's folder that has the name of such a file but is not a regular file.

    Opening a pipe would wait for ever, and skipping the entry would read another file in its place.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in SUFFIXES and not path.is_file():
            return f"{path} is {_kind(path)}; expected a file: put the file there, or remove this entry from the folder"
    return None


def _kind(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link to nothing that can be read"
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "no file")


def parse_object(text: str | bytes, where: object) -> dict[str, Any]:
    """The object in a JSON text; raises ConfigError for anything else, and where a key has two different values."""
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ConfigError(f"{where} is not valid JSON (it is nested too deeply); fetch the file again") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON ({error!s:.200}); fetch the file again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where} holds a {type(data).__name__}; expected a JSON object")
    return data


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and values[key] != value:
            raise ValueError(f"{key[:80]!r:.200} is there twice, as {values[key]!r:.40} and {value!r:.40}")
        values[key] = value
    return values

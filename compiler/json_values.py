"""Values of a checkpoint's JSON files, checked. They come from others: a value of another kind is a ConfigError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model_defs.config import ConfigError, read_json
from ..runtime.shown import quoted


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty for a file that is not there."""
    return read_json(path) if path.is_file() else {}


def only(settings: Mapping[str, Any], name: str, expected: bool, where: str) -> None:
    if settings.get(name, expected) not in (expected, None):
        raise ConfigError(f"{where}: {name} is {quoted(settings[name])}; supported: {str(expected).lower()}")


LARGEST = (1 << 31) - 1


def integer(settings: Mapping[str, Any], name: str, default: int, where: str, *, least: int) -> int:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
        raise ConfigError(f"{where}: {name} is {quoted(value)}; expected an integer of at least {least} and at most {LARGEST}")
    return value


def number(
    settings: Mapping[str, Any],
    name: str,
    default: float,
    where: str,
    *,
    least: float | None = None,
    above: float | None = None,
) -> float:
    value = settings.get(name)
    if value is None:
        return default
    sound = _finite(value)
    if not sound or (least is not None and value < least) or (above is not None and value <= above):
        bound = f"above {above:g}" if above is not None else f"of at least {least:g}"
        raise ConfigError(f"{where}: {name} is {quoted(value)}; expected a number {bound}")
    return float(value)


def three(
    settings: Mapping[str, Any], name: str, default: tuple[float, float, float], where: str
) -> tuple[float, float, float]:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(map(_finite, value)):
        raise ConfigError(f"{where}: {name} is {quoted(value)}; expected three numbers")
    return float(value[0]), float(value[1]), float(value[2])


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf

"""What both sides know about the model beyond its numbers: rotary bases, means of pixels, token ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ...runtime.artifact import ModelInfo
from ...runtime.shown import quoted
from .findings import Finding

# How an answer is chosen, how files are called: nothing that forced tokens depend on.
IGNORED = ("sampling", "tokenizer.file", "layout", "stop_strings", "text_before_image")


def compare_settings(reference: ModelInfo, candidate: ModelInfo) -> list[Finding]:
    """Every setting that differs."""
    a, b = (dict(_flat(msgspec.to_builtins(info))) for info in (reference, candidate))
    found = []
    for name in sorted(a.keys() | b.keys()):
        if name.startswith(IGNORED) or _alike(a.get(name), b.get(name)):
            continue
        text = f"{name} is {quoted(b.get(name))}; the reference has {quoted(a.get(name))}"
        found.append(Finding(stage="settings", where=name, text=text))
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float | int):
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
    return a == b

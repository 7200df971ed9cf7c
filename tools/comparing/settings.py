"""Settings of the model on both sides, which are all but its weights: rotary bases, means of pixels, token ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ...runtime.artifact import ModelInfo
from ...runtime.shown import quoted
from .findings import Finding

# Sampling defaults and names of files, on which forced tokens do not depend.
IGNORED = ("sampling", "tokenizer.file", "layout", "stop_strings", "text_before_image")


def compare_settings(reference: ModelInfo, candidate: ModelInfo) -> list[Finding]:
    """A finding for every setting that differs."""
    a, b = (dict(_flat(msgspec.to_builtins(info))) for info in (reference, candidate))
    findings = []
    for name in sorted(a.keys() | b.keys()):
        if name.startswith(IGNORED) or _equal(a.get(name), b.get(name)):
            continue
        text = f"{name} is {quoted(b.get(name))}; the reference has {quoted(a.get(name))}"
        findings.append(Finding(stage="settings", where=name, text=text))
    return findings


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float | int):
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
    return a == b

"""Settings of the model on both sides, which are all but its weights: norms' epsilons, heads, rotary bases, means of pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import msgspec

from ...model_defs.config import ModelConfig
from ...runtime.artifact import ModelInfo
from ...runtime.shown import quoted
from .findings import Finding
from .setting_words import words_of

# Sampling defaults and names of files, on which forced tokens do not depend.
IGNORED = ("sampling", "tokenizer.file", "layout", "stop_strings", "text_before_image", "max_positions")
# Fields of a definition that ModelInfo has too, that say where it comes from, or that a build chooses.
ELSEWHERE = (
    "family", "layout", "vision_tower", "image_token_id", "bos_token_id", "eos_token_ids", "image_mode", "grids",
    "text.hidden_size", "text.vocab_size", "text.rope", "text.max_positions", "text.stage", "text.int8_cache",
    "vision.image_size",
)  # fmt: skip
# Sides that differ here have logits, inputs or weights of other shapes.
SIZES = (
    "family", "hidden_size", "vocab_size", "image.size", "image.rows", "image.mode", "image.tiles", "text.layers",
    "text.cross_layers", "text.head_dim", "text.kv_heads",
)  # fmt: skip


def compare_settings(
    infos: tuple[ModelInfo, ModelInfo], configs: tuple[ModelConfig | None, ModelConfig | None] = (None, None)
) -> tuple[list[Finding], list[str]]:
    """A finding for every setting that differs, and notes about those that forced tokens do not depend on.

    Pairs are (reference, candidate). A config is the definition's, or None where a side does not hold it.
    """
    notes = []
    if None in configs:
        notes = ["settings of the definition were not compared: a side does not hold them (definition.json)"]
        configs = None, None
    a, b = (_settings(info, config) for info, config in zip(infos, configs, strict=True))
    findings = []
    for name in sorted(a.keys() | b.keys()):
        if _equal(a.get(name), b.get(name)):
            continue
        text = f"{name} is {quoted(b.get(name))}; the reference has {quoted(a.get(name))}"
        if name.startswith(IGNORED):
            notes.append(f"{text}: differs, without effect on forced tokens")
            continue
        findings.append(Finding(stage="settings", where=name, text=text + words_of(name, a.get(name), b.get(name))))
    return findings, notes


def differ_in_size(findings: list[Finding]) -> str:
    """The first setting among findings that gives logits, inputs or caches other shapes; "" for none."""
    names = [each.where for each in findings if each.stage == "settings"]
    return next((name for name in SIZES if name in names), "")


def _settings(info: ModelInfo, config: ModelConfig | None) -> dict[str, Any]:
    settings = dict(_flat(msgspec.to_builtins(info)))
    if config is not None:
        settings |= {name: value for name, value in _flat(asdict(config)) if not name.startswith(ELSEWHERE)}
    return settings


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(each, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float | int):
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
    return a == b

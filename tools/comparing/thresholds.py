"""Limits of the differences between two sides, by precision: defaults, and a YAML file that changes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ...model_defs.config import text_quant
from ...runtime.artifact import Manifest
from ...runtime.shown import quoted, shown
from .metrics import Figures


class ThresholdError(ValueError):
    """A thresholds file that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Limits of one precision, for the worst row, sample, tensor or operator."""

    relative: float  # difference of two logits over the largest magnitude of their row
    kl: float  # nats
    agreement: float  # least share of equal first choices
    perplexity: float  # relative change
    weights: float  # difference of two stored numbers over the largest magnitude of their tensor
    inputs: float  # difference of inputs that the host makes: pixels, rotary tables
    operators: float  # error that one operator adds by itself


DEFAULTS = {
    "float32": Thresholds(
        relative=3e-4, kl=1e-5, agreement=1.0, perplexity=1e-3, weights=1e-6, inputs=1e-5, operators=2e-4
    ),
    "float16": Thresholds(
        relative=5e-2, kl=2e-2, agreement=0.9, perplexity=0.05, weights=1e-3, inputs=1e-5, operators=2e-3
    ),
    "bfloat16": Thresholds(
        relative=0.25, kl=0.2, agreement=0.8, perplexity=0.2, weights=1e-2, inputs=1e-5, operators=2e-3
    ),
    "w8a16": Thresholds(
        relative=0.25, kl=0.2, agreement=0.8, perplexity=0.2, weights=2e-2, inputs=1e-5, operators=6e-2
    ),
    "w8a8": Thresholds(
        relative=0.25, kl=0.2, agreement=0.8, perplexity=0.2, weights=2e-2, inputs=1e-5, operators=6e-2
    ),
    "w4a16": Thresholds(
        relative=0.6, kl=0.5, agreement=0.7, perplexity=0.5, weights=0.26, inputs=1e-5, operators=6e-2
    ),
    "int8-cache": Thresholds(
        relative=0.25, kl=0.2, agreement=0.8, perplexity=0.2, weights=1e-3, inputs=1e-5, operators=2e-3
    ),
}  # fmt: skip
_ORDER = ("float32", "float16", "int8-cache", "bfloat16", "w8a16", "w8a8", "w4a16")  # from fine to coarse


def precision(manifest: Manifest | None) -> str:
    """The row of the table for one side; None: a checkpoint, which is computed in float32."""
    if manifest is None:
        return "float32"
    quant = text_quant(manifest.quant).partition("-")[0]  # w4a16-g32 and -asym have the limits of w4a16
    if quant in DEFAULTS:
        return quant
    # The option --dtype rounds weights to that dtype; "auto" rounds nothing.
    dtype = manifest.build.options.get("dtype", "")
    floats = dtype if dtype in DEFAULTS else manifest.cache.dtype
    return coarser(floats, "int8-cache") if manifest.cache.text_dtype else floats


def coarser(a: str, b: str) -> str:
    return max(a, b, key=_ORDER.index)


def read_thresholds(path: Path | None) -> dict[str, Thresholds]:
    """The defaults, changed by a YAML file: precision -> limit -> number. Raises ThresholdError."""
    if path is None:
        return dict(DEFAULTS)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ThresholdError(
            f"{path} is not YAML ({shown(' '.join(str(error).split()))}); write e.g. float32: {{kl: 1e-4}}"
        ) from None
    if not isinstance(data, Mapping):
        raise ThresholdError(f"{path} holds {type(data).__name__}; expected a mapping from {', '.join(DEFAULTS)} to limits")
    thresholds = dict(DEFAULTS)
    for name, limits in data.items():
        if name not in DEFAULTS:
            raise ThresholdError(f"{path}: {quoted(name)} is no precision; expected one of {', '.join(DEFAULTS)}")
        thresholds[name] = replace(DEFAULTS[name], **_limits(limits, f"{path}: {name}"))
    return thresholds


def _limits(data: Any, where: str) -> dict[str, float]:
    names = [field.name for field in dataclasses.fields(Thresholds)]
    if not isinstance(data, Mapping):
        raise ThresholdError(f"{where} is {quoted(data)}; expected limits such as {{kl: 1e-4}}")
    limits = {}
    for name, value in data.items():
        if name not in names:
            raise ThresholdError(f"{where}: {quoted(name)} is no limit; expected some of {', '.join(names)}")
        limits[name] = _number(value, f"{where}: {name}")
    return limits


def _number(value: Any, where: str) -> float:
    """A number of a YAML file. YAML 1.1 reads 1e-4, without a point, as text."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ThresholdError(f"{where} is {quoted(value)}; expected a number from 0 on")
    return number


def broken(figures: Figures, limits: Thresholds) -> list[str]:
    """The limits that a sample breaks, a clause each."""
    change = abs(figures.candidate_perplexity / figures.reference_perplexity - 1)
    checks = (
        ("relative error", figures.relative, limits.relative, False),
        ("KL", figures.kl, limits.kl, False),
        ("top-1 agreement", figures.agreement, limits.agreement, True),
        ("change of perplexity", change, limits.perplexity, False),
    )
    return [
        f"{name} {value:.3g} ({'at least' if least else 'at most'} {limit:.3g})"
        for name, value, limit, least in checks
        if not (value >= limit if least else value <= limit)
    ]

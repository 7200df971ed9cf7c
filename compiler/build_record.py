"""The record of a build in the manifest."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from msgspec import UNSET, UnsetType

from ..model_defs.config import READY_MADE
from ..runtime.artifact import BuildInfo, CalibrationInfo, SourceFile
from ..runtime.backends.cores import processor_name, usable_cores
from .calibration import CACHE_METHOD, METHODS
from .inputs import BuildInputs
from .option_table import COMPILE_OPTIONS, OptionType
from .options import Options
from .plan import Plan

# Folders and files lie elsewhere on another machine: a word stands for them.
_WRITTEN: dict[OptionType, Any] = {
    "folder": lambda value: "FOLDER",
    "file": lambda value: "FILE",
    "names": ",".join,
    "flag": lambda value: "",
}


def build_info(inputs: BuildInputs, key: str, source: dict[str, SourceFile]) -> BuildInfo:
    """`key` is that of the weights, `source` the digests of the checkpoint's files."""
    return BuildInfo(
        staticvl=importlib.metadata.version("staticvl"),
        torch=importlib.metadata.version("torch"),
        options=recorded_options(inputs.options, inputs.plan),
        key=key,
        source=source,
        calibration=_calibration_info(inputs.options),
        tuned_on=_machine() if inputs.options.tune else UNSET,
        notes=inputs.notes or UNSET,
    )


def recorded_options(options: Options, plan: Plan) -> dict[str, str]:
    """Name -> value of the options of a command that compiles the same again."""
    texts = _changed(options) | _planned(options, plan)
    return {option.name: texts[option.name] for option in COMPILE_OPTIONS if option.name in texts}


def _changed(options: Options) -> dict[str, str]:
    """Options that differ from their defaults."""
    defaults = {field.name: field.default for field in fields(Options)}
    changed = {
        option.name: _WRITTEN.get(option.type, str)(value)
        for option in COMPILE_OPTIONS
        if option.recorded == "changed" and (value := getattr(options, option.field)) != defaults[option.field]
    }
    if options.quant in READY_MADE:
        del changed["quant"]  # the checkpoint has it already
    return changed


def _planned(options: Options, plan: Plan) -> dict[str, str]:
    """Options as the plan has them."""
    cache = plan.cache
    planned = {"context": str(cache.context), "slots": str(cache.slots)}
    if verify := plan.buckets("verify"):
        planned["speculate"] = str(max(verify) - 1)
    if options.backend == "ascend":
        planned |= {"kv": "pages", "pages": str(cache.pages)} if cache.pages else {"kv": "slots"}
    if cross := cache.cross:
        planned |= {"images": str(cross.images), "text_before_image": options.text_before_image}
    return planned


def _calibration_info(options: Options) -> CalibrationInfo | UnsetType:
    calibration = options.calibration
    if calibration is None:
        return UNSET
    return CalibrationInfo(
        method=", ".join(_methods(options)),
        sha256=calibration.sha256,
        prompts=len(calibration.conversations),
        pictures=sum(len(each.images) for each in calibration.conversations),
    )


def _methods(options: Options) -> Iterator[str]:
    """The methods that a calibration was run for."""
    if options.quant in METHODS:
        yield METHODS[options.quant]
    if options.int8_cache:
        yield CACHE_METHOD


def _machine() -> str:
    """The machine that kernels are chosen for."""
    return f"{processor_name()}, {usable_cores()} cores, onnxruntime {importlib.metadata.version('onnxruntime')}"

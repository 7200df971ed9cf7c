"""The command line and the --config file of `staticvl compile` -> Options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..compiler.buckets import Buckets, image_buckets, parse_buckets, verify_buckets
from ..compiler.calibration import Calibration
from ..compiler.choices import PlanError
from ..compiler.option_table import COMPILE_OPTIONS, CompileOption, OptionType
from ..compiler.options import Options
from ..runtime.shown import quoted, shown
from .yaml_file import read_yaml

CONFIG_KEYS = tuple(option.name for option in COMPILE_OPTIONS)  # the command line's options, with underscores
REQUIRED = ("checkpoint", "out")
# Folders that have to be there: the noun in messages, and what was expected.
FOLDERS = {
    "checkpoint": ("checkpoint", "a local checkpoint (models are never downloaded)"),
    "vision_tower": ("vision tower", "a local CLIP checkpoint"),
    "lora": ("adapter", "a LoRA adapter as PEFT saves it"),
}


def read_options(args: argparse.Namespace) -> Options:
    """Command line over config file over defaults."""
    values = {**_config_file(args.config), **_command_line(args)}
    if args.plan_only:
        values.setdefault("out", "ARTIFACT")  # nothing is written
    for name in REQUIRED:
        if name not in values:
            raise PlanError(
                f"no {name} was given; usage: staticvl compile CHECKPOINT --out ARTIFACT (or both in --config FILE)"
            )
    _check_folders(values)
    own = [option for option in COMPILE_OPTIONS if option.field != "buckets" and option.name in values]
    fields: dict[str, Any] = {option.field: _READERS[option.type](values[option.name]) for option in own}
    return Options(buckets=_buckets(values), **fields)


def _command_line(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name in CONFIG_KEYS and value is not None}


def _check_folders(values: dict[str, Any]) -> None:
    for name, (noun, expected) in FOLDERS.items():
        if name in values and not (folder := Path(values[name])).is_dir():
            raise PlanError(f"{noun} {shown(folder)} is not a folder; expected {expected}")


# ---- values


def _names(value: Any) -> tuple[str, ...]:
    return tuple(value.split(",") if isinstance(value, str) else value)


def _calibration(path: str) -> Calibration:
    from .calibration_file import read_calibration

    return read_calibration(Path(path))


_READERS: dict[OptionType, Callable[[Any], Any]] = {
    "text": lambda value: value,
    "count": lambda value: value,
    "flag": lambda value: value,
    "names": _names,
    "folder": Path,
    "file": _calibration,  # the only file that is not one of buckets
}


def _buckets(values: dict[str, Any]) -> Buckets:
    """Bucket sizes of the file or the mapping, then those of options of their own."""
    source = values.get("buckets", {})
    buckets = (
        parse_buckets(read_yaml(Path(source), PlanError), source)
        if isinstance(source, str)
        else parse_buckets(source, "buckets")
    )
    images = image_buckets(values["images"], "options") if "images" in values else None
    verify = verify_buckets(values["speculate"]) if "speculate" in values else None
    return buckets.merged(Buckets(context=values.get("context"), slots=values.get("slots"), images=images, verify=verify))


# ---- the --config file


def _config_file(path: Path | None) -> dict[str, Any]:
    """Name -> value of the options in a file. Keys without a value are left out; paths are relative to the file."""
    if path is None:
        return {}
    data = read_yaml(path, PlanError)
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds {type(data).__name__}; expected a mapping of options")
    if unknown := sorted(str(key) for key in set(data) - set(CONFIG_KEYS)):
        raise PlanError(f"{path}: unknown keys {shown(', '.join(unknown))}; expected {', '.join(CONFIG_KEYS)}")
    return {
        option.name: _checked(option, data[option.name], path)
        for option in COMPILE_OPTIONS
        if data.get(option.name) is not None
    }


def _checked(option: CompileOption, value: Any, path: Path) -> Any:
    """A value of a file; raises PlanError for another type than its option's. Options and Buckets check choices and sizes."""
    if option.name == "buckets" and not isinstance(value, str):
        return value  # the sizes themselves
    fits, expected = _TYPES[option.type]
    if not (fits(value) or (option.or_list and isinstance(value, list))):
        raise PlanError(f"{path}: {option.name} is {quoted(value)}; expected {expected}")
    return str(path.parent / str(value)) if option.type in ("folder", "file") else value


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_TYPES: dict[OptionType, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda value: True, "a name"),  # Options names what it may be
    "count": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "names": (_is_names, "a list of names"),
    "folder": (lambda value: isinstance(value, str), "the path of a folder"),
    "file": (lambda value: isinstance(value, str), "the path of a file"),
}

"""The inputs of a build: the checkpoint's settings, a plan for them, and the artifact that is there already."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..model_defs.config import ModelConfig, encode_config, read_config
from ..runtime.artifact import DEFINITION, ArtifactError, Manifest, ModelInfo, read_manifest
from ..weights.storage import Floats
from ..weights.tensors import WeightsError
from ..weights.weight_map import kept_dtypes, match, targets
from .model_info import read_model_info
from .options import Options
from .plan import Plan, forecast, make_plan
from .progress import Progress
from .ready_made import resolve

if TYPE_CHECKING:
    from ..weights.packing.settings import Packing


@dataclass(frozen=True, slots=True)
class BuildInputs:
    """Everything that a build reads and decides before its slow steps."""

    options: Options
    config: ModelConfig
    info: ModelInfo
    settings: dict[str, bytes]  # files of the tokenizer, the chat template and the definition, by their names
    plan: Plan
    old: Manifest | None
    progress: Progress
    packing: Packing | None  # of a checkpoint that is quantised
    notes: tuple[str, ...]  # on settings of the checkpoint that are contradictory or not used

    @property
    def out(self) -> Path:
        return self.options.out


@dataclass(frozen=True, slots=True)
class Preview:
    """A plan and its forecast. `options` name the quantisation of a checkpoint that is quantised."""

    options: Options
    config: ModelConfig
    plan: Plan
    sizes: dict[str, int]  # as forecast has them
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Planned:
    """A plan and its sources."""

    options: Options
    packing: Packing | None
    config: ModelConfig
    plan: Plan
    notes: list[str]


def _plan(options: Options) -> _Planned:
    notes: list[str] = []
    tower, ignored = options.vision_tower, options.ignore_config_keys
    config = read_config(options.checkpoint, vision_tower=tower, ignore_keys=ignored, notes=notes)
    config = options.defined(config)
    options, packing = resolve(options)
    return _Planned(options, packing, config, make_plan(config, options), notes)


def prepare(options: Options, progress: Progress) -> BuildInputs:
    """Read the checkpoint's settings and plan the build; raises one of the clear errors of config, image settings and plan."""
    planned = _plan(options)
    options, config = planned.options, planned.config
    info, settings = read_model_info(
        options.checkpoint,
        config,
        vision_tower=options.vision_tower,
        text_before_image=options.text_before_image,
        notes=planned.notes,
    )
    return BuildInputs(
        options=options,
        config=config,
        info=info,
        settings={**settings, DEFINITION: encode_config(config)},
        plan=planned.plan,
        old=_old_manifest(options.out),
        progress=progress,
        packing=planned.packing,
        notes=_without_folders(options, planned.notes),
    )


def plan_only(options: Options) -> Preview:
    """The plan of a build and its forecast, from the config alone."""
    planned = _plan(options)
    floats = _expected_floats(planned.options, planned.config)
    sizes = forecast(planned.config, planned.plan, planned.options, floats)
    return Preview(planned.options, planned.config, planned.plan, sizes, tuple(planned.notes))


def _old_manifest(out: Path) -> Manifest | None:
    """The manifest of an earlier build, if there is a sound one; a damaged one is built anew."""
    try:
        return read_manifest(out)
    except ArtifactError:
        return None


def _without_folders(options: Options, notes: list[str]) -> tuple[str, ...]:
    """Notes for a manifest: folders lie elsewhere on another machine."""
    folders = [folder for folder in (options.checkpoint, options.vision_tower) if folder]
    return tuple(functools.reduce(lambda note, folder: note.replace(f"{folder}/", ""), folders, note) for note in notes)


def _expected_floats(options: Options, config: ModelConfig) -> Floats:
    """dtypes of the stored weights; 16 bits are assumed, as usual, for weights that are not there yet."""
    from ..weights.source import open_source

    try:
        kept = kept_dtypes(match(config, open_source(options.checkpoint, options.vision_tower).tensors))
    except WeightsError:
        kept = dict.fromkeys(targets(config), "float16")
    return options.floats(kept)

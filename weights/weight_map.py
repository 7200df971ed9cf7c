"""The weight map: which tensors of a checkpoint become which of our parameters.

A checkpoint is read by the names of its tensors alone: the version that wrote it does not tell the spelling. The name table
of a config (see names/) has every name that its model may have, as used or as ignored; any other is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ..model_defs.config import ModelConfig, Stage
from ..runtime.shown import quoted, shown
from .names import name_table
from .names.rule import NameTable, Rule, Shape, SourceRef
from .names.transforms import moves
from .tensors import FLOATS, TOWER, SourceTensor, WeightsError
from .wrappers import foreign_prefix

_LAYER = re.compile(r"(text\.layers|cross)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe of one of our parameters: made by `rule` from `tensors`, its sources in their order."""

    rule: Rule
    tensors: tuple[SourceTensor, ...]


@dataclass(frozen=True, slots=True)
class WeightMap:
    """The recipe of each of our parameters, and the names of the tensors that are ignored on purpose."""

    recipes: dict[str, Recipe]
    ignored: tuple[str, ...]


def targets(config: ModelConfig) -> dict[str, Shape]:
    """Our parameters of the config's stage and their shapes, in the order in which they are stored."""
    shapes = {rule.target: rule.shape for rule in name_table(config).rules if rule.target is not None}
    return {name: shape for name, shape in shapes.items() if _stage_of(config, name) == config.text.stage.index}


def _stage_of(config: ModelConfig, name: str) -> int:
    """The pipeline stage of a parameter: that of its layer; of others the first, of the final norm and lm_head the last."""
    text, count = config.text, config.text.stage.count
    if name.startswith(("text.norm.", "text.lm_head.")):
        return count - 1
    number = _LAYER.match(name)
    if number is None:
        return 0
    layer = int(number[2]) if number[1] == "text.layers" else text.cross_layers[int(number[2])]
    return next(i for i in range(count) if layer in Stage(i, count).layers(text.layers))


def source_names(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of all tensors of a complete checkpoint in the config's layout, ignored ones included.

    A name that begins with "tower/" belongs, without it, into the vision tower's own folder.
    """
    table = name_table(config)
    return {_published(table, ref): ref.shape for rule in table.rules for ref in rule.sources}


def published_names(config: ModelConfig) -> dict[str, str]:
    """Every name that a tensor of the model may have -> its name in the published layout of this config."""
    table = name_table(config)
    refs = [ref for rule in table.rules for ref in rule.sources]
    return {root + ref.name: _published(table, ref) for ref in refs for root in table.spellings[ref.part]}


def match(config: ModelConfig, source: Mapping[str, SourceTensor]) -> WeightMap:
    """The weight map of a checkpoint with the tensors `source`.

    Raises WeightsError, naming the first few tensors and the count, where tensors are missing, unknown, duplicated, of another
    shape than config.json says, or not float32, float16 or bfloat16.
    """
    table = name_table(config)
    rules = {rule.target: rule for rule in table.rules if rule.target is not None}
    used = {_published(table, ref): ref for rule in rules.values() for ref in rule.sources}
    names, ignored, unknown = assign(config, source)
    missing = [name for name in used if name not in names]
    if unknown and missing:
        _refuse_foreign(config, unknown)
    if config.vision_tower and missing and all(used[name].part == table.tower for name in missing):
        _refuse_without_tower(config, source)
    _refuse("the checkpoint lacks", missing, "fetch all of its weight files")
    _refuse("the checkpoint holds unknown tensors:", unknown, "check that config.json belongs to these weights")
    _refuse(
        "tensors that mean the same are there twice:",
        [" and ".join(twins) for twins in names.values() if len(twins) > 1],
        "remove one of each",
    )
    tensors = {name: source[names[name][0]] for name in used}
    _refuse(
        "shapes differ from config.json:",
        [
            f"{tensor.name} is {list(tensor.shape)}, expected {list(used[name].shape)}"
            for name, tensor in tensors.items()
            if tensor.shape != used[name].shape
        ],
        "check that config.json belongs to these weights",
    )
    _refuse(
        "dtypes are not supported:",
        [f"{tensor.name} is {tensor.dtype}" for tensor in tensors.values() if tensor.dtype not in FLOATS],
        "expected float32, float16 or bfloat16: give an unquantised checkpoint",
    )
    recipes = {
        target: Recipe(rule, tuple(tensors[_published(table, ref)] for ref in rule.sources)) for target, rule in rules.items()
    }
    return WeightMap(recipes, tuple(ignored))


def kept_dtypes(weight_map: WeightMap) -> dict[str, str]:
    """Our parameter -> the narrowest dtype that holds it without loss: that of its source tensors where they agree and their
    numbers are only moved, else float32."""
    kept = {}
    for name, recipe in weight_map.recipes.items():
        dtypes = {tensor.dtype for tensor in recipe.tensors}
        kept[name] = dtypes.pop() if len(dtypes) == 1 and moves(recipe.rule.make) else "float32"
    return kept


def assign(config: ModelConfig, names: Iterable[str]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """A checkpoint's tensor names as (used, ignored, unknown).

    The used ones are lists by published name: more than one name is a duplicate. A vision tower in a folder of its own is
    ignored where the checkpoint has one too: that one was trained with the rest.
    """
    table, published_by_name = name_table(config), published_names(config)
    used = {_published(table, ref): ref.part for rule in table.rules if rule.target is not None for ref in rule.sources}
    names = list(names)
    inside = any(used.get(published_by_name.get(name, "")) == table.tower and not name.startswith(TOWER) for name in names)
    names_by_published: dict[str, list[str]] = {}
    ignored, unknown = [], []
    for name in names:
        published = published_by_name.get(name)
        if table.ignored.fullmatch(name) or (published and (published not in used or (inside and name.startswith(TOWER)))):
            ignored.append(name)
        elif published:
            names_by_published.setdefault(published, []).append(name)
        else:
            unknown.append(name)
    return names_by_published, ignored, unknown


def _published(table: NameTable, ref: SourceRef) -> str:
    return table.published[ref.part] + ref.name


def _refuse_without_tower(config: ModelConfig, source: Collection[str]) -> None:
    if not any(spelling.startswith(TOWER) for spelling in name_table(config).spellings["vision"]):
        raise WeightsError(
            "the checkpoint lacks its vision tower, model.vision_tower.*; it was trained with the rest, so no other fits: "
            "fetch all of its weight files"
        )
    if any(name.startswith(TOWER) for name in source):
        raise WeightsError(
            "the vision tower's folder lacks the tensors vision_model.*; expected a CLIP checkpoint such as "
            f"{config.vision_tower}: give its folder with --vision-tower PATH"
        )
    raise WeightsError(
        f"the checkpoint holds no vision tower; fetch {config.vision_tower} and give its folder with --vision-tower PATH"
    )


def _refuse_foreign(config: ModelConfig, unknown: Collection[str]) -> None:
    """Refuse unknown tensors that a prefix or an adapter explains, before those that are missing because of it."""
    if lora := [name for name in unknown if ".lora_" in name or ".base_layer." in name]:
        _refuse("the checkpoint holds an adapter beside its weights:", lora, "merge it first, with peft's merge_and_unload")
    prefix, count = foreign_prefix(unknown, published_names(config))
    if count:
        remedy = f"{count} of them are known without the prefix {quoted(prefix)}: save the weights without it"
        _refuse("the checkpoint holds unknown tensors:", unknown, remedy)


def _refuse(fault: str, names: Collection[str], remedy: str, limit: int = 5) -> None:
    if names:
        rest = f" and {len(names) - limit} more" if len(names) > limit else ""
        noun = "tensor" if len(names) == 1 else "tensors"
        raise WeightsError(f"{fault} {', '.join(map(shown, list(names)[:limit]))}{rest} ({len(names)} {noun}); {remedy}")

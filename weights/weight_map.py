"""Which tensors of a checkpoint become which of our parameters.

A checkpoint is read by the names of its tensors alone: the version that wrote it does not tell the spelling. Every name
that a model of this config may have is known (see names/), as ours or as ignored; anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ..model_defs.config import ModelConfig, Stage
from ..runtime.shown import quoted, shown
from .names import name_table
from .names.rule import Rule, Shape, SourceRef, Table
from .names.transforms import moves
from .tensors import FLOATS, TOWER, SourceTensor, WeightsError
from .wrappers import foreign_prefix

_LAYER = re.compile(r"(text\.layers|cross)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one of our parameters is made: `tensors` are the sources of `rule`, in its order."""

    rule: Rule
    tensors: tuple[SourceTensor, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Our parameter -> how it is made, and the names of the tensors that are left out on purpose."""

    recipes: dict[str, Recipe]
    ignored: tuple[str, ...]


def targets(config: ModelConfig) -> dict[str, Shape]:
    """Our parameters of the config's stage and their shapes, in the order in which they are stored."""
    shapes = {rule.target: rule.shape for rule in name_table(config).rules if rule.target is not None}
    return {name: shape for name, shape in shapes.items() if _stage_of(config, name) == config.text.stage.index}


def _stage_of(config: ModelConfig, name: str) -> int:
    """The stage of a pipeline that holds a parameter: that of its layer; the first and the last what lies outside of layers."""
    text, count = config.text, config.text.stage.count
    if name.startswith(("text.norm.", "text.lm_head.")):
        return count - 1
    number = _LAYER.match(name)
    if number is None:
        return 0
    layer = int(number[2]) if number[1] == "text.layers" else text.cross_layers[int(number[2])]
    return next(i for i in range(count) if layer in Stage(i, count).layers(text.layers))


def source_names(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of a complete checkpoint in the config's layout, with the tensors that we leave out.

    Names that begin with "tower/" belong, without it, into the vision tower's own folder.
    """
    table = name_table(config)
    return {_published(table, ref): ref.shape for rule in table.rules for ref in rule.sources}


def published_names(config: ModelConfig) -> dict[str, str]:
    """Every name that a tensor of the model may have -> the name under which this layout publishes it."""
    table = name_table(config)
    refs = [ref for rule in table.rules for ref in rule.sources]
    return {root + ref.name: _published(table, ref) for ref in refs for root in table.spellings[ref.part]}


def match(config: ModelConfig, source: Mapping[str, SourceTensor]) -> Plan:
    """Find the tensors that each of our parameters is made from.

    Raises WeightsError, naming the first few tensors and the count, when one is missing, unknown, there twice, of an
    unexpected shape, or not float32, float16 or bfloat16.
    """
    table = name_table(config)
    rules = {rule.target: rule for rule in table.rules if rule.target is not None}
    used = {_published(table, ref): ref for rule in rules.values() for ref in rule.sources}
    found, ignored, unknown = assign(config, source)
    missing = [name for name in used if name not in found]
    if unknown and missing:
        _refuse_foreign(config, unknown)
    if config.vision_tower and missing and all(used[name].part == table.tower for name in missing):
        _refuse_without_tower(config, source)
    _refuse("the checkpoint lacks", missing, "fetch all of its weight files")
    _refuse("the checkpoint holds unknown tensors:", unknown, "check that config.json belongs to these weights")
    _refuse(
        "tensors that mean the same are there twice:",
        [" and ".join(names) for names in found.values() if len(names) > 1],
        "remove one of each",
    )
    chosen = {name: source[found[name][0]] for name in used}
    _refuse(
        "shapes differ from config.json:",
        [
            f"{tensor.name} is {list(tensor.shape)}, expected {list(used[name].shape)}"
            for name, tensor in chosen.items()
            if tensor.shape != used[name].shape
        ],
        "check that config.json belongs to these weights",
    )
    _refuse(
        "dtypes are not supported:",
        [f"{tensor.name} is {tensor.dtype}" for tensor in chosen.values() if tensor.dtype not in FLOATS],
        "expected float32, float16 or bfloat16: give an unquantised checkpoint",
    )
    recipes = {
        target: Recipe(rule, tuple(chosen[_published(table, ref)] for ref in rule.sources)) for target, rule in rules.items()
    }
    return Plan(recipes, tuple(ignored))


def kept_dtypes(plan: Plan) -> dict[str, str]:
    """Our parameter -> the narrowest dtype that holds all of it as the checkpoint does: that of the tensors that it is made of
    where they agree and their numbers are only moved, else float32."""
    found = {}
    for name, recipe in plan.recipes.items():
        dtypes = {tensor.dtype for tensor in recipe.tensors}
        found[name] = dtypes.pop() if len(dtypes) == 1 and moves(recipe.rule.make) else "float32"
    return found


def assign(config: ModelConfig, names: Iterable[str]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Sort a checkpoint's tensor names into those that we use, ignored and unknown ones.

    The used ones come by their published name, with all names found for each. A vision tower stored apart is left out when
    the checkpoint has its own: that one was trained with the rest.
    """
    table, known = name_table(config), published_names(config)
    used = {_published(table, ref): ref.part for rule in table.rules if rule.target is not None for ref in rule.sources}
    names = list(names)
    inside = any(used.get(known.get(name, "")) == table.tower and not name.startswith(TOWER) for name in names)
    found: dict[str, list[str]] = {}
    ignored, unknown = [], []
    for name in names:
        published = known.get(name)
        if table.ignored.fullmatch(name) or (published and (published not in used or (inside and name.startswith(TOWER)))):
            ignored.append(name)
        elif published:
            found.setdefault(published, []).append(name)
        else:
            unknown.append(name)
    return found, ignored, unknown


def _published(table: Table, ref: SourceRef) -> str:
    return table.published[ref.part] + ref.name


def _refuse_without_tower(config: ModelConfig, source: Collection[str]) -> None:
    if not any(spelling.startswith(TOWER) for spelling in name_table(config).spellings["vision"]):
        raise WeightsError(
            "the checkpoint lacks its vision tower, model.vision_tower.*; it was trained with the rest, so another will not "
            "do: fetch all of its weight files"
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
    """Unknown tensors that a prefix or an adapter explains: they are named before those that are missing because of it."""
    if lora := [name for name in unknown if ".lora_" in name or ".base_layer." in name]:
        _refuse("the checkpoint holds an adapter beside its weights:", lora, "merge it first, with peft's merge_and_unload")
    prefix, count = foreign_prefix(unknown, published_names(config))
    if count:
        remedy = f"{count} of them are known without the prefix {quoted(prefix)}: save the weights without it"
        _refuse("the checkpoint holds unknown tensors:", unknown, remedy)


def _refuse(what: str, found: Collection[str], remedy: str, limit: int = 5) -> None:
    if found:
        rest = f" and {len(found) - limit} more" if len(found) > limit else ""
        noun = "tensor" if len(found) == 1 else "tensors"
        raise WeightsError(f"{what} {', '.join(map(shown, list(found)[:limit]))}{rest} ({len(found)} {noun}); {remedy}")

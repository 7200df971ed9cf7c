"""Rules of a name table, and the rule that most parameters have: one tensor, unchanged.

Linear weights stay [out, in], as every published checkpoint has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names alone need no torch
    from torch import Tensor

Shape = tuple[int, ...]
Make = Callable[[Sequence["Tensor"]], "Tensor"]


@dataclass(frozen=True, slots=True)
class SourceRef:
    """A tensor of the checkpoint: the part of the model that it belongs to, and its name after the part's spelling.

    `rows`: only these rows of axis 0, first and after the last.
    """

    part: str
    name: str
    shape: Shape  # of the whole tensor
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One of our parameters and the tensors that it is made from.

    `target` None: tensors of the model that are ignored on purpose, because nothing ever runs them. `make` None: the only
    source, unchanged. Otherwise it gets the sources in the checkpoint's dtypes, and its result is cast to the stored one.
    """

    target: str | None
    shape: Shape
    sources: tuple[SourceRef, ...]
    make: Make | None = None


@dataclass(frozen=True, slots=True)
class NameTable:
    """All tensors that a checkpoint of a model may have.

    `rules` are in the order in which targets are stored. `spellings`: part of a model -> what comes before its tensor names,
    in every known spelling. `published`: the spelling in which this layout is published. `ignored` matches whole names of
    buffers that are computed from the config and of parts that no text or image passes through. `tower`: the part that
    holds the vision tower.
    """

    rules: tuple[Rule, ...]
    spellings: Mapping[str, tuple[str, ...]]
    published: Mapping[str, str]
    ignored: re.Pattern[str]
    tower: str = "vision"


def plain(target: str | None, part: str, name: str, *shape: int) -> Rule:
    """The tensor `name` as it is."""
    return Rule(target, shape, (SourceRef(part, name, shape),))


def with_bias(target: str, part: str, name: str, *shape: int) -> Iterator[Rule]:
    """A module's weight of `shape` and its bias."""
    yield plain(f"{target}.weight", part, f"{name}.weight", *shape)
    yield plain(f"{target}.bias", part, f"{name}.bias", shape[0])


def left_out(rule: Rule) -> Rule:
    return replace(rule, target=None)


def spelled(roots: Sequence[str]) -> str:
    """A regular expression for any of these prefixes."""
    return f"(?:{'|'.join(map(re.escape, roots))})"

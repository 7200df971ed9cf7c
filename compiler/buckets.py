"""Bucket sizes, and buckets.yaml, the file that names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..runtime.artifact import KINDS
from ..runtime.shown import quoted, shown
from .choices import MAX_BUCKET, PlanError

LISTS = (*KINDS, "images")
KEYS = ("prefill", "decode", "vision", "speculate", "images", "context", "slots")  # of buckets.yaml
OLD_SPECULATE = "verify"


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Bucket sizes by graph kind, and the cache's size. None: derived from the model.

    `verify`: tokens that one run can verify, which are those of a draft and the one before them, so one more than `speculate`
    of the command line and of buckets.yaml; by default there are no such graphs. `images`: numbers of images that text graphs
    can see by cross-attention, the largest being the most of a sequence; there are always graphs for text without images.
    """

    prefill: tuple[int, ...] | None = None
    decode: tuple[int, ...] | None = None
    vision: tuple[int, ...] | None = None
    verify: tuple[int, ...] | None = None
    images: tuple[int, ...] | None = None
    context: int | None = None
    slots: int | None = None

    def __post_init__(self) -> None:
        for name in LISTS:
            sizes = getattr(self, name)
            if sizes is not None and not (sizes and _whole_numbers(sizes) and all(1 <= size <= MAX_BUCKET for size in sizes)):
                raise PlanError(f"buckets: {name} is {list(sizes)}; expected a list of integers from 1 to {MAX_BUCKET}")
            if sizes is not None and len(set(sizes)) < len(sizes):
                raise PlanError(f"buckets: {name} names a size twice: {list(sizes)}")
        for name in ("context", "slots"):
            value = getattr(self, name)
            if value is not None and (not _whole_numbers((value,)) or value < 1):
                raise PlanError(f"buckets: {name} is {quoted(value)}; expected a positive integer")

    def merged(self, other: Buckets) -> Buckets:
        """These buckets, with every setting of `other` that is not None."""
        return replace(self, **{f.name: value for f in fields(other) if (value := getattr(other, f.name)) is not None})


def parse_buckets(data: Any, where: str) -> Buckets:
    """buckets.yaml's content -> Buckets; raises PlanError for anything but its keys and integers.

    `verify`, which older files have in place of `speculate`, counts the token before a draft too.
    """
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} holds {type(data).__name__}; expected a mapping with the keys {', '.join(KEYS)}")
    if unknown := sorted(str(key) for key in set(data) - {*KEYS, OLD_SPECULATE}):
        raise PlanError(f"{where}: unknown keys {shown(', '.join(unknown))}; expected {', '.join(sorted(KEYS))}")
    sizes: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    if "images" in sizes:
        sizes["images"] = image_buckets(sizes["images"], where)
    for name in LISTS:
        if name in sizes and not isinstance(sizes[name], tuple):
            raise PlanError(f"{where}: {name} is {quoted(data[name])}; expected a list of integers")
    if "speculate" in sizes:
        del sizes["speculate"]
        sizes["verify"] = _agreed(verify_buckets(data["speculate"], where), sizes.get("verify"), where)
    return Buckets(**sizes)


def _agreed(verify: tuple[int, ...], old: tuple[int, ...] | None, where: str) -> tuple[int, ...]:
    """`verify`, unless the old key says otherwise."""
    if old is not None and (not _whole_numbers(old) or sorted(old) != sorted(verify)):
        drafted = [size - 1 for size in verify]
        raise PlanError(
            f"{where}: speculate is {drafted} and verify is {list(old)}, but {drafted} drafted tokens are {list(verify)} "
            "verified ones; leave verify out, which is the old name"
        )
    return verify


def verify_buckets(drafted: Any, where: str = "") -> tuple[int, ...]:
    """The most drafted tokens, a number or several -> buckets of graphs that verify them and the token before them."""
    numbers = drafted if isinstance(drafted, list) else [drafted]
    start = f"{where}: " if where else ""
    if not numbers or not _whole_numbers(numbers) or min(numbers) < 1:
        raise PlanError(f"{start}speculate is {quoted(drafted)}; expected a number of tokens from 1 on")
    if len(set(numbers)) < len(numbers):
        raise PlanError(f"{start}speculate names a number twice: {quoted(drafted)}")
    return tuple(number + 1 for number in numbers)


def image_buckets(images: Any, where: str) -> tuple[int, ...]:
    """The most images that a sequence may hold -> buckets for one and for all of them; a list is taken as it is."""
    if isinstance(images, list | tuple):
        return tuple(images)
    if not _whole_numbers((images,)) or images < 1:
        raise PlanError(f"{where}: images is {quoted(images)}; expected a positive integer or a list of them")
    return (1,) if images == 1 else (1, images)


def _whole_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)

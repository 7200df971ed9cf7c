"""Damage to bytes and to JSON, by name."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
NUMBERS = (0, -1, 2**31, 2**63, 1e308, math.nan, None, "x")
PATHS = ("../x", "/etc/passwd", "", "a/../../b")
WRONG = (None, True, "x", [], {}, [[]], 1.5)
FEW = 8  # keys; an object with more, whose values are all of one type, is a table of entries that are alike
TWICE = "@@twice@@"  # ends a key that becomes the one before it again
DEEP = 200_000
LONG = 300_000
OPEN, CLOSE = '{"a":', "}"
Path = tuple[str | int, ...]


def shuffled(menu: Sequence[T]) -> list[T]:
    """In one order for all seeds, so that a part of a menu is spread over all of it."""
    mixed = list(menu)
    random.Random("menu").shuffle(mixed)
    return mixed


# ---- bytes


def flip(rng: random.Random, data: bytes) -> bytes:
    """One to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((rng.randrange(len(data) + 1), max(len(data) - 1, 0), min(8, len(data))))]


def zero(rng: random.Random, data: bytes) -> bytes:
    """A range, or all."""
    start = rng.choice((0, rng.randrange(len(data) + 1)))
    stop = rng.choice((len(data), min(len(data), start + rng.choice((1, 16, 4096)))))
    return data[:start] + bytes(stop - start) + data[stop:]


def swap(rng: random.Random, data: bytes) -> bytes:
    """Two blocks change places."""
    size = min(rng.choice((1, 16, 4096)), len(data) // 2)
    first = rng.randrange(len(data) // 2 - size + 1)
    second = rng.randrange(len(data) // 2, len(data) - size + 1)
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def junk(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice((1, 16, 5000))) + data[start:]


def empty(_: random.Random, __: bytes) -> bytes:
    return b""


BYTES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "flip": flip, "cut": cut, "zero": zero, "swap": swap, "junk": junk, "empty": empty,
}  # fmt: skip


# ---- JSON


@dataclass(frozen=True, slots=True)
class Change:
    """A way to make bad JSON of good."""

    what: str
    apply: Callable[[random.Random], str]


def sites(value: Any, where: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value in a document with its place."""
    yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from sites(inner, (*where, key))


def alike(document: Any) -> dict[str, list[Path]]:
    """Places by what they are called when entries of lists and tables are not told apart."""
    groups: dict[str, list[Path]] = {}
    for where, _ in sites(document):
        groups.setdefault(_general(document, where), []).append(where)
    return groups


def _general(document: Any, where: Path) -> str:
    names, value = [], document
    for step in where:
        names.append("*" if isinstance(step, int) or _is_table(value) else str(step))
        value = value[step]
    return ".".join(names)


def _is_table(value: dict[str, Any]) -> bool:
    return len(value) > FEW and len({type(each) for each in value.values()}) == 1


def at(document: Any, where: Path) -> Any:
    for step in where:
        document = document[step]
    return document


def replaced(document: Any, where: Path, value: Any) -> Any:
    if not where:
        return value
    changed = copy.deepcopy(document)
    at(changed, where[:-1])[where[-1]] = value
    return changed


def json_menu(document: Any, *, is_path: Callable[[Any], bool] = lambda _: False) -> list[Change]:
    """Every change of a document: numbers, paths, kinds of values, keys, and what stands for the whole."""
    menu: list[Change] = []
    for name, places in alike(document).items():
        sample = at(document, places[0])
        if isinstance(sample, int | float) and not isinstance(sample, bool):
            menu += [_put(document, name, places, value) for value in NUMBERS]
        if is_path(sample):
            menu += [_put(document, name, places, value) for value in PATHS]
        menu += [_put(document, name, places, value) for value in WRONG]
        if places[0] and isinstance(places[0][-1], str):
            menu += [_removed(document, name, places), _twice(document, name, places)]
            if is_path(places[0][-1]):
                menu += [_renamed(document, name, places, value) for value in PATHS]
        if isinstance(sample, list):
            menu.append(_longer(document, name, places))
    return menu + _wholes(document)


def _put(document: Any, name: str, places: list[Path], value: Any) -> Change:
    return Change(
        f"{name} is {json.dumps(value)}", lambda rng: json.dumps(replaced(document, rng.choice(places), value), indent=1)
    )


def _removed(document: Any, name: str, places: list[Path]) -> Change:
    def apply(rng: random.Random) -> str:
        where, changed = rng.choice(places), copy.deepcopy(document)
        del at(changed, where[:-1])[where[-1]]
        return json.dumps(changed, indent=1)

    return Change(f"{name} is left out", apply)


def _renamed(document: Any, name: str, places: list[Path], value: str) -> Change:
    def apply(rng: random.Random) -> str:
        where, changed = rng.choice(places), copy.deepcopy(document)
        inner = at(changed, where[:-1])
        inner[value] = inner.pop(where[-1])
        return json.dumps(changed, indent=1)

    return Change(f"the key {name} becomes {json.dumps(value)}", apply)


def _twice(document: Any, name: str, places: list[Path]) -> Change:
    def apply(rng: random.Random) -> str:
        where, changed = rng.choice(places), copy.deepcopy(document)
        value = rng.choice((*NUMBERS, at(document, where)))
        at(changed, where[:-1])[f"{where[-1]}{TWICE}"] = value
        return json.dumps(changed, indent=1).replace(TWICE, "")

    return Change(f"{name} is there twice", apply)


def _longer(document: Any, name: str, places: list[Path]) -> Change:
    def apply(rng: random.Random) -> str:
        where = rng.choice(places)
        value = at(document, where) or [0]
        return json.dumps(replaced(document, where, (value * LONG)[:LONG] if len(json.dumps(value[0])) < 20 else value * 50))

    return Change(f"{name} is very long", apply)


def _wholes(document: Any) -> list[Change]:
    """Texts in place of the document, or of the whole of its text."""
    text = json.dumps(document)
    first = next(iter(document)) if isinstance(document, dict) and document else "a"
    forms: dict[str, Callable[[], str]] = {
        "nothing": lambda: "",
        "a number": lambda: "1",
        "null": lambda: "null",
        "a list": lambda: f"[{text}]",
        "open brackets": lambda: "[" * DEEP,
        "open braces": lambda: OPEN * DEEP,
        "deep lists in a value": lambda: f'{{"{first}": {"[" * DEEP}{"]" * DEEP}}}',
        "deep objects in a value": lambda: f'{{"{first}": {OPEN * DEEP}1{CLOSE * DEEP}}}',
        "a number of many digits": lambda: f'{{"{first}": {"9" * 100_000}}}',
        "a text of a megabyte": lambda: json.dumps({first: "x" * 1_000_000}),
        "a key of a megabyte": lambda: json.dumps({"k" * 1_000_000: 1}),
        "many keys": lambda: json.dumps({f"key{i}": i for i in range(100_000)}),
        "a byte-order mark": lambda: "\ufeff" + text,
        "a NUL": lambda: text + "\0",
        "half a surrogate": lambda: text.replace("{", '{"\\ud800": 1, ', 1),
        "two documents": lambda: text + text,
        "a comment": lambda: "// comment\n" + text,
    }
    return [Change(what, lambda _, form=form: form()) for what, form in forms.items()]

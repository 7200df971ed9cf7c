"""Fields of a completion with values of every wrong type, size and sign."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staticvl.tools.serving.schema import ChatRequest

from .case import Attempt, Kind
from .mutate import TWICE, json_menu, shuffled
from .server import REFUSALS, Target, checked, judged, request, serving

HUGE = "x" * 100_000
DEEP = "[" * 5000 + "]" * 5000
# Put in as they stand, since some cannot be written from Python values.
VALUES = (
    "null", "true", "false", "0", "-0", "-1", "1", "2", "127", "128", "0.5", "-0.5", "1e308", "-1e308", "1e400", "NaN",
    "Infinity", "-Infinity", str(2**31), str(2**63), str(2**64), "9" * 5000, '""', '"x"', '"1"', '"\\u0000"', '"\\ud800"',
    '"\\uffff"', json.dumps(HUGE), "[]", "[[]]", "[null]", '["", "x"]', "[1]", f"[{'1,' * 20_000}1]", "[-1]",
    '[99999999999999999999]', "{}", '{"": 1}', '{"x": "x"}', '{"1": 1e308}', '{"-1": 1}', '{"99999999999999999999": 1}',
    '{"1_0": 1}', '{" 1": 1}', '{"\u0661": 1}', DEEP, '{"type": "json_schema"}', '{"type": "json_object"}', '{"type": []}',
    "[{}]", '[{"role": "user", "content": null}]', "1" + "0" * 400,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ground:
    target: Target
    menu: tuple[tuple[str, str], ...]  # what, body


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    with serving(folder, "fields") as target:
        yield Ground(target, tuple(menu()))


def menu() -> list[tuple[str, str]]:
    """Every field with every value; messages changed in every place."""
    small = request(max_tokens=4, stream=False)
    found = [(f"{name} is {value[:60]}", _with(small, name, value)) for name in _names() for value in VALUES]
    small["messages"][0]["content"].append({"type": "text", "text": "And where?"})
    found += [(f"in a body: {change.what}", change.apply(random.Random(0))) for change in json_menu(small)]
    return shuffled(found)


def _names() -> list[str]:
    own = list(ChatRequest.model_fields)
    return [
        *own,
        "tools",
        "tool_choice",
        "functions",
        "modalities",
        "best_of",
        "user",
        "metadata",
        "unknown",
        "__class__",
        "model_config",
        "",
    ]


def _with(fields: dict[str, Any], name: str, value: str) -> str:
    changed = copy.deepcopy(fields)
    changed[name] = TWICE
    return json.dumps(changed).replace(json.dumps(TWICE), value)


def make(ground: Ground, rng: random.Random, index: int) -> Attempt:
    what, body = ground.menu[index % len(ground.menu)]
    if rng.random() < 0.3 and '"stream": false' in body:
        what, body = f"{what}, streamed", body.replace('"stream": false', '"stream": true')
    data = body.encode(errors="surrogatepass")
    return Attempt(what, checked(ground.target, lambda: judged(*ground.target.ask(data))))


KIND = Kind(
    name="fields",
    what="every field of a completion with wrong types, ranges and sizes",
    endings=(*REFUSALS, "answer"),
    limit_s=30,
    count=1000,
    ground=ground,
    make=make,
    inside=False,
)

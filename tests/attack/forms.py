"""Forms of answers that are hard to follow: expressions that explode, schemas that are deep, wide or recursive."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case import Attempt, Kind
from .mutate import json_menu, shuffled
from .server import REFUSALS, Target, checked, judged, request, serving

OTHERS_S = 10.0  # within which an honest request beside a form must be answered
REGEXES = (
    "(a+)+b", "(a|a)*b", "(a|aa)+$", "((a*)*)*", "(x+x+)+y", "(.*)*", "(.*a){20}", "(.*a){200}", "(a?){500}a{500}",
    "a{1000000}", "a{0,1000000}", "(a{1000}){1000}", "((((a{50}){50}){50}){50})", "[a-z]{100000}",
    "(.*)(.*)(.*)(.*)(.*)(.*)(.*)x", "(a|b|c|d){5000}", "(?:a|b)*a(?:a|b){20}", "(?:a|b)*a(?:a|b){200}", ".*(0|1)*.{40}x",
    "(\\w|\\d|_)*{50}", "\\p{L}{1000}", "[^\\x00]{5000}", "(?i)(straße|ſ|K){300}", "\\b\\B\\b", "^$^$", "(?=a)b", "(?!a)b",
    "(?<=a)b", "(a)\\1", "(?P<n>a)(?P=n)", "(?(1)a|b)", "(?R)", "\\", "(", ")", "[", "]", "{", "}", "*", "+", "?", "|", "a**",
    "a{2,1}", "a{99999999999999999999}", "[z-a]", "[[:alpha:]]", "\\x{110000}", "\\u{d800}", "\\p{Nothing}", "\0", "\ud800",
    "\uffff", "(?#comment)", "(?x) a # b", "\\Qa\\E", "a" * 10_000, "(" * 5000, "(" * 3000 + ")" * 3000, "[" * 5000,
    "a|" * 4999, "(a|" * 2000 + ")" * 2000, "\\d{1,500}" * 20, "[a-z]{1,300}@[a-z]{1,300}" * 5, "(a{0,100}b{0,100}){0,100}",
    "", "a" + "?" * 5000, "(?:" * 1000 + "a" + ")*" * 1000, "(.{0,1000}){5}x", "~(a)", "a&b", "(.*a.*)&(.*b.*)&~(.*c.*)",
    "[\\s\\S]*" * 500, "(?s:.){9999}", "\\C*", "(a.*|b.*|c.*|.*d){30}", "((a|b)*c){100}", "(?:(?:a{0,9}){0,9}){0,9}",
    "(1{100}|2{100}|3{100})*",
)  # fmt: skip


def _nested(depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


def schemas() -> list[tuple[str, Any]]:
    wide = {f"p{i}": {"type": "string"} for i in range(900)}
    tree = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}
    doubling = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)} | {"d60": {"type": "null"}}
    return [
        ("empty", {}),
        ("false", {"not": {}}),
        ("deep objects", _nested(100, {"type": "string"})),
        ("many optional keys", {"type": "object", "properties": wide}),
        ("many required keys", {"type": "object", "properties": wide, "required": list(wide)}),
        ("a tree", tree),
        ("doubling references", {"$defs": doubling, "$ref": "#/$defs/d0"}),
        ("itself", {"$ref": "#"}),
        (
            "two that refer to each other",
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        ),
        ("a missing reference", {"$ref": "#/$defs/none"}),
        ("a reference elsewhere", {"$ref": "http://127.0.0.1:1/x"}),
        ("a reference to a file", {"$ref": "file:///etc/passwd"}),
        ("allOf of all", {"allOf": [{"anyOf": [{"type": t} for t in ("string", "number", "object", "array")]}] * 40}),
        ("oneOf", {"oneOf": [{"type": "string", "maxLength": i} for i in range(100)]}),
        ("a long string", {"type": "string", "minLength": 100_000}),
        ("a string of no length", {"type": "string", "minLength": 5, "maxLength": 1}),
        ("a long array", {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}),
        ("an array of 1e9", {"type": "array", "minItems": 10**9, "maxItems": 10**9}),
        ("unique items", {"type": "array", "uniqueItems": True, "items": {"enum": list(range(500))}}),
        ("a large enum", {"enum": [f"v{i}" for i in range(3000)]}),
        ("long constants", {"const": "x" * 30_000}),
        ("a deep constant", {"const": json.loads("[" * 400 + "]" * 400)}),
        ("multiples", {"type": "number", "multipleOf": 1e-300}),
        ("odd multiples", {"type": "integer", "multipleOf": 982451653, "minimum": 1}),
        ("a narrow range", {"type": "number", "minimum": 1, "exclusiveMaximum": 1}),
        ("a wide range", {"type": "integer", "minimum": -(10**300), "maximum": 10**300}),
        ("a range of 1e308", {"type": "number", "minimum": -1e308, "maximum": 1e308}),
        (
            "pattern properties",
            {"type": "object", "patternProperties": {"^(a+)+$": {"type": "string"}, ".*": {"type": "number"}}},
        ),
        ("a pattern", {"type": "string", "pattern": "^(a|aa)+$"}),
        ("an exploding pattern", {"type": "string", "pattern": "(.*a){100}.{300}"}),
        ("a bad pattern", {"type": "string", "pattern": "("}),
        (
            "formats",
            {
                "type": "object",
                "properties": {
                    f: {"type": "string", "format": f}
                    for f in ("date-time", "email", "uri", "ipv6", "uuid", "regex", "nothing")
                },
            },
        ),
        ("if then else", {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}, "else": {"required": ["c"]}}),
        ("dependent", {"dependentSchemas": {"a": {"$ref": "#"}}}),
        ("unevaluated", {"unevaluatedProperties": False, "allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {}}}),
        ("an unknown type", {"type": "picture"}),
        ("a type that is a number", {"type": 3}),
        ("unknown keys", {"x-a": 1, "type": "string"}),
        ("odd keys", {"type": "object", "properties": {"\0": {}, "\ud800": {}, "": {}, '\n"\\': {}}}),
        ("a dynamic reference", {"$dynamicRef": "#x"}),
        ("names by rule", {"type": "object", "propertyNames": {"pattern": "(a|b){50}"}}),
        ("least keys", {"type": "object", "minProperties": 1000}),
        ("contains", {"type": "array", "contains": {"type": "string"}, "minContains": 50}),
        ("x-guidance", {"x-guidance": {"whitespace_pattern": "(a*)*"}, "type": "object"}),
        ("a grammar in it", {"type": 'string"\nstart: /./'}),
        ("large anyOf", {"anyOf": [_nested(3, {"const": i}) for i in range(300)]}),
        ("nested arrays", json.loads('{"type":"array","items":' * 200 + "{}" + "}" * 200)),
    ]


CHOICES = (
    ["a"] * 1000,
    ["x" * 1000] * 30,
    [f"{i:0900d}" for i in range(900)],
    ["\0"],
    ["\ud800"],
    ['"\n\\'],
    ["a", ""],
    ["🙂" * 500],
    ["</s>"],
    ["<image>"],
    [" "],
    ["a", "a"],
    ['"; start: /.*/'],
)
SOUND = {
    "type": "object",
    "properties": {
        "a": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3},
        "b": {"enum": ["x", 1, None]},
    },
    "required": ["a"],
}


def menu() -> list[tuple[str, str]]:
    """What, and a body."""
    found = [(f"the expression {each[:60]!r}", {"regex": each}) for each in REGEXES]
    found += [(f"the schema: {name}", _schema(form)) for name, form in schemas()]
    found += [(f"the choice {str(each)[:60]}", {"choice": each}) for each in CHOICES]
    bodies = [(what, json.dumps(request(max_tokens=32, **fields))) for what, fields in found]
    place = json.dumps(request(max_tokens=16, **_schema("@@")))
    texts = {f"in a schema: {each.what}": each.apply(random.Random(0)) for each in json_menu(SOUND)}
    texts["a schema of deeper objects"] = '{"type":"object","properties":{"a":' * 900 + "{}" + "}}" * 900
    return shuffled(bodies) + shuffled([(what, place.replace('"@@"', text)) for what, text in texts.items()])


def _schema(form: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}}


@dataclass(frozen=True, slots=True)
class Ground:
    target: Target
    menu: tuple[tuple[str, str], ...]
    beside: bool = True  # whether an honest request goes beside each


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    with serving(folder, "forms") as target:
        yield Ground(target, tuple(menu()))


def make(ground: Ground, _: random.Random, index: int) -> Attempt:
    what, body = ground.menu[index % len(ground.menu)]
    data = body.encode(errors="surrogatepass")
    return Attempt(what, checked(ground.target, lambda: _run(ground, data)))


def _run(ground: Ground, body: bytes) -> str:
    """The ending of a request; an honest one that comes a moment later must not wait for it."""
    if not ground.beside:
        return judged(*ground.target.ask(body))
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(_honest(ground.target)))
    other.start()
    try:
        ending = judged(*ground.target.ask(body))
    finally:
        other.join()
    return found[0] or ending


def _honest(target: Target) -> str:
    """Empty where all is well."""
    time.sleep(0.02)
    started = time.monotonic()
    try:
        said = target.honest()
    except OSError as error:
        said = repr(error)
    seconds = time.monotonic() - started
    if said != target.answer:
        return f"an honest request beside it fails: {said!r}"
    return f"holds up an honest request: for {seconds:.1f} s" if seconds > OTHERS_S else ""


KIND = Kind(
    name="forms",
    what="regular expressions, JSON schemas and choices that explode, recurse, contradict or are none",
    endings=(*REFUSALS, "answer"),
    limit_s=20,
    count=350,
    ground=ground,
    make=make,
    inside=False,
)

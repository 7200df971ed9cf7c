"""docs/artifact.md as tables and lists, and the manifest's JSON schema in the words that they use."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .conftest import REPO

DOC = REPO / "docs" / "artifact.md"
Row = dict[str, str]  # cells by the head of their column, parts of an item by what they are
FIELD = re.compile(r"(?P<field>`\w+`) \((?P<type>.+?); (?P<default>required|left out|`.*?`)\): (?P<meaning>.+)")
TENSOR = re.compile(
    r"(?P<name>`.+?`) \((?P<dtype>[\w ]+) (?P<shape>\[.+?\]); (?P<condition>[\w ,-]+)\): (?P<meaning>.+)",
)


def sections(text: str) -> dict[str, list[str]]:
    """The lines below each heading, up to the next one."""
    found: dict[str, list[str]] = {"": []}
    title = ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"#+ (.+)", line):
            title = heading[1].strip("`")
            assert title not in found, f"two sections are called {title}"
            found[title] = []
        else:
            found[title].append(line)
    return found


def rows(lines: list[str]) -> list[Row]:
    """The rows of the only table among `lines`; a row whose number of cells differs from the head's is an error."""
    table = [cells(line) for line in lines if line.startswith("|")]
    head, rule, *body = table
    assert all(re.fullmatch("-+", cell) for cell in rule), rule
    return [dict(zip(head, row, strict=True)) for row in body]


def cells(line: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def items(lines: list[str]) -> list[str]:
    """The items of the lists among `lines`, each on one line."""
    found: list[str] = []
    for line in lines:
        if line.startswith("- "):
            found.append(line.removeprefix("- "))
        elif found and line.startswith("  "):
            found[-1] += f" {line.strip()}"
    return found


def entries(lines: list[str], form: re.Pattern[str]) -> list[Row]:
    """The parts of each item; an item of another form is an error."""
    found = [(form.fullmatch(item), item) for item in items(lines)]
    assert found and all(match for match, _ in found), [item for match, item in found if not match]
    return [match.groupdict() for match, _ in found if match]


def names(cell: str) -> list[str]:
    """The names in backticks of one cell."""
    return re.findall(r"`([^`]+)`", cell)


# ---- the schema


def field_rows(definition: Mapping[str, Any], dtype_pattern: str) -> Iterator[tuple[str, str, str]]:
    """Name, type and default of each field of a record, as the document has to state them."""
    required = definition.get("required", ())
    for name, schema in definition["properties"].items():
        default = f"`{json.dumps(schema['default'])}`" if "default" in schema else "left out"
        words = type_words(schema).replace(f"string {dtype_pattern}", "dtype")
        yield name, words, "required" if name in required else default


def type_words(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words, such as "array of [TensorSpec](#tensorspec)"."""
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if alternatives := [f"`{value}`" for value in schema.get("enum", ())] or list(map(type_words, schema.get("anyOf", ()))):
        return " or ".join(alternatives)
    if parts := schema.get("prefixItems"):
        return f"{len(parts)} of {type_words(parts[0])}"
    if schema["type"] == "array":
        return f"{'array, not empty,' if schema.get('minItems') else 'array'} of {type_words(schema['items'])}"
    if schema["type"] == "object":
        return f"object of {type_words(schema['additionalProperties'])}"
    return _scalar_words(schema)


def _scalar_words(schema: Mapping[str, Any]) -> str:
    kind = schema["type"]
    if "pattern" in schema:
        return f"{kind} {schema['pattern']}"
    if "exclusiveMinimum" in schema:
        return f"{kind} above {schema['exclusiveMinimum']}"
    if "minimum" not in schema:
        return kind
    return f"{kind} {schema['minimum']} to {_limit(schema['maximum'])}"


def _limit(value: float) -> str:
    """Powers of two as such: 16777216 is 2^24."""
    for number, suffix in ((value, ""), (value + 1, " - 1")):
        power = math.log2(number)
        if isinstance(value, int) and value > 1 << 11 and number == 1 << round(power):
            return f"2^{round(power)}{suffix}"
    return f"{value:g}"

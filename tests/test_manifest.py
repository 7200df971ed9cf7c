"""The bytes of a manifest with every field there is: a change of the code must not change those of artifacts that exist."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from staticvl.runtime.artifact import MANIFEST, Manifest, encode_manifest

from .conftest import REPO

GOLDEN = REPO / "tests" / "golden" / MANIFEST
RECORDS: dict[str, Any] = msgspec.json.schema(Manifest)["$defs"]


def test_the_bytes_of_a_manifest() -> None:
    data = GOLDEN.read_bytes()
    assert encode_manifest(msgspec.json.decode(data, type=Manifest)) == data


def test_it_has_every_field_of_every_record() -> None:
    seen: dict[str, set[str]] = {}
    for record, value in records(json.loads(GOLDEN.read_text()), RECORDS["Manifest"], "Manifest"):
        seen.setdefault(record, set()).update(value)
    assert seen == {name: set(definition["properties"]) for name, definition in RECORDS.items()}


def records(value: Any, schema: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The records in a value of a schema, itself first, by the names of their types."""
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        yield from records(value, RECORDS[name], name)
    elif name:
        yield name, value
        for key, part in value.items():
            yield from records(part, schema["properties"][key])
    elif "anyOf" in schema:
        tag = value.get("type", "").capitalize() if isinstance(value, dict) else ""
        references = [each for each in schema["anyOf"] if "$ref" in each]
        chosen = [each for each in references if len(references) == 1 or each["$ref"].endswith(f"/{tag}")]
        yield from (found for each in chosen[: value is not None] for found in records(value, each))
    elif schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        yield from (found for part in value for found in records(part, schema["items"]))
    elif isinstance(schema.get("additionalProperties"), dict):
        yield from (found for part in value.values() for found in records(part, schema["additionalProperties"]))


def test_a_manifest_without_the_optional_fields_is_as_it_was() -> None:
    """Fields that were added within this version of the schema are left out where they are not used."""
    manifest = msgspec.json.decode(GOLDEN.read_bytes(), type=Manifest)
    optional = {"text_dtype", "kernels", "steps", "buffers", "max_positions", "calibration", "tuned_on", "notes"}
    optional |= {"card_warnings", "pages"}
    data = json.loads(encode_manifest(manifest))
    for part in (data["cache"], data["model"], data["build"], *data["graphs"]):
        for name in optional & set(part):
            del part[name]
    bare = msgspec.convert(data, Manifest)
    again = json.loads(encode_manifest(bare))
    assert {**again, "digest": ""} == {**data, "digest": ""}


def test_an_unknown_field_is_an_error() -> None:
    data = json.loads(GOLDEN.read_text())
    data["cache"]["later"] = 1
    with pytest.raises(msgspec.ValidationError, match="unknown field `later`"):
        msgspec.convert(data, Manifest)

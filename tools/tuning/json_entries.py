"""Rows from JSON values: objects, nested or not, lists of them, and results whose fields are lists with one item a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .columns import has_columns, match_columns
from .trace_error import TraceError

_DEEPEST = 20
_REQUIRED = ("prompt", "generated")


def entries(value: Any, where: str, chosen: Mapping[str, str], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(where it is, its fields) of each request; raises TraceError. A field of an object in it is named outer.inner.

    An entry that is no object comes as it is.
    """
    if isinstance(value, list) and depth < _DEEPEST:
        for number, each in enumerate(value, start=1):
            yield from entries(each, f"{where}, entry {number}", chosen, depth + 1)
        return
    lists = {name: each for name, each in value.items() if isinstance(each, list)} if isinstance(value, dict) else {}
    row = flat(value) if isinstance(value, dict) else value
    if lists and has_columns(lists, chosen):
        yield from _columns_of_lists(lists, where, chosen)
    elif lists and not has_columns(row, chosen) and (inner := _inner(lists, chosen)):
        yield from entries(lists[inner], f"{where}, {inner}", chosen, depth + 1)
    else:
        yield where, row


def holds_requests(value: Any, chosen: Mapping[str, str]) -> bool:
    """Whether a JSON value has an entry with columns for prompts and answers."""
    return any(isinstance(row, dict) and has_columns(row, chosen) for _, row in entries(value, "", chosen))


def flat(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of an object, those of inner objects as outer.inner; {"value": 5, "unit": "tokens"} is 5."""
    if not any(isinstance(each, dict) for each in value.values()):
        return value
    row: dict[str, Any] = {}
    open_objects = [("", value)]
    for prefix, fields in open_objects:  # grows while it is read, so that outer fields come first
        for name, field in fields.items():
            path, each = f"{prefix}{name}", field["value"] if isinstance(field, dict) and "value" in field else field
            if isinstance(each, dict) and not {"width", "height"} <= each.keys() and path.count(".") < _DEEPEST:
                open_objects.append((f"{path}.", each))
            else:
                row[path] = each
    return row


def _columns_of_lists(lists: dict[str, list], where: str, chosen: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    columns = match_columns(lists, where, chosen)
    prompts, answers = (columns[meaning] for meaning in _REQUIRED)
    count = len(lists[prompts])
    if len(lists[answers]) != count:
        raise TraceError(f"{where}: {prompts} has {count} items, but {answers} {len(lists[answers])}; expected one a request")
    same = {name: items for name, items in lists.items() if len(items) == count}
    for number in range(count):
        yield f"{where}, request {number + 1}", {name: items[number] for name, items in same.items()}


def _inner(lists: dict[str, list], chosen: Mapping[str, str]) -> str | None:
    """The name of a list of objects that are requests."""
    return next(
        (n for n, each in lists.items() if each and isinstance(each[0], dict) and has_columns(flat(each[0]), chosen)), None
    )

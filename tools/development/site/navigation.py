"""The nav of mkdocs.yml, in which patterns stand for pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NavItem = str | dict[str, Any]  # a page or a pattern, or {title: page or items}


def expanded(nav: list[NavItem], docs: Path) -> list[NavItem]:
    """The nav with every pattern replaced by the pages of `docs` that it matches and that have no place yet.

    A folder's index.md comes first, others in the order of their names. A section without pages is left out. Pages that are
    named outright are left as they are, whether they exist or not.
    """
    return _expanded(nav, docs, {page for page in pages(nav) if "*" not in page})


def pages(nav: list[NavItem]) -> list[str]:
    """The pages and patterns of a nav in order."""
    named: list[str] = []
    for item in nav:
        for value in item.values() if isinstance(item, dict) else (item,):
            named += [value] if isinstance(value, str) else pages(value)
    return named


def _expanded(nav: list[NavItem], docs: Path, placed: set[str]) -> list[NavItem]:
    result: list[NavItem] = []
    for item in nav:
        if isinstance(item, str):
            result += _matches(item, docs, placed) if "*" in item else [item]
        else:
            result += _section(item, docs, placed)
    return result


def _section(item: dict[str, Any], docs: Path, placed: set[str]) -> list[NavItem]:
    ((title, value),) = item.items()
    content = value if isinstance(value, str) else _expanded(value, docs, placed)
    return [{title: content}] if content else []


def _matches(pattern: str, docs: Path, placed: set[str]) -> list[str]:
    """The pages that a pattern finds; they are added to `placed`."""
    matches = {path.relative_to(docs).as_posix() for path in docs.glob(pattern)} - placed
    placed |= matches
    return sorted(matches, key=lambda page: (not page.endswith("index.md"), page))

"""Random pages for the test cases of a graph whose cache is in pages.

The pages of a row come in any order; full ones, which are only read, may belong to several rows, as with a shared prefix. The
page that a token is written into belongs to one row. B rows, T tokens, Z pages, W pages of a row.
"""

from __future__ import annotations

import numpy as np

from ..runtime.artifact import PAGE_TOKENS, GraphSpec

PADDING = 0  # the page that belongs to no row
SHARED = 0.25  # how often a row has a full page of the row before it


def most_positions(graph: GraphSpec) -> int:
    """Positions of a row that a table has entries for, and the cache pages."""
    return min(_shape(graph, "block_table")[1], _pages(graph) - 1) * PAGE_TOKENS


def most_rows(graph: GraphSpec) -> int:
    """Rows that can each have a page to write into."""
    return _pages(graph) - 1


def row_positions(graph: GraphSpec, rows: int) -> int:
    """Positions of each of `rows` rows: one page, where none is left to read."""
    return most_positions(graph) if rows < most_rows(graph) else PAGE_TOKENS


def _pages(graph: GraphSpec) -> int:
    return next(spec.shape[0] for spec in graph.inputs if "_cache." in spec.name)


def _shape(graph: GraphSpec, name: str) -> tuple[int, ...]:
    return next(spec.shape for spec in graph.inputs if spec.name == name)


def draw_pages(
    graph: GraphSpec, past: np.ndarray, count: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """block_table [B, W] and slot_mapping [B, T] for rows of `past` tokens [B] and `count` new ones [B].

    Padding is in PADDING.
    """
    table, free = np.zeros(_shape(graph, "block_table"), np.int32), list(1 + rng.permutation(_pages(graph) - 1))
    first = past // PAGE_TOKENS  # the first page that is written, if any is
    for b in np.flatnonzero(count):
        for j in range(first[b], (past[b] + count[b] - 1) // PAGE_TOKENS + 1):
            table[b, j] = free.pop()
    read: list[int] = []
    for b in np.flatnonzero(count):
        for j in range(first[b]):
            shared = b > 0 and j < first[b - 1] and rng.random() < SHARED
            table[b, j] = table[b - 1, j] if shared else free.pop() if free else rng.choice(read)
            read.append(table[b, j])
    return table, _slots(table, past, count, _shape(graph, "slot_mapping"))


def _slots(table: np.ndarray, past: np.ndarray, count: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where each new token is written: PAGE_TOKENS * page + place; padding all over PADDING."""
    rows, tokens = np.indices(shape)
    at = past[:, None] + tokens
    pages = np.take_along_axis(table, np.minimum(at // PAGE_TOKENS, table.shape[1] - 1), axis=1)
    places = pages * PAGE_TOKENS + at % PAGE_TOKENS
    padding = PADDING * PAGE_TOKENS + (rows * shape[1] + tokens) % PAGE_TOKENS
    return np.where(tokens < count[:, None], places, padding).astype(np.int32)


def held_places(table: np.ndarray, past: np.ndarray, pages: int) -> np.ndarray:
    """The places that tokens of the past are in, bool [Z, PAGE_TOKENS]."""
    held = np.zeros((pages, PAGE_TOKENS), bool)
    for row, length in zip(table, past, strict=True):
        at = np.arange(length)
        held[row[at // PAGE_TOKENS], at % PAGE_TOKENS] = True
    return held


def written_places(slot_mapping: np.ndarray, count: np.ndarray, pages: int) -> np.ndarray:
    """The places that new tokens are written to, bool [Z, PAGE_TOKENS]."""
    real = np.arange(slot_mapping.shape[1]) < count[:, None]
    written = np.zeros(pages * PAGE_TOKENS, bool)
    written[slot_mapping[real]] = True
    return written.reshape(pages, PAGE_TOKENS)

"""Random pages for certificates: what a table may look like, and what counts as held and as written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from staticvl.compiler.cases import find_cases
from staticvl.compiler.page_cases import draw_pages, held_places, most_positions, row_positions, written_places
from staticvl.runtime.artifact import GraphSpec, Kind, TensorSpec

PAGE = 128


def graph(kind: Kind, bucket: int, *, pages: int, width: int) -> GraphSpec:
    b, t = (bucket, 1) if kind == "decode" else (1, bucket)
    shapes: dict[str, Any] = {"block_table": (b, width), "slot_mapping": (b, t)}
    inputs = [TensorSpec(name=name, dtype="int32", shape=shape) for name, shape in shapes.items()]
    inputs.append(TensorSpec(name="k_cache.0", dtype="float16", shape=(pages, PAGE, 1, 16)))
    logits = TensorSpec(name="logits", dtype="float32", shape=(b, 8))
    return GraphSpec(kind=kind, bucket=bucket, file="", key="", inputs=tuple(inputs), outputs=(logits,), cost_ms=0.0)


GRAPHS = [
    graph("decode", 4, pages=17, width=4),
    graph("decode", 4, pages=7, width=4),  # fewer pages than four whole rows take
    graph("decode", 4, pages=5, width=2),  # one page for each row: none is left to read
    graph("decode", 4, pages=3, width=2),  # fewer pages than rows
    graph("prefill", 256, pages=9, width=5),
    graph("prefill", 64, pages=2, width=2),
    graph("verify", 5, pages=9, width=3),
]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda each: f"{each.name} {each.inputs[2].shape[0]} pages")
def test_every_case_has_a_table_that_a_runtime_could_have(graph: GraphSpec, seed: int) -> None:
    rng, pages = np.random.default_rng(seed), graph.inputs[2].shape[0]
    for case in find_cases(graph, 2):
        table, slots = draw_pages(graph, case.past, case.count, rng)
        writers: list[int] = []
        readers: set[int] = set()
        for b, (past, count) in enumerate(zip(case.past, case.count, strict=True)):
            needed = -(-(past + count) // PAGE) if count else 0
            assert not table[b, needed:].any() and all(0 < page < pages for page in table[b, :needed])
            if count:
                writers += table[b, past // PAGE : needed].tolist()
                readers |= set(table[b, : past // PAGE].tolist())
            for t, slot in enumerate(slots[b].tolist()):
                at = past + t
                owned = table[b, at // PAGE] * PAGE + at % PAGE if t < count else None
                assert slot == owned if owned is not None else slot // PAGE == 0
        assert len(set(writers)) == len(writers) and not readers & set(writers)


def test_pages_are_shared_and_in_any_order() -> None:
    each, rng = GRAPHS[0], np.random.default_rng(0)
    past, count = np.full(4, 4 * PAGE - 1, np.int32), np.ones(4, np.int32)
    tables = [draw_pages(each, past, count, rng)[0] for _ in range(8)]
    assert any(len(set(table[:, :3].flatten().tolist())) < 12 for table in tables)
    assert any(table[0, 0] > table[0, 1] for table in tables) and not np.array_equal(tables[0], tables[1])


def test_cases_reach_as_far_as_pages_do() -> None:
    assert most_positions(GRAPHS[0]) == 4 * PAGE and most_positions(GRAPHS[5]) == PAGE
    assert row_positions(GRAPHS[2], 4) == PAGE and row_positions(GRAPHS[2], 3) == 2 * PAGE
    assert [int(case.count.sum()) for case in find_cases(GRAPHS[3], 0)][-1] == 2


def test_places_that_are_held_and_written() -> None:
    table = np.array([[3, 1], [2, 0]], np.int32)
    held = held_places(table, np.array([PAGE + 2, 1]), 5)
    assert held.sum() == PAGE + 3 and held[3].all() and held[1, :2].all() and held[2, 0]
    written = written_places(np.array([[PAGE + 2], [7]], np.int32), np.array([1, 0]), 5)
    assert written.sum() == 1 and written[1, 2]

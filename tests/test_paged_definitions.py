"""Graphs over pages against the same graphs over slots: one model, the same tokens, tables in any order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from staticvl.compiler.buckets import Buckets
from staticvl.compiler.graphs import GraphContext, GraphDef, define_graph
from staticvl.compiler.options import Options
from staticvl.compiler.plan import make_plan
from staticvl.model_defs import ops
from staticvl.model_defs.config import ModelConfig, read_config
from staticvl.runtime.artifact import PAGE_TOKENS, GraphKey, ImageProcessorConfig, Kind
from staticvl.runtime.rope import query_scales, rope_tables

from .conftest import EMBEDDED
from .tiny_families import GOLDEN_QWEN

CHUNK, ROWS, DRAFT, CONTEXT = 48, 3, 4, 300
GARBAGE = 30.0


@dataclass
class Sequence:
    """The tokens that it is about to be given, how many are in the cache, and where: a slot, or pages."""

    tokens: np.ndarray
    slot: int
    pages: list[int]
    past: int = 0
    last: Tensor | None = None  # logits


@dataclass
class Device:
    """One model's graphs with caches in slots, or in pages."""

    config: ModelConfig
    weights: dict[str, Tensor]
    paged: bool
    context: GraphContext = field(init=False)
    known: dict[int, Sequence] = field(default_factory=dict)  # by slot

    def __post_init__(self) -> None:
        third = (0.3, 0.4, 0.5)
        image = ImageProcessorConfig(mode="stretch", size=28, rows=self.config.vision.rows_per_tile, mean=third, std=third)
        buckets = Buckets(prefill=(CHUNK,), decode=(ROWS,), verify=(DRAFT,), context=CONTEXT, slots=ROWS)
        kv = "pages" if self.paged else "slots"
        options = Options(checkpoint=Path(), out=Path(), backend="ascend", kv=kv, candidates=0, buckets=buckets)
        plan = make_plan(self.config, options)
        eight = {"text_dtype": "int8"} if self.config.text.int8_cache else {}
        self.context = GraphContext(config=self.config, image=image, cache=msgspec.structs.replace(plan.cache, **eight))
        random = torch.Generator().manual_seed(3)
        self.caches = {
            name: GARBAGE * torch.randn(shape, generator=random) for name, shape in self.context.cache.buffers().items()
        }

    def run(self, kind: Kind, bucket: int, rows: list[Sequence], count: int) -> Tensor:
        """The next `count` tokens of each sequence; rows of the first output that are not padding."""
        self.known |= {row.slot: row for row in rows}
        graph = define_graph(self.context, GraphKey(kind, bucket))
        feed = self.feed(graph, rows, count)
        slots = slice(None) if self.paged or kind == "decode" else slice(rows[0].slot, rows[0].slot + 1)
        caches = {name: value[slots] for name, value in self.caches.items()}
        with torch.no_grad():
            inputs = tuple(({**feed, **caches})[spec.name] for spec in graph.inputs)
            result = torch.func.functional_call(graph.module, self.weights, inputs)
        for name, value in zip(caches, result[1:], strict=True):
            caches[name].copy_(value)
        for row in rows:
            row.past += count
        return result[0][:count] if kind == "verify" else result[0]

    def feed(self, graph: GraphDef, rows: list[Sequence], count: int) -> dict[str, Tensor]:
        shapes = {spec.name: spec.shape for spec in graph.inputs}
        t = shapes["token_ids"][1]
        feed: dict[str, Any] = {name: np.zeros(shape) for name, shape in shapes.items() if name not in self.caches}
        if not self.paged and graph.kind == "decode":  # what does not take part is written after its tokens
            feed["lengths"][list(self.known)] = [row.past for row in self.known.values()]
        for place, row in self._places(rows, graph.kind):
            feed["token_ids"][place, :count] = row.tokens[row.past : row.past + count]
            feed["lengths"][place] = row.past
            if self.paged:
                feed["block_table"][place, : len(row.pages)] = row.pages
                at = row.past + np.arange(count)
                feed["slot_mapping"][place, :count] = np.array(row.pages)[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS
        positions = feed["lengths"].astype(int)[:, None] + np.arange(t)
        rope, width = self.config.text.rope, shapes["rope_cos"][-1]
        feed["rope_cos"], feed["rope_sin"] = (table[positions] for table in rope_tables(rope, width, CONTEXT + CHUNK))
        if "query_scale" in feed:
            feed["query_scale"] = query_scales(rope, CONTEXT + CHUNK)[positions][..., None]
        if "row_index" in feed:
            feed["row_index"][...] = -1
        if "last_index" in feed:
            feed["last_index"][0] = count - 1
        dtypes = {spec.name: getattr(torch, spec.dtype) for spec in graph.inputs}
        return {name: torch.from_numpy(np.ascontiguousarray(value)).to(dtypes[name]) for name, value in feed.items()}

    def _places(self, rows: list[Sequence], kind: Kind) -> list[tuple[int, Sequence]]:
        """Rows of a decode step are slots, or over pages in any order."""
        return list(enumerate(rows)) if self.paged or kind != "decode" else [(row.slot, row) for row in rows]


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    """Of a size that keeps activations near 1."""
    torch.manual_seed(1)
    graph = define_graph(Device(config, {}, paged=False).context, GraphKey("prefill", CHUNK))
    values = {}
    for name, parameter in graph.module.named_parameters():
        value = torch.randn(parameter.shape) / max(1, parameter.shape[-1]) ** 0.5
        values[name] = value.abs() / 10 + 0.01 if name.endswith("_scale") else 1 + value if "norm.weight" in name else value
    return values


def config_of(name: str) -> ModelConfig:
    config = read_config(GOLDEN_QWEN if name == "qwen_vl" else EMBEDDED)
    positions = max(config.text.max_positions, 400)
    return replace(config, text=replace(config.text, int8_cache=name == "int8", max_positions=positions))


@pytest.mark.parametrize("name", ["llava", "qwen_vl", "int8"])
def test_pages_give_what_slots_give(name: str) -> None:
    """Chunks, decode steps of rows in another order, drafts; two prompts share the page of their first tokens."""
    config, rng = config_of(name), np.random.default_rng(0)
    weights = weights_of(config)
    slots, pages = (Device(config, weights, paged=paged) for paged in (False, True))
    tokens = rng.integers(0, config.text.vocab_size, (3, 200))
    tokens[2, :PAGE_TOKENS] = tokens[0, :PAGE_TOKENS]
    tables = [[5, 2], [7, 1], [5, 3]]
    kept, paged = ([Sequence(tokens[i], i, tables[i]) for i in range(3)] for _ in "sp")
    for i, length in ((0, 140), (1, 60), (2, 150)):
        if i == 2:
            paged[2].past = PAGE_TOKENS  # found in the page of the first
        for device, rows in ((slots, kept), (pages, paged)):
            while rows[i].past < length:
                count = min(CHUNK, length - rows[i].past)
                rows[i].last = device.run("prefill", CHUNK, [rows[i]], count)
        alike(paged[i].last, kept[i].last)
    for order in ([2, 0], [1], [0, 1, 2]):
        expected = slots.run("decode", ROWS, [kept[i] for i in order], 1)
        found = pages.run("decode", ROWS, [paged[i] for i in order], 1)
        alike(found[: len(order)], expected[order])
    alike(pages.run("verify", DRAFT, [paged[1]], 3), slots.run("verify", DRAFT, [kept[1]], 3))


def alike(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None and torch.isfinite(expected).all()
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_the_definition_touches_nothing_but_its_places() -> None:
    torch.manual_seed(0)
    k_cache, v_cache = (torch.randn(4, 8, 2, 4) for _ in "kv")
    q, k, v = torch.randn(2, 1, 16), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    lengths, table = torch.tensor([9, 3], dtype=torch.int32), torch.tensor([[3, 1], [2, 0]], dtype=torch.int32)
    slots = torch.tensor([[9], [19]], dtype=torch.int32)
    out, *caches = ops.paged_attention(q, k, v, k_cache, v_cache, lengths, table, slots, 4)
    for cache, before, new in zip(caches, (k_cache, v_cache), (k, v), strict=True):
        changed = (cache != before).any(-1).any(-1)
        assert changed.nonzero().tolist() == [[1, 1], [2, 3]]
        assert torch.equal(cache[1, 1].flatten(), new[0, 0]) and torch.equal(cache[2, 3].flatten(), new[1, 0])
    for b, length in enumerate((10, 4)):
        rows = torch.stack([torch.stack([cache[table[b, p // 8], p % 8] for p in range(length)]) for cache in caches])
        for head in range(4):
            scores = rows[0, :, head // 2] @ q[b, 0].view(4, 4)[head] / 2
            expected = scores.softmax(0) @ rows[1, :, head // 2]
            torch.testing.assert_close(out[b, 0].view(4, 4)[head], expected, rtol=1e-5, atol=1e-6)

"""Test cases of a graph: inputs at the edges of its bucket.

Silent errors that appear only at certain lengths are the best-known failure of systems with fixed shapes. So each graph
runs at length = bucket, bucket - 1, previous bucket + 1 and 1, into an empty cache and after earlier tokens up to the
cache's end; the cache holds large garbage wherever no token is, as it does in use. Where it is in pages, tables are random
(page_cases.py). Vision graphs run with every number of tiles that they serve.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..runtime.artifact import CROSS_HIDDEN, GraphSpec, ModelInfo, TensorSpec, is_cached
from ..runtime.backends.base import Backend, Feed, new_feed
from ..runtime.rope import query_scales, rope_tables
from .page_cases import draw_pages, held_places, most_positions, most_rows, row_positions

GARBAGE = 30.0
# Standard deviation of the noise in a cache in 8 bits, in steps. With more, scores become so large that the rounding of float32
# shows: keys of noise match a query far better, or worse, than those of a model.
STEPS = 12.0
NOISE = 65521  # a prime, so that repeated noise does not line up with heads and rows


@dataclass(frozen=True, slots=True)
class Case:
    """One feed. `past` and `count` [B]: tokens in each row's cache before the step, and real new ones."""

    name: str
    past: np.ndarray
    count: np.ndarray


def find_cases(graph: GraphSpec, previous: int) -> Iterator[Case]:
    """The cases of one graph, the fullest last; `previous` is the next smaller bucket, or 0."""
    return _vision_cases(graph, previous) if graph.kind == "vision" else _text_cases(graph, previous)


def rows_of(graph: GraphSpec, case: Case) -> np.ndarray:
    """The rows of a text graph's first output that are not padding: bool [B], or [T] for logits of each token."""
    each = graph.kind == "verify" and graph.outputs[0].name == "logits"
    return np.arange(graph.bucket) < case.count[0] if each else case.count > 0


class CaseMaker:
    """Feeds and cache contents for the cases of one model's graphs; the same for the same seed."""

    def __init__(self, info: ModelInfo, vocab: int, seed: int = 0) -> None:
        """`vocab`: rows of the embedding table."""
        self.info, self.vocab, self.seed = info, vocab, seed
        self.noise = np.random.default_rng(seed).standard_normal(NOISE, np.float32)
        self.restart()

    def restart(self) -> None:
        """Restart the random numbers, so that the inputs of a graph do not depend on the graphs before it."""
        self.rng = np.random.default_rng(self.seed)

    def feed(self, graph: GraphSpec, case: Case) -> Feed:
        """Every input but the caches."""
        return self._vision_feed(graph, case) if graph.kind == "vision" else self._text_feed(graph, case)

    def _vision_feed(self, graph: GraphSpec, case: Case) -> Feed:
        feed, rng = new_feed(graph), self.rng
        tiles = int(case.count[0])
        if "features" in feed:  # of a later stage of a pipeline
            feed["features"][...] = rng.standard_normal(feed["features"].shape, np.float32)
            return feed
        feed["pixels"][:tiles] = rng.integers(0, 256, feed["pixels"][:tiles].shape)
        if "tile_count" in feed:
            # Garbage in unused tiles must not matter.
            feed["pixels"][tiles:] = rng.integers(0, 256, feed["pixels"][tiles:].shape)
            feed["tile_count"][0] = tiles
            feed["aspect_id"][0] = 1 + max(i for i, grid in enumerate(self.info.image.grids) if grid[0] * grid[1] == tiles)
        return feed

    def fill(self, graph: GraphSpec, case: Case, feed: Feed, backends: Iterable[Backend]) -> dict[str, int]:
        """Random keys and values where tokens are, large garbage elsewhere; the same in all backends.

        Returns where in the noise each buffer starts: a third copy of a long cache could take all remaining memory.
        """
        starts = {}
        for spec in graph.inputs:
            if not is_cached(spec.name):
                continue
            start = starts[spec.name] = int(self.rng.integers(NOISE))
            value = self.past(spec, case, feed, start) if "_cache." in spec.name else self._noise(spec.shape, start)
            for backend in backends:
                backend.write_cache(spec.name, value)
        return starts

    def past(self, spec: TensorSpec, case: Case, feed: Feed, start: int) -> np.ndarray:
        """The contents of a cache buffer before the step."""
        value = self._noise(spec.shape, start)
        if "block_table" in feed:
            value[~held_places(feed["block_table"], case.past, len(value))] *= GARBAGE
        else:
            for b, past in enumerate(case.past):
                value[b, :, past:] *= GARBAGE
        return np.clip(np.rint(STEPS * value), -128, 127) if spec.dtype == "int8" else value

    def _noise(self, shape: tuple[int, ...], start: int) -> np.ndarray:
        """The same noise from another start: drawing afresh for every layer would take longer than the checks."""
        return np.resize(np.roll(self.noise, -start), shape)

    def _text_feed(self, graph: GraphSpec, case: Case) -> Feed:
        feed, rng = new_feed(graph), self.rng
        b, t, _ = feed["rope_cos"].shape
        count = int(case.count[0])
        if "token_ids" in feed:
            feed["token_ids"][...] = rng.integers(0, self.vocab, (b, t))
        if "hidden" in feed:
            feed["hidden"][...] = rng.standard_normal(feed["hidden"].shape, np.float32)
        feed["lengths"][...] = case.past
        if "block_table" in feed:
            feed["block_table"][...], feed["slot_mapping"][...] = draw_pages(graph, case.past, case.count, rng)
        positions = case.past[:, None] + np.arange(t)
        rope, rows = self.info.rope, int(positions.max()) + 1
        tables = rope_tables(rope, feed["rope_cos"].shape[-1], rows)
        feed["rope_cos"][...], feed["rope_sin"][...] = (table[positions] for table in tables)
        if "query_scale" in feed:
            feed["query_scale"][..., 0] = query_scales(rope, rows)[positions]
        if "cross_mask" in feed:
            self._show_images(feed, rng)
        if "last_index" in feed:
            feed["last_index"][0] = count - 1
        if "inverse_temperature" in feed:
            feed["inverse_temperature"][...] = rng.uniform(0.5, 2, feed["inverse_temperature"].shape)
        if graph.kind != "decode":
            for name in ("token_ids", "hidden"):
                if name in feed:
                    feed[name][0, count:] = 0
        if "row_index" in feed:
            feed["image_rows"][...] = rng.standard_normal(feed["image_rows"].shape, np.float32)
            from_image = rng.random(t) < 0.5
            feed["row_index"][0] = np.where(from_image, rng.permutation(t), -1)
            feed["row_index"][0, count:] = -1
        return feed

    @staticmethod
    def _show_images(feed: Feed, rng: np.random.Generator) -> None:
        """Every token sees tiles of its own choice, or, every third of them, none; the gates are on, half on and off."""
        visible = rng.random(feed["cross_mask"].shape) < 0.5
        visible &= rng.random((*visible.shape[:2], 1)) < 2 / 3
        feed["cross_mask"][...] = np.where(visible, 0, CROSS_HIDDEN)
        some = visible.any(-1)
        feed["cross_gate"][..., 0] = some | (rng.random(some.shape) < 0.5)
        feed["cross_gate"][..., 1] = some


def _vision_cases(graph: GraphSpec, previous: int) -> Iterator[Case]:
    """Each tile count that the bucket serves."""
    for tiles in range(previous + 1, graph.bucket + 1):
        yield Case(f"tiles {tiles}", np.zeros(1, np.int32), np.array([tiles], np.int32))


def _text_cases(graph: GraphSpec, previous: int) -> Iterator[Case]:
    """Edge lengths of a prefill or verify bucket, edge batch sizes of a decode bucket, with short, middle and full caches."""
    paged = any(spec.name == "block_table" for spec in graph.inputs)
    rows = most_positions(graph) if paged else next(spec.shape[2] for spec in graph.inputs if "_cache." in spec.name)
    if graph.kind != "decode":
        t = graph.bucket
        for count in sorted({t, t - 1, min(previous + 1, t), 1} - {0}):
            yield Case(f"length {count}, past 0", np.zeros(1, np.int32), np.array([count], np.int32))
        for past in sorted({min(1, rows - t), (rows - t) // 2, rows - t} - {0}):
            for count in sorted({t, min(previous + 1, t)}):
                yield Case(f"length {count}, past {past}", np.array([past], np.int32), np.array([count], np.int32))
        return
    b = graph.bucket
    most = min(b, most_rows(graph)) if paged else b
    for active in sorted({most, min(previous + 1, most)}):
        rows = row_positions(graph, active) if paged else rows
        # From an almost empty to a full cache, row by row; rows that do not take part have length 0.
        for name, lengths in (("rising", np.linspace(1, rows - 1, b)), ("falling", np.linspace(rows - 1, 1, b))):
            count = (np.arange(b) < active).astype(np.int32)
            past = np.where(count, lengths, 0).astype(np.int32)
            yield Case(f"rows {active}, {name} lengths up to {past.max()}", past, count)

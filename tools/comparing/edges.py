"""Edge cases: requests that run every compiled graph at the edges of its bucket, where silent errors of fixed shapes appear.

prefill at 1 token, one more than the next smaller bucket, one less than the bucket and the bucket, and after earlier tokens;
decode with as many rows as the bucket and as few as it serves; vision with every number of tiles that a bucket serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...runtime.artifact import GraphKey, Kind, Manifest, ModelInfo
from ...runtime.processor.tiles import grid_of
from .samples import QUESTION, TEXTS, Sample, image, user_sample

FORCED = 3  # tokens after a decode case's prompts


@dataclass(frozen=True, slots=True)
class EdgeRequest:
    """A sample of another length in positions; None: as it is. A text is `ids` after its first token; after images, which
    stay whole, `ids` are appended."""

    sample: Sample
    length: int | None
    ids: np.ndarray


@dataclass(frozen=True, slots=True)
class Edge:
    """One edge case of one graph: requests that run together, and the one bucket of each kind that they may use."""

    graph: str
    column: str
    requests: tuple[EdgeRequest, ...]
    answers: tuple[np.ndarray, ...]
    route: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.graph}, {self.column}"


def edges(manifest: Manifest, seed: int = 0) -> list[Edge]:
    """Cases of every graph of an artifact."""
    maker = _Maker(manifest, seed)
    return [*maker.vision(), *maker.prefill(), *maker.decode()]


class _Maker:
    def __init__(self, manifest: Manifest, seed: int) -> None:
        self.manifest, self.info = manifest, manifest.model
        rng = np.random.default_rng(seed)
        # Not the first ids, among which special tokens are, nor the last.
        self.ids = rng.integers(3, max(4, self.info.tokenizer.used // 2), manifest.cache.context).astype(np.int64)
        self.base_samples = {0: user_sample("text", TEXTS[0])}

    def _edge(self, key: GraphKey, column: str, requests: list[EdgeRequest], forced: int, **route: int) -> Edge:
        answers = tuple(self.ids[i + 5 : i + 5 + forced] for i in range(len(requests)))
        return Edge(key.name, column, tuple(requests), answers, route)

    def _variants(self, kind: Kind) -> Iterator[tuple[GraphKey, int]]:
        """Every graph of a kind, and the next smaller bucket."""
        buckets = self.manifest.buckets(kind)
        for graph in sorted((g for g in self.manifest.graphs if g.kind == kind), key=lambda g: (g.images, g.bucket)):
            yield graph.graph_key, max((b for b in buckets if b < graph.bucket), default=0)

    def _base(self, images: int) -> Sample:
        if images not in self.base_samples:
            drawings = tuple(image(i) for i in range(images))
            self.base_samples[images] = user_sample(f"text with {images} images", QUESTION, drawings)
        return self.base_samples[images]

    def prefill(self) -> Iterator[Edge]:
        rows = self.manifest.cache.rows
        for key, previous in self._variants("prefill"):
            bucket = key.bucket
            lengths = {"1": 1, "least": previous + 1, "full - 1": bucket - 1, "full": bucket}
            if 2 * bucket <= min(rows, self.manifest.cache.context - 1):
                lengths["2 x full"] = 2 * bucket
            used: set[int] = set()
            for column, length in lengths.items():
                if 1 <= length < self.manifest.cache.context and length not in used:
                    used.add(length)
                    request = EdgeRequest(self._base(key.images), length, self.ids)
                    yield self._edge(key, column, [request], 1, prefill=bucket)

    def decode(self) -> Iterator[Edge]:
        longest = self.manifest.cache.context - FORCED
        for key, previous in self._variants("decode"):
            for column, rows in (("least", previous + 1), ("full", key.bucket)):
                if column == "least" and rows == key.bucket:
                    continue
                lengths = [min(longest, 5 + 3 * i) for i in range(rows)]
                requests = [
                    EdgeRequest(self._base(key.images), length, np.roll(self.ids, -7 * i)) for i, length in enumerate(lengths)
                ]
                yield self._edge(key, column, requests, FORCED)

    def vision(self) -> Iterator[Edge]:
        tile_grids = _tile_grids(self.info, max(self.manifest.buckets("vision")))
        previous = 0
        for bucket in self.manifest.buckets("vision"):
            for tiles, grids in sorted(tile_grids.items()):
                if previous < tiles <= bucket:
                    images = tuple(image(tiles + 11 * i, grid, self.info.image.size) for i, grid in enumerate(grids))
                    sample = user_sample(f"{tiles} tiles", QUESTION, images)
                    key, requests = GraphKey("vision", bucket), [EdgeRequest(sample, None, self.ids)]
                    yield self._edge(key, f"{tiles} tiles", requests, 1, vision=bucket)
            previous = bucket


def _tile_grids(info: ModelInfo, most: int) -> dict[int, list[tuple[int, int]]]:
    """By number of tiles of one run: grids (rows, columns) of images that have so many."""
    if info.image.mode in ("anyres", "tiles"):
        overview = 1 if info.image.mode == "anyres" else 0
        size = info.image.size  # an image of exactly these tiles is cut into them
        assert all(grid_of((c * size, r * size), info.image) == (r, c) for r, c in info.image.grids)
        return {overview + rows * columns: [(rows, columns)] for rows, columns in info.image.grids}
    return {n: [(1, 1)] * n for n in range(1, min(most, 4) + 1)}

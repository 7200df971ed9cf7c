"""A backend whose results a person can check by hand, for tests of everything around the graphs.

Legend: B rows, T tokens, S cache rows, C hidden size, V vocabulary, P rows per tile.

The arithmetic, all of it in integers:

    vision     row r of a tile whose pixels sum to s is C times the number (s + r) % 1009
    value      what stands at a position: its token id, or the number in its image row
    cache      a position keeps (value + 1) * (position + 1)
    logits     1 at (sum of what the cache keeps, up to the last real token) % V, 0 elsewhere

So tokens 5, 7 in an empty cache leave 6 * 1 + 8 * 2 = 22, and 22 % V is the next token. A position is read off the rope
tables, as in a real graph, whose keys are rotated by them. Padding leaves numbers in the cache like any other token: one
wrong slot, length, last_index, row_index, rope row or stale cache row, and the next token is another one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..artifact import GraphSpec, Manifest

PICTURE_NUMBERS = 1009  # a prime above any vocabulary that tests use, so that pictures differ from tokens


class FakeBackend:
    """See backends.base.Backend. Every cache buffer holds the same numbers, as float64 [slots, K, S, D]."""

    def __init__(self, manifest: Manifest) -> None:
        self.spec, theta = manifest.cache, manifest.model.rope_theta
        self.kept = np.zeros((self.spec.slots, self.spec.rows), np.int64)  # [slots, S]
        self.outputs: dict[str, np.ndarray] = {}
        # The slowest of the rope frequencies: its angle stays below half a turn, so it says the position.
        self.frequency = theta ** -((self.spec.head_dim - 2) / self.spec.head_dim)
        if self.spec.rows * self.frequency >= np.pi:
            raise ValueError(
                f"{self.spec.rows} cache rows cannot be told apart by rope tables with theta {theta}; use a larger theta"
            )

    def load(self, graph: GraphSpec) -> None:
        if graph.name not in self.outputs:
            first = graph.outputs[0]
            self.outputs[graph.name] = np.zeros(first.shape, first.dtype)

    def unload(self, graph: GraphSpec) -> None:
        self.outputs.pop(graph.name, None)

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0) -> np.ndarray:
        self.load(graph)
        _check_feed(graph, feed)
        output = self.outputs[graph.name]
        if graph.kind == "vision":
            output[...] = _image_rows(feed["pixels"], output.shape[1])[..., None]
            return output
        values, last = feed["token_ids"].astype(np.int64), np.zeros(len(feed["token_ids"]), np.int64)  # [B, T], [B]
        if graph.kind == "prefill":
            taken = np.rint(feed["image_rows"][feed["row_index"], 0]).astype(np.int64)
            values, last = np.where(feed["row_index"] >= 0, taken, values), feed["last_index"].astype(np.int64)
        self._write(values, feed, slot)
        ends = feed["lengths"] + last + 1  # [B]
        sums = [int(self.kept[slot + b, :end].sum()) for b, end in enumerate(ends)]
        output[...] = 0
        output[np.arange(len(sums)), np.array(sums) % output.shape[1]] = 1
        return output

    def _write(self, values: np.ndarray, feed: Mapping[str, np.ndarray], slot: int) -> None:
        """Every row of the batch writes its T numbers from `lengths` on, padding and rows that take no part included."""
        positions = np.rint(np.arctan2(feed["rope_sin"][..., -1], feed["rope_cos"][..., -1]) / self.frequency).astype(np.int64)
        numbers = (values + 1) * (positions + 1)  # [B, T]
        for b, start in enumerate(feed["lengths"]):
            end = start + numbers.shape[1]
            if not 0 <= start < end <= self.spec.rows:
                raise ValueError(f"rows {start} to {end} of slot {slot + b} were to be written; the cache has {self.spec.rows}")
            self.kept[slot + b, start:end] = numbers[b]

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        shape = (slots, self.spec.kv_heads, self.spec.rows, self.spec.head_dim)
        return np.broadcast_to(self.kept[:slots, None, :, None], shape).astype(np.float64)

    def write_cache(self, name: str, value: np.ndarray) -> None:
        self.kept[: len(value)] = np.rint(value[:, 0, :, 0])


def _check_feed(graph: GraphSpec, feed: Mapping[str, np.ndarray]) -> None:
    """A real backend binds arrays as they are, so a wrong shape or dtype is an error and not a conversion."""
    for spec in graph.inputs:
        if "_cache." in spec.name:
            continue
        if spec.name not in feed:
            raise ValueError(f"{graph.name}: input {spec.name} was not fed; given: {', '.join(feed)}")
        array = feed[spec.name]
        if array.shape != spec.shape or array.dtype.name != spec.dtype:
            raise ValueError(
                f"{graph.name}: {spec.name} is {array.dtype.name} {array.shape}; expected {spec.dtype} {spec.shape}"
            )


def _image_rows(pixels: np.ndarray, rows: int) -> np.ndarray:
    """pixels [tiles, side, side, 3] -> the number of each row, int64 [tiles, P]."""
    sums = pixels.astype(np.int64).sum(axis=(1, 2, 3))
    return (sums[:, None] + np.arange(rows)) % PICTURE_NUMBERS

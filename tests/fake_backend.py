"""A backend whose results a person can check by hand, for tests of everything around the graphs.

Legend: B rows, T tokens, S cache rows, C hidden size, V vocabulary, P rows per tile, n images of t tiles.

The arithmetic, all of it in integers:

    vision     row r of a tile whose pixels sum to s is C times the number (s + r) % 1009
    value      what stands at a position: its token id, or the number in its image row
    cache      a position keeps (value + 1) * (position * ntk + 1), where ntk is the factor of dynamic NTK, else 1
    logits     1 at (sum of what the cache keeps, up to the last real token) % V, 0 elsewhere; a verify graph has such a row
               for each of its tokens
    candidates the likeliest tokens of the rows, and their mass, where the graph has such outputs

So tokens 5, 7 in an empty cache leave 6 * 1 + 8 * 2 = 22, and 22 % V is the next token. Position and factor are read off
the rope tables, as in a real graph, whose keys are rotated by them. Padding leaves numbers in the cache like any other
token: one wrong slot, length, last_index, row_index, rope row or stale cache row, and the next token is another one.

In a cache of pages a position keeps the same in its place of its page. Then a table or a place that contradicts the other,
a page that is written while another row has it, and padding anywhere but in page 0 are errors; what was never written, and
what `spoil` was called for, reads as something else.

With cross-attention a vision graph leaves one number for each tile in the entries of its image: tile i of an image
shaped as `aspect_id` says keeps (s + (i + 1) * aspect_id) % 1009, where s is 0 in a tile that is not in use. A text graph
with images > 0 adds to every value the numbers of the tiles that cross_mask shows, times the first gate, and then the second
gate. One with images = 0 adds nothing. Where queries are scaled, a scale that does not belong to its position is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from staticvl.runtime.artifact import CROSS_HIDDEN, GraphSpec, Manifest, is_cached
from staticvl.runtime.backends.base import Result
from staticvl.runtime.rope import rope_tables
from staticvl.runtime.sampling.candidates import Candidates
from staticvl.runtime.sampling.top_logits import top_k_ids

SPOILT = 10**6  # what is kept where nothing is valid
IMAGE_NUMBERS = 1009  # a prime above any vocabulary that tests use, so that images differ from tokens


class FakeBackend:
    """See backends.base.Backend. All layers' keys and values hold the same numbers."""

    def __init__(self, manifest: Manifest) -> None:
        self.spec, self.rope = manifest.cache, manifest.model.rope
        cross, slots = self.spec.cross, self.spec.slots
        self.kept = np.zeros((slots, self.spec.rows), np.int64)  # [slots, S], or [pages, tokens of a page]
        if self.spec.pages:
            self.kept = np.full(self.spec.text_shape[:2], SPOILT)
        self.tiles = np.zeros((slots, cross.images, cross.tiles) if cross else (slots, 0, 0), np.int64)  # [slots, n, t]
        self.outputs: dict[str, np.ndarray] = {}
        self.given_back: list[tuple[int, int]] = []  # slots, and the rows that each kept
        self.fetched = 0  # rows of first outputs that somebody has asked for
        # The slowest of the rope frequencies: its angle stays below half a turn, so it says the position.
        cos, sin = rope_tables(self.rope, self.spec.head_dim, 2)
        self.frequency = float(np.arctan2(sin[1, -1], cos[1, -1]))
        if self.spec.rows * self.frequency >= np.pi:
            raise ValueError(
                f"{self.spec.rows} cache rows cannot be told apart by rope tables with theta {self.rope.theta}; use a larger "
                "theta"
            )
        self.factors = 2 ** np.arange(1, 9 if self.rope.ntk_positions else 2) - 1  # of dynamic NTK: 1, 3, 7, ...

    def load(self, graph: GraphSpec) -> None:
        if graph.name not in self.outputs:
            first = graph.outputs[0]
            self.outputs[graph.name] = np.zeros(first.shape, first.dtype)

    def unload(self, graph: GraphSpec) -> None:
        self.outputs.pop(graph.name, None)

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        self.load(graph)
        _check_feed(graph, feed)
        output = self.outputs[graph.name]
        if graph.kind == "vision":
            self._vision(feed, output, slot, image)
        else:
            self._text(graph, feed, output, slot)

        def fetch(rows: slice) -> np.ndarray:
            self.fetched += len(output[rows])
            return output[rows]

        return Result(fetch, _candidates(output, graph.candidates, feed) if graph.candidates else None)

    def _text(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], output: np.ndarray, slot: int) -> None:
        values, last = feed["token_ids"].astype(np.int64), np.zeros(len(feed["token_ids"]), np.int64)  # [B, T], [B]
        if "row_index" in feed:
            taken = np.rint(feed["image_rows"][feed["row_index"], 0]).astype(np.int64)
            values = np.where(feed["row_index"] >= 0, taken, values)
        if "last_index" in feed:
            last = feed["last_index"].astype(np.int64)
        if graph.images:
            values = values + self._seen(graph, feed, slot)
        if self.spec.pages:
            check_tables(graph, feed, self.spec.text_shape[0], self.spec.text_shape[1])
        self._write(values, feed, slot)
        if graph.kind == "verify":
            ends = [(0, int(feed["lengths"][0]) + t + 1) for t in range(graph.bucket)]
        else:
            ends = [(b, int(end)) for b, end in enumerate(feed["lengths"] + last + 1)]
        sums = [int(self._row(feed, slot, b)[:end].sum()) for b, end in ends]
        output[...] = 0
        output[np.arange(len(sums)), np.array(sums) % output.shape[1]] = 1

    def _row(self, feed: Mapping[str, np.ndarray], slot: int, b: int) -> np.ndarray:
        """What the positions of row b of a batch keep."""
        return self.kept[feed["block_table"][b]].reshape(-1) if self.spec.pages else self.kept[slot + b]

    def _vision(self, feed: Mapping[str, np.ndarray], output: np.ndarray, slot: int, image: int) -> None:
        sums = feed["pixels"].astype(np.int64).sum(axis=(1, 2, 3))  # [tiles]
        if not self.spec.cross:
            output[...] = ((sums[:, None] + np.arange(output.shape[1])) % IMAGE_NUMBERS)[..., None]
            return
        place = np.arange(len(sums))
        used = np.where(place < feed["tile_count"], sums, 0)
        self.tiles[slot, image] = (used + (place + 1) * int(feed["aspect_id"][0])) % IMAGE_NUMBERS
        output[...] = np.repeat(self.tiles[slot, image], output.shape[2] // len(sums))[:, None]

    def _seen(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int) -> np.ndarray:
        """What each token gains by looking at images, int64 [B, T]."""
        mask, gates = feed["cross_mask"], feed["cross_gate"].astype(np.int64)  # [B, T, n * t], [B, T, 2]
        if not ((mask == 0) | (mask == np.float32(CROSS_HIDDEN))).all():
            raise ValueError(f"{graph.name}: cross_mask holds other numbers than 0 and {CROSS_HIDDEN}")
        tiles = self.tiles[slot : slot + len(mask), : graph.images].reshape(len(mask), 1, -1)  # [B, 1, n * t]
        return gates[..., 0] * np.where(mask == 0, tiles, 0).sum(axis=-1) + gates[..., 1]

    def _write(self, values: np.ndarray, feed: Mapping[str, np.ndarray], slot: int) -> None:
        """Every row of the batch writes its T numbers from `lengths` on, padding and rows that take no part included."""
        positions, factors = self._positions(feed["rope_cos"], feed["rope_sin"])
        if "query_scale" in feed:
            self._check_scales(feed["query_scale"][..., 0], positions)
        numbers = (values + 1) * (positions * factors + 1)  # [B, T]
        for b, start in enumerate(feed["lengths"]):
            end = start + numbers.shape[1]
            if not 0 <= start < end <= self.spec.rows:
                raise ValueError(f"rows {start} to {end} of slot {slot + b} were to be written; the cache has {self.spec.rows}")
            if self.spec.pages:
                self.kept[np.divmod(feed["slot_mapping"][b], self.spec.text_shape[1])] = numbers[b]
            else:
                self.kept[slot + b, start:end] = numbers[b]

    def _positions(self, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position and factor of dynamic NTK, int64 [B, T], that rope tables [B, T, D] were made of.

        The factor slows the slowest frequency down by itself and leaves the fastest at one turn in 2 pi positions.
        """
        slow = np.arctan2(sin[..., -1], cos[..., -1]) / self.frequency  # [B, T]
        positions = np.rint(slow * self.factors[:, None, None]).astype(np.int64)  # [factors, B, T]
        away = np.hypot(np.cos(positions) - cos[..., 0], np.sin(positions) - sin[..., 0])
        best = away.argmin(axis=0)
        return np.take_along_axis(positions, best[None], axis=0)[0], self.factors[best]

    def _check_scales(self, scales: np.ndarray, positions: np.ndarray) -> None:
        trained = self.rope.logn_positions or self.spec.rows
        for scale, position in zip(scales.ravel(), positions.ravel(), strict=True):
            expected = max(math.log(position + 1, trained), 1.0)
            if abs(scale - expected) > 1e-5:
                raise ValueError(f"query_scale is {scale:.6f} at position {position}; expected {expected:.6f}")

    def _numbers(self, name: str) -> np.ndarray:
        """What a cache buffer holds, int64 [slots, rows]."""
        if not name.startswith("cross_"):
            return self.kept
        cross = self.spec.cross
        assert cross is not None
        return np.repeat(self.tiles[:, int(name.rsplit(".", 1)[1])], cross.rows // cross.tiles, axis=1)

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        numbers = self._numbers(name)[:slots, None, :, None]
        shape = (slots, self.spec.kv_heads, numbers.shape[2], self.spec.head_dim)
        return np.broadcast_to(numbers, shape).astype(np.float64)

    def write_cache(self, name: str, value: np.ndarray) -> None:
        if name.startswith("cross_"):
            raise NotImplementedError("the fake backend's images come from vision graphs only")
        self.kept[: len(value)] = np.rint(value[:, 0, :, 0])

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        self.kept[target, :rows] = self.kept[source, :rows]
        self.tiles[target, :images] = self.tiles[source, :images]

    def give_back(self, slot: int, rows: int) -> None:
        """What is given back reads as something else."""
        assert not self.spec.pages, "pages are not given back"
        self.kept[slot, rows:] = SPOILT
        self.given_back.append((slot, rows))

    def copy_page(self, source: int, target: int) -> None:
        pages = self.spec.text_shape[0]
        if source == target or not (0 < source < pages and 0 < target < pages):
            raise ValueError(f"page {source} was to be copied to {target}; the cache has pages 1 to {pages - 1}")
        self.kept[target] = self.kept[source]

    def spoil(self, pages: list[int]) -> None:
        """No sequence may read these pages before they are written again."""
        self.kept[pages] = SPOILT

    def use_small_pages(self) -> None:
        assert not self.kept.any(), "something was written before"


def check_tables(graph: GraphSpec, feed: Mapping[str, np.ndarray], pages: int, tokens: int) -> None:
    """Raises ValueError where `block_table` and `slot_mapping` are not as docs/artifact.md says. `tokens`: of a page."""
    tables, mapping, lengths = feed["block_table"], feed["slot_mapping"], feed["lengths"]
    held = [table[table != 0].tolist() for table in tables]
    for b, (table, own) in enumerate(zip(tables, held, strict=True)):
        if table[: len(own)].tolist() != own or len(set(own)) < len(own) or not all(0 < page < pages for page in own):
            raise ValueError(f"{graph.name}: the table of row {b} is {table.tolist()}")
        real = int(np.count_nonzero(mapping[b] >= tokens))
        positions = np.arange(lengths[b], lengths[b] + real)
        if len(own) * tokens < lengths[b] + real or not np.array_equal(
            mapping[b, :real], table[positions // tokens] * tokens + positions % tokens
        ):
            raise ValueError(f"{graph.name}: row {b} was to be written at {mapping[b].tolist()}; its table is {own}")
        expected = {"decode": int(bool(own)), "verify": max(real, 1)}  # of a draft, as many as have places
        if graph.kind == "prefill":
            expected["prefill"] = int(feed["last_index"][0]) + 1
        if not all(0 <= place < tokens for place in mapping[b, real:]) or real != expected[graph.kind]:
            raise ValueError(f"{graph.name}: row {b} has {real} places out of page 0, and {lengths[b]} tokens before them")
        written = set((mapping[b, :real] // tokens).tolist())
        if any(written & set(other) for place, other in enumerate(held) if place != b):
            raise ValueError(f"{graph.name}: row {b} writes to a page of another row: {sorted(written)}")


def _candidates(rows: np.ndarray, count: int, feed: Mapping[str, np.ndarray]) -> Candidates:
    ids = np.stack([top_k_ids(row, count) for row in rows]).astype(np.int32)
    logits = np.take_along_axis(rows, ids, axis=1)
    return Candidates(logits, ids, np.exp((rows - logits[:, :1]) * feed["inverse_temperature"][:, None]).sum(axis=1))


def _check_feed(graph: GraphSpec, feed: Mapping[str, np.ndarray]) -> None:
    """A real backend binds arrays as they are, so a wrong shape or dtype is an error and not a conversion."""
    for spec in graph.inputs:
        if is_cached(spec.name):
            continue
        if spec.name not in feed:
            raise ValueError(f"{graph.name}: input {spec.name} was not fed; given: {', '.join(feed)}")
        array = feed[spec.name]
        if array.shape != spec.shape or array.dtype.name != spec.dtype:
            raise ValueError(
                f"{graph.name}: {spec.name} is {array.dtype.name} {array.shape}; expected {spec.dtype} {spec.shape}"
            )

"""A step -> the named, padded arrays that its graph takes.

Arrays are allocated once per graph and refilled, so that a backend binds them once.

B rows, T tokens, D head dim, C hidden size, n images of t tiles.
"""

from __future__ import annotations

import numpy as np

from ..artifact import CROSS_HIDDEN, GraphKey, Manifest
from ..backends.base import Feed, new_feed
from ..processor.prompt import Prompt
from ..rope import query_scales, rope_tables
from ..sampling.top_logits import LARGEST
from .paged_cache import PagedCache
from .request import Sequence
from .scheduler import Step
from .text_cache import TextCache


class Feeds:
    """Fills the arrays of a step."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.rope: dict[float, tuple[np.ndarray, np.ndarray]] = {}  # by the factor of dynamic NTK
        self.query_scales = query_scales(manifest.model.rope, manifest.cache.rows)
        self.graphs = {graph.graph_key: graph for graph in manifest.graphs}
        self.buffers: dict[GraphKey, Feed] = {}
        self.fill = {"vision": self._vision, "prefill": self._prefill, "decode": self._decode, "verify": self._verify}

    def __call__(self, step: Step, cache: TextCache) -> Feed:
        key = step.graph_key
        feed = self.buffers.get(key)
        if feed is None:
            feed = self.buffers[key] = new_feed(self.graphs[key])
        self.fill[key.kind](feed, step, cache)
        if isinstance(cache, PagedCache) and key.kind != "vision":
            set_pages(feed, cache, step)
        return feed

    def _vision(self, feed: Feed, step: Step, cache: TextCache) -> None:
        sequence = step.sequences[0]
        prompt, start = sequence.prompt, sequence.tiles_done
        feed["pixels"][: step.count] = prompt.pixels[start : start + step.count]
        feed["pixels"][step.count :] = 0
        if "aspect_id" in feed:
            assert prompt.grids is not None, "a family with tiles says how each image was cut"
            rows, columns = map(int, prompt.grids[start // step.bucket])
            feed["tile_count"][0] = rows * columns
            feed["aspect_id"][0] = 1 + self.manifest.model.image.grids.index((rows, columns))

    def _prefill(self, feed: Feed, step: Step, cache: TextCache) -> None:
        sequence, count = step.sequences[0], step.count
        prompt, start = sequence.context, sequence.computed
        end, padded = start + count, start + step.bucket
        feed["token_ids"][0, :count] = prompt.token_ids[start:end]
        feed["token_ids"][0, count:] = 0
        if "row_index" in feed:
            rows = prompt.rows[start:end]
            places = np.flatnonzero(rows >= 0)
            feed["row_index"][...] = -1
            feed["row_index"][0, places] = np.arange(len(places), dtype=np.int32)
            feed["image_rows"][: len(places)] = sequence.features[rows[places]]
        feed["lengths"][0] = start
        feed["last_index"][0] = count - 1
        self._set_temperature(feed, sequence, 0)
        feed["rope_cos"][0], feed["rope_sin"][0] = (table[start:padded] for table in self._tables(prompt.ntk))
        if "query_scale" in feed:
            feed["query_scale"][0, :, 0] = self.query_scales[start:padded]
        if "cross_mask" in feed:
            feed["cross_mask"][...] = CROSS_HIDDEN
            feed["cross_gate"][...] = 0
            self._set_cross_attention(feed, prompt, np.s_[0, :count], np.s_[start:end])

    def _decode(self, feed: Feed, step: Step, cache: TextCache) -> None:
        slots, rows = step.slots, cache.rows_of(step.slots)
        lengths = self._lengths(cache, slots, step.bucket)
        feed["token_ids"][...] = 0
        feed["lengths"][...] = lengths
        feed["rope_cos"][:, 0], feed["rope_sin"][:, 0] = (table[lengths] for table in self._tables(1.0))
        if "query_scale" in feed:
            feed["query_scale"][:, 0, 0] = self.query_scales[lengths]
        if "cross_mask" in feed:
            feed["cross_mask"][...] = CROSS_HIDDEN
            feed["cross_gate"][...] = 0
        for row, sequence in zip(rows, step.sequences, strict=True):
            prompt = sequence.prompt
            feed["token_ids"][row, 0] = sequence.generated[-1]
            self._set_temperature(feed, sequence, row)
            if prompt.ntk != 1.0:
                tables = self._tables(prompt.ntk)
                feed["rope_cos"][row, 0], feed["rope_sin"][row, 0] = (table[lengths[row]] for table in tables)
            if "cross_mask" in feed:
                # What the last token of the prompt sees, every token of the answer sees.
                self._set_cross_attention(feed, prompt, np.s_[row], np.s_[-1:])

    @staticmethod
    def _lengths(cache: TextCache, slots: list[int], bucket: int) -> np.ndarray:
        """The tokens before each row of a decode graph, int32 [bucket].

        A slot that does not take part writes one row past its valid tokens, where nothing is read before it is overwritten. A
        row of pages that is padding writes to page 0.
        """
        if not isinstance(cache, PagedCache):
            return cache.lengths[:bucket]
        lengths = np.zeros(bucket, np.int32)
        lengths[: len(slots)] = cache.lengths[slots]
        return lengths

    def _verify(self, feed: Feed, step: Step, cache: TextCache) -> None:
        """The last token of an answer and its draft; padding after them as in a chunk of a prompt."""
        sequence = step.sequences[0]
        prompt, slot = sequence.prompt, sequence.held_slot
        start = int(cache.lengths[slot])
        rows = slice(start, start + step.bucket)
        feed["token_ids"][0, : step.count] = sequence.generated[-1], *step.draft
        feed["token_ids"][0, step.count :] = 0
        feed["lengths"][0] = start
        self._set_temperature(feed, sequence, 0)
        feed["rope_cos"][0], feed["rope_sin"][0] = (table[rows] for table in self._tables(prompt.ntk))
        if "query_scale" in feed:
            feed["query_scale"][0, :, 0] = self.query_scales[rows]
        if "cross_mask" in feed:
            feed["cross_mask"][...] = CROSS_HIDDEN
            feed["cross_gate"][...] = 0
            self._set_cross_attention(feed, prompt, np.s_[0, :], np.s_[-1:])

    @staticmethod
    def _set_temperature(feed: Feed, sequence: Sequence, row: int) -> None:
        """The inverse temperature that candidates are weighed with; greedy choices do not depend on it."""
        if "inverse_temperature" in feed:
            feed["inverse_temperature"][row] = min(1 / (sequence.sampling.temperature or 1.0), LARGEST)

    @staticmethod
    def _set_cross_attention(feed: Feed, prompt: Prompt, into: tuple | int, positions: slice) -> None:
        """The images that tokens of a prompt see; unchanged where it has none."""
        if cross_attention := prompt.cross_attention:
            visible = cross_attention.visible[positions]  # [T, n * t]
            feed["cross_mask"][into][..., : visible.shape[-1]] = np.where(visible, 0, CROSS_HIDDEN)
            feed["cross_gate"][into] = cross_attention.gates[positions]

    def _tables(self, ntk: float) -> tuple[np.ndarray, np.ndarray]:
        if ntk not in self.rope:
            cache = self.manifest.cache
            self.rope[ntk] = rope_tables(self.manifest.model.rope, cache.head_dim, cache.rows, ntk)
        return self.rope[ntk]


def set_pages(feed: Feed, cache: PagedCache, step: Step) -> None:
    """The pages of each row's sequence, and where its new tokens are written; padding goes to page 0, to all of its places."""
    table, mapping, slots = feed["block_table"], feed["slot_mapping"], step.slots
    count = 1 if step.kind == "decode" else step.count
    table[len(slots) :] = 0
    table[: len(slots)] = cache.tables[slots]
    mapping[...] = np.arange(mapping.size, dtype=np.int32).reshape(mapping.shape) % cache.page_tokens
    mapping[: len(slots), :count] = cache.places(slots, count)

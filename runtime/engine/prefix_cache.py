"""The prefix cache and the encoder cache: cache rows of common prefixes and features of equal images are not computed again.

Nothing here changes a result, it only saves runs. A prefix is used where it lies, when its slot is free, or copied from any
slot, even from one in use: rows of a prompt do not change any more. It is copied where that costs less than running the tokens,
by the times in the manifest: those of chunks, and of the decode graph, which reads the whole cache and so tells how fast memory
is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

import numpy as np

from ..artifact import Manifest
from ..backends.base import Backend
from .blocks import blocks_for
from .cache import SlotCache
from .chunks import ChunkPlanner
from .metrics import Metrics
from .request import Sequence


class EncoderCache:
    """Features of tiles by digest, the latest used ones, at most `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._rows: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def get(self, digest: bytes) -> np.ndarray | None:
        """float32 [P, C], to be read only."""
        rows = self._rows.get(digest)
        if rows is not None:
            self._rows.move_to_end(digest)
        return rows

    def clear(self) -> None:
        self._rows.clear()
        self.nbytes = 0

    def put(self, digest: bytes, rows: np.ndarray) -> None:
        """Keep a copy."""
        if digest in self._rows or rows.nbytes > self.limit:
            return
        self._rows[digest] = rows.copy()
        self.nbytes += rows.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._rows.popitem(last=False)[1].nbytes

    def serve(self, sequence: Sequence, rows_per_tile: int) -> None:
        """Give a sequence the features of its next tiles, up to the first that are not here."""
        while sequence.encoding and not sequence.cross_tiles:
            done = sequence.tiles_done
            rows = self.get(sequence.cache_keys.images[done])
            if rows is None:
                return
            sequence.features[done * rows_per_tile : (done + 1) * rows_per_tile] = rows
            sequence.tiles_done += 1


class SlotPrefixCache:
    """The prefix cache over the slots of the KV cache; see scheduler.PrefixCache."""

    def __init__(
        self, manifest: Manifest, cache: SlotCache, backend: Backend, metrics: Metrics, features: EncoderCache
    ) -> None:
        self.cache, self.backend, self.metrics, self.features = cache, backend, metrics, features
        self.rows_per_tile = manifest.model.image.rows
        self.copy_ms = copy_ms_per_row(manifest)
        self.prefill = text_planner(manifest)

    def slot_for(self, sequence: Sequence, free: SequenceOf[int]) -> int:
        """The free slot with the longest prefix of the prompt, else the one that was used the longest ago.

        What else it contains is moved to a slot that was used still earlier, if there is one. Where blocks for that are short,
        the sequence gets that slot.
        """
        cache, keys = self.cache, sequence.context_keys.keys
        shared, _, slot = max((cache.common(slot, keys), -cache.touched[slot], slot) for slot in free)
        if (oldest := self._place_for(slot, shared, keys)) is not None:
            cache.clear(oldest)
            if not self._move(slot, oldest) and oldest in free:
                return oldest
        return slot

    def _move(self, slot: int, empty: int) -> bool:
        """Let an empty slot contain what a slot contains; whether there were free blocks for that."""
        cache, length = self.cache, int(self.cache.lengths[slot])
        if blocks_for(length) > cache.blocks.free:
            return False
        cache.reserve(empty, length)
        self._copy(slot, empty, length, len(cache.images[slot]))
        return True

    def _place_for(self, slot: int, shared: int, keys: np.ndarray) -> int | None:
        """The slot to move a slot's contents to, of which a prompt with `keys` keeps `shared` rows; None: let them go.

        That is a slot with an earlier state of the same, or else the oldest one that the prompt itself does not need.
        """
        cache, length = self.cache, int(self.cache.lengths[slot])
        older = [other for other in cache.free_slots if cache.touched[other] < cache.touched[slot]]
        if shared > length // 2 or not older or not self._worth_copying(length, shared):
            return None
        own = cache.keys[slot, :length]
        same = [other for other in range(cache.spec.slots) if other != slot and cache.common(other, own) > length // 2]
        if same:
            return same[0] if same[0] in older else None
        needed = max(older, key=lambda other: cache.common(other, keys))
        others = [other for other in older if other != needed or not cache.common(other, keys)]
        return min(others, key=cache.touched.__getitem__, default=None)

    def prepare(self, sequence: Sequence) -> None:
        """Give a sequence the features of its images, and the longest prefix in any slot if its own slot has less."""
        self.features.serve(sequence, self.rows_per_tile)
        cache, cache_keys, own = self.cache, sequence.context_keys, sequence.held_slot
        tiles = sequence.cross_tiles
        matches = [
            (cache.common(slot, cache_keys.keys), cache.common_images(slot, cache_keys.images) if tiles else 0, slot)
            for slot in range(cache.spec.slots)
            if slot != own
        ]
        length, images, slot = max(matches, key=lambda each: each[:2], default=(0, 0, own))
        if length <= sequence.computed or not self._worth_copying(length, sequence.computed):
            length = 0
        if not length and images * tiles <= sequence.tiles_done:
            return
        self._copy(slot, own, length, images)
        sequence.computed = length or sequence.computed
        sequence.tiles_done = max(sequence.tiles_done, images * tiles)

    def _copy(self, source: int, target: int, length: int, images: int) -> None:
        self.backend.copy_slot(source, target, length, images)
        self.cache.copied(source, target, length, images)
        self.metrics.copies += 1
        self.metrics.copied_tokens += length

    def _worth_copying(self, length: int, present: int) -> bool:
        """Whether copying `length` rows costs less than running those after the first `present`."""
        return length > present and length * self.copy_ms < self.prefill.cost(length - present)


def text_planner(manifest: Manifest) -> ChunkPlanner:
    """The costs that a copy saves. It is decided by text alone; a variant that sees images costs more, so a copy would save
    more."""
    return ChunkPlanner({g.bucket: g.cost_ms for g in manifest.graphs if g.kind == "prefill" and not g.images})


def copy_ms_per_row(manifest: Manifest) -> float:
    """Milliseconds to copy one token's keys and values, read and written as fast as a decode step reads the model."""
    spec = manifest.cache
    fastest = min((g for g in manifest.graphs if g.kind == "decode"), key=lambda graph: graph.bucket)
    if not fastest.nbytes:
        return 0.0
    row = 2 * spec.layers * spec.kv_heads * spec.head_dim * (4 if spec.dtype == "float32" else 2)
    return 2 * row * fastest.cost_ms / fastest.nbytes

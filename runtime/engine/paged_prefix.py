"""The prefix cache over pages: full pages are shared where they lie. Of a page that differs within, the common part is copied
where that costs less than running its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from ..artifact import Manifest
from ..backends.base import Backend
from .metrics import Metrics
from .paged_cache import PagedCache
from .prefix_cache import EncoderCache, copy_ms_per_row, text_planner
from .request import Sequence


class PagedPrefixCache:
    """See scheduler.PrefixCache."""

    def __init__(
        self, manifest: Manifest, cache: PagedCache, backend: Backend, metrics: Metrics, features: EncoderCache
    ) -> None:
        self.cache, self.backend, self.metrics, self.features = cache, backend, metrics, features
        self.rows_per_tile = manifest.model.image.rows
        self.copy_ms = copy_ms_per_row(manifest) * cache.page_tokens
        self.prefill = text_planner(manifest)

    def slot_for(self, sequence: Sequence, free: SequenceOf[int]) -> int:
        """Any: slots contain nothing."""
        return free[0]

    def prepare(self, sequence: Sequence) -> None:
        """Take what was computed while the sequence waited."""
        self.features.serve(sequence, self.rows_per_tile)
        cache, keys, slot = self.cache, sequence.context_keys.keys, sequence.held_slot
        cache.adopt(slot, keys)
        source, common = cache.tail(slot, keys)
        present = int(cache.lengths[slot])
        tokens = present // cache.page_tokens * cache.page_tokens + common
        if tokens > present and self._worth_copying(len(keys) - present, len(keys) - tokens):
            self.backend.copy_page(source, cache.next_page(slot))
            cache.copied(slot, source, keys, common)
            self.metrics.copies += 1
            self.metrics.copied_tokens += common
        sequence.computed = int(cache.lengths[slot])

    def _worth_copying(self, left: int, left_after: int) -> bool:
        """Whether a copy costs less than what it saves, where so many tokens are left to run without it, and with it."""
        return self.copy_ms < self.prefill.cost(left) - self.prefill.cost(left_after)

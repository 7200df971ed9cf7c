"""The host's side of the KV cache of an artifact, in slots or in pages."""

from __future__ import annotations

from dataclasses import dataclass

from ..artifact import Manifest
from ..backends.base import Backend
from .block_budget import BlockBudget
from .cache import SlotCache
from .give_back import UnusedRows
from .metrics import Metrics
from .paged_cache import PagedCache
from .paged_prefix import PagedPrefixCache
from .prefix_cache import EncoderCache, SlotPrefixCache
from .scheduler import PrefixCache
from .text_cache import TextCache


@dataclass(frozen=True, slots=True)
class OpenCache:
    """A cache, the prefix cache over it (None: requests reuse nothing), and the rows whose memory goes back (None: none)."""

    cache: TextCache
    prefixes: PrefixCache | None
    unused: UnusedRows | None


def open_cache(
    manifest: Manifest, backend: Backend, budget: BlockBudget, metrics: Metrics, features: EncoderCache, *, reuse: bool
) -> OpenCache:
    """An empty cache. With a budget that the user gave, the backend gets its memory page by page."""
    if manifest.cache.pages:
        pages = PagedCache(manifest.cache, keep=reuse)
        return OpenCache(pages, PagedPrefixCache(manifest, pages, backend, metrics, features) if reuse else None, None)
    cache = SlotCache(manifest.cache, keep=reuse, budget=budget.blocks)
    unused = None
    if budget.bounded:
        unused = UnusedRows(cache.blocks, budget.block_bytes)
        backend.use_small_pages()
    return OpenCache(cache, SlotPrefixCache(manifest, cache, backend, metrics, features) if reuse else None, unused)

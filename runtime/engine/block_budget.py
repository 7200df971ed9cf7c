"""The budget of the KV cache in blocks: what a number of gigabytes allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..artifact import ArtifactError, CacheSpec, Manifest
from ..manifest.record import DTYPE_BYTES
from ..shown import shown
from .blocks import blocks_for, tokens_in

GB = 1e9


@dataclass(frozen=True, slots=True)
class BlockBudget:
    """How many blocks the cache may hold at once, and the bytes of one of them, in each process."""

    blocks: int
    block_bytes: int
    bounded: bool = False  # not all slots may hold the whole context: by a figure that the user gave, or for want of pages
    paged: bool = False  # the blocks are the pages of the artifact

    @property
    def tokens(self) -> int:
        return tokens_in(self.blocks)

    @property
    def gigabytes(self) -> float:
        return self.blocks * self.block_bytes / GB


def block_budget(manifest: Manifest, cache_gb: float | None) -> BlockBudget:
    """The budget that `cache_gb` gigabytes of keys and values allow; None: every slot may hold the whole context, or in an
    artifact with pages all of them.

    The keys of images of cross-attention have their place in every slot, and are taken off first. Raises ArtifactError for
    gigabytes that hold no block, or for an artifact whose cache is reserved when it is loaded.
    """
    if manifest.cache.pages:
        return _pages(manifest, manifest.cache.pages - 1, cache_gb)
    specs = [manifest.of_stage(stage).cache for stage in range(manifest.pp)]
    block = max(map(_block_bytes, specs))
    if cache_gb is None:
        return BlockBudget(manifest.cache.slots * blocks_for(manifest.cache.context), block)
    if manifest.backend != "onnx":
        raise ArtifactError(
            f"cache_gb is {shown(cache_gb)}, but an artifact for {manifest.backend} reserves its whole cache when it is "
            "loaded; leave it out, or compile for fewer slots"
        )
    images = max(spec.nbytes - spec.slots * spec.rows * _token_bytes(spec) for spec in specs)
    blocks = int((cache_gb * GB - images) // block) if 0 < cache_gb < math.inf else 0
    if blocks < 1:
        raise ArtifactError(
            f"cache_gb is {shown(cache_gb)}; expected at least {(images + block) / GB:.3g}: a block of {tokens_in(1)} tokens "
            f"takes {block / 1e6:.3g} MB" + (f", and the keys of images {images / 1e6:.3g} MB" if images else "")
        )
    return BlockBudget(blocks, block, bounded=True)


def _pages(manifest: Manifest, pages: int, cache_gb: float | None) -> BlockBudget:
    """The budget of an artifact with so many pages of sequences."""
    if cache_gb is not None:
        raise ArtifactError(
            f"cache_gb is {shown(cache_gb)}, but the artifact reserves its {pages} pages of {tokens_in(1)} tokens when it is "
            "loaded; leave it out, or compile for fewer pages"
        )
    block = max(_block_bytes(manifest.of_stage(stage).cache) for stage in range(manifest.pp))
    whole = manifest.cache.slots * blocks_for(manifest.cache.context)
    return BlockBudget(pages, block, bounded=pages < whole, paged=True)


def _token_bytes(spec: CacheSpec) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * DTYPE_BYTES[spec.dtype_of("k_cache.0")]


def _block_bytes(spec: CacheSpec) -> int:
    return tokens_in(1) * _token_bytes(spec)

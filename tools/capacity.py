"""Sequences that the memory of a device holds at once: in slots, each as long as the context, and in pages of 128 tokens.

Weights, keys and values take at most USABLE of the memory; the rest is for the work space of graphs and the device's own
software. The rate is a bound: a decode step reads all weights once, and the keys and values of all sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..runtime.artifact import PAGE_TOKENS, CacheSpec
from ..runtime.manifest.record import DTYPE_BYTES
from .cards import Card

USABLE = 0.9  # as servers of other projects use by default (vLLM: --gpu-memory-utilization)
TEXT_TOKENS, ANSWER_TOKENS = 64, 128  # of a typical request, beside one image


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One way to keep keys and values."""

    request_bytes: int  # of a typical request
    requests: int  # that fit at once
    tokens_per_s: float  # at most, with so many of them in each decode step


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the memory of one device holds; keys, values and weights are those of one rank."""

    memory: int  # bytes of the device
    cache: int  # bytes that are left for keys and values
    token_bytes: int
    image_bytes: int  # keys and values of one image of cross-attention; 0 where images are tokens
    request_tokens: int  # of a typical request: one image, TEXT_TOKENS and ANSWER_TOKENS
    tokens: int  # that the cache holds in pages
    slots: Held
    pages: Held


def capacity(cache: CacheSpec, image_tokens: int, weight_bytes: int, card: Card, memory: float | None) -> Capacity:
    """`image_tokens`: of one image in a prompt. `weight_bytes`: of one rank. `memory`: bytes of the device; None: of `card`."""
    total = int(card.memory if memory is None else memory)
    left = max(int(USABLE * total) - weight_bytes, 0)
    token, images = token_bytes(cache), image_bytes(cache)
    tokens = TEXT_TOKENS + ANSWER_TOKENS + image_tokens
    read = tokens * token + images
    slot = cache.rows * token + (cache.cross.images if cache.cross else 0) * images
    page = PAGE_TOKENS * token
    paged = math.ceil(tokens / PAGE_TOKENS) * page + _paged_image(cache)

    def held(request_bytes: int) -> Held:
        count = left // request_bytes
        step_s = (weight_bytes + count * read) / card.bandwidth
        return Held(request_bytes=request_bytes, requests=count, tokens_per_s=count / step_s)

    return Capacity(
        memory=total,
        cache=left,
        token_bytes=token,
        image_bytes=images,
        request_tokens=tokens,
        tokens=left // page * PAGE_TOKENS,
        slots=held(slot),
        pages=held(paged),
    )


def token_bytes(cache: CacheSpec) -> int:
    """Bytes of the keys and values of one token in all layers that attend to the text."""
    return 2 * cache.layers * cache.kv_heads * cache.head_dim * DTYPE_BYTES[cache.dtype_of("k_cache.0")]


def image_bytes(cache: CacheSpec) -> int:
    """Bytes of the keys and values of one image in all cross-attention layers, empty tiles included."""
    return cache.cross.rows * _image_key_bytes(cache) if cache.cross else 0


def image_tokens(rows: int, grids: Iterable[tuple[int, int]], *, crossed: bool) -> int:
    """Tokens of a prompt that one image takes, at most: `rows` for the whole of it, and for each tile of the largest grid."""
    return 1 if crossed else rows * (1 + max((height * width for height, width in grids), default=0))


def _paged_image(cache: CacheSpec) -> int:
    """Bytes of one image in pages of its own."""
    return math.ceil(cache.cross.rows / PAGE_TOKENS) * PAGE_TOKENS * _image_key_bytes(cache) if cache.cross else 0


def _image_key_bytes(cache: CacheSpec) -> int:
    """Bytes of one key and value of an image in all cross-attention layers."""
    return 2 * cache.cross.layers * cache.kv_heads * cache.head_dim * DTYPE_BYTES[cache.dtype] if cache.cross else 0

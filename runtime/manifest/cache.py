"""Records of the KV cache."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import UNSET, UnsetType

from .record import DTYPE_BYTES, Count, Dtype, Number, Record

PAGE_TOKENS = 128  # what attention over pages takes with one query and with several (CANN, FusedInferAttentionScore)


class CrossSpec(Record, frozen=True, kw_only=True):
    """The part of the cache for cross-attention to images: per layer and image, [slots, kv_heads, rows, head_dim]."""

    layers: Number
    images: Count  # images that a sequence may hold
    rows: Count  # keys of one image
    tiles: Count  # of one image; rows are split evenly among them


class CacheSpec(Record, frozen=True, kw_only=True):
    """The KV cache: per layer, keys and values of the text, in slots or in pages.

    Slots: [slots, kv_heads, rows, head_dim]. Pages: [pages, PAGE_TOKENS, kv_heads, head_dim]. Page 0 belongs to no sequence:
    padding is written there, and table entries without a page of their own point to it.
    """

    layers: Number
    kv_heads: Count
    head_dim: Count
    slots: Count  # sequences at a time
    context: Count  # tokens that a sequence may hold
    rows: Count  # context plus room for the padding of a last chunk
    dtype: Dtype
    cross: CrossSpec | None = None
    # The dtype of the text's keys and values where they have fewer bits than `dtype`, which is then that of images alone.
    # Left out of the manifest where unset.
    text_dtype: Literal["int8"] | UnsetType = UNSET
    pages: Count | UnsetType = UNSET  # of the text, page 0 included; left out of the manifest where the text is in slots

    @property
    def table_width(self) -> int:
        """Pages of a sequence: the width of `block_table`, which covers all `rows`."""
        return -(-self.rows // PAGE_TOKENS)

    @property
    def tokens(self) -> int:
        """Tokens of the text that the whole cache has room for."""
        return self.pages * PAGE_TOKENS if self.pages else self.slots * self.rows

    @property
    def text_shape(self) -> tuple[int, int, int, int]:
        """The shape of the keys, and of the values, of one layer."""
        if self.pages:
            return self.pages, PAGE_TOKENS, self.kv_heads, self.head_dim
        return self.slots, self.kv_heads, self.rows, self.head_dim

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * DTYPE_BYTES[self.dtype_of(name)] for name, shape in self.buffers().items())

    def dtype_of(self, name: str) -> str:
        """The dtype of the buffer `name`."""
        return self.text_dtype or self.dtype if name.startswith(("k_cache.", "v_cache.")) else self.dtype

    def buffers(self) -> dict[str, tuple[int, ...]]:
        """The shape of every buffer of the cache, by its name."""
        names = [f"{which}_cache.{i}" for i in range(self.layers) for which in "kv"]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, self.text_shape)
        if cross := self.cross:
            shape = (self.slots, self.kv_heads, cross.rows, self.head_dim)
            places = ((i, which, image) for i in range(cross.layers) for which in "kv" for image in range(cross.images))
            shapes |= {f"cross_{which}.{i}.{image}": shape for i, which, image in places}
        return shapes

"""Records of the KV cache."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import UNSET, UnsetType

from .record import DTYPE_BYTES, Count, Dtype, Number, Record


class CrossSpec(Record, frozen=True, kw_only=True):
    """The part of the cache for cross-attention to images: per layer and image, [slots, kv_heads, rows, head_dim]."""

    layers: Number
    images: Count  # images that a sequence may hold
    rows: Count  # keys of one image
    tiles: Count  # of one image; rows are split evenly among them


class CacheSpec(Record, frozen=True, kw_only=True):
    """The KV cache: per layer, keys and values of shape [slots, kv_heads, rows, head_dim]."""

    layers: Number
    kv_heads: Count
    head_dim: Count
    slots: Count
    context: Count  # tokens that a sequence may hold
    rows: Count  # context plus room for the padding of a last chunk
    dtype: Dtype
    cross: CrossSpec | None = None
    # The dtype of the text's keys and values where they have fewer bits than `dtype`, which is then that of images alone.
    # Left out of the manifest where unset.
    text_dtype: Literal["int8"] | UnsetType = UNSET

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * DTYPE_BYTES[self.dtype_of(name)] for name, shape in self.buffers().items())

    def dtype_of(self, name: str) -> str:
        """The dtype of the buffer `name`."""
        return self.text_dtype or self.dtype if name.startswith(("k_cache.", "v_cache.")) else self.dtype

    def buffers(self) -> dict[str, tuple[int, ...]]:
        """The shape of every buffer of the cache, by its name."""
        text = (self.slots, self.kv_heads, self.rows, self.head_dim)
        shapes = {f"{which}_cache.{i}": text for i in range(self.layers) for which in "kv"}
        if cross := self.cross:
            shape = (self.slots, self.kv_heads, cross.rows, self.head_dim)
            names = ((i, which, image) for i in range(cross.layers) for which in "kv" for image in range(cross.images))
            shapes |= {f"cross_{which}.{i}.{image}": shape for i, which, image in names}
        return shapes

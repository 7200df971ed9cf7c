"""The base of all records of the manifest, and the ranges of their numbers."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything in the manifest: immutable, and an unknown field is an error."""


# Ranges of numbers: a manifest from elsewhere must not make its reader take memory or time without end.
Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Number = Annotated[int, Meta(ge=0, le=1 << 24)]  # a count or an index that may be 0, or the id of a token
Size = Annotated[int, Meta(ge=0, le=1 << 50)]  # bytes
Work = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]  # operations or bytes of a run
Time = Annotated[float, Meta(ge=0, le=1e12)]
Dtype = Annotated[str, Meta(pattern=r"^(float32|int32|float16|bfloat16|uint8|int8)\Z")]
Shape = tuple[Annotated[int, Meta(ge=0, le=1 << 40)], ...]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}

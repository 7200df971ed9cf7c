"""GE operators in torch: one small function each, in one table, by subject."""

from . import (
    activation,
    attention,
    cache,
    collective,
    elementwise,
    fused_quant,
    index,
    matmul,
    norm,
    quant,
    reduce,
    rotary,
    shape,
)
from .cache import IN_PLACE
from .registry import OPS

__all__ = ["IN_PLACE", "OPS"]

# Imported for what they register.
_SUBJECTS = (
    activation,
    attention,
    cache,
    collective,
    elementwise,
    fused_quant,
    index,
    matmul,
    norm,
    quant,
    reduce,
    rotary,
    shape,
)

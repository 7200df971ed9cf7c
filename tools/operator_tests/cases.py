"""The cases of an artifact: for each form of call, a builder of cases."""

from __future__ import annotations

from collections.abc import Iterable

from . import attention_cases, product_cases, row_cases
from .case import Builder, Case, Setting
from .forms import Form

# By how a form's kind starts; the longest that fits counts. What follows says one row or several, a bias, the size of blocks.
BUILDERS: dict[str, Builder] = {
    "cache": attention_cases.over_cache,
    "int8_cache": attention_cases.over_int8_cache,
    "cross": attention_cases.cross,
    "whole": attention_cases.whole,
    "padded": attention_cases.padded,
    "product": product_cases.product,
    "int8_product": product_cases.int8_product,
    "w8": product_cases.stored_product,
    "w4": product_cases.stored_product,
    "swiglu_rows": product_cases.swiglu_rows,
    "rms_norm": row_cases.rms_norm,
    "add_rms_norm": row_cases.add_rms_norm,
    "add_rms_norm_rows": row_cases.add_rms_norm_rows,
    "rows": row_cases.rows,
    "layer_norm": row_cases.layer_norm,
    "gelu": row_cases.gelu,
    "quick_gelu": row_cases.quick_gelu,
    "swiglu": row_cases.swiglu,
    "rotary": row_cases.rotary,
    "rotary_both": row_cases.rotary_both,
    "candidates": row_cases.candidates,
}


def builder(kind: str) -> Builder:
    """Raises KeyError for a kind that has none."""
    parts = kind.split("_")
    names = ("_".join(parts[:count]) for count in range(len(parts), 0, -1))
    for name in names:
        if name in BUILDERS:
            return BUILDERS[name]
    raise KeyError(kind)


def cases(forms: Iterable[Form], setting: Setting) -> list[Case]:
    return [case for form in forms for case in builder(form.kind)(form, setting)]

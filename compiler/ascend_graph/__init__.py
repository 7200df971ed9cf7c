"""Ascend lowerings of the op vocabulary, by purpose: one small function per op of model_defs/ops.py, with its arguments."""

from . import attention, candidates, collectives, layers, products

__all__ = ["attention", "candidates", "collectives", "layers", "products"]

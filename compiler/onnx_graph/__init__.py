"""ONNX lowerings of the op vocabulary, by purpose; each module registers its own (emitter.lowers)."""

from . import attention, products, shapes
from .emitter import LOWERINGS, UPCASTING, Emitter

__all__ = ["LOWERINGS", "UPCASTING", "Emitter", "attention", "products", "shapes"]

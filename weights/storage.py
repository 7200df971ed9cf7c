"""The form in which each parameter is stored in an artifact: in a float dtype, or quantised (model_defs/config/quant.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..model_defs.config import QUANTS, READY_MADE, ModelConfig, head_quant, quant_parts, text_quant, tower_quant
from .ascend_forms import ascend_parts
from .head_padding import padded_shapes
from .head_pieces import HEAD, cut_shapes, piece_of
from .merging import merged_shapes
from .names.rule import Shape
from .shard import bias_in_product, rank_targets
from .tensors import StoredTensor

_QUANTISED = re.compile(r"text\.layers\.\d+\.(?:attn\.(?:[qkvo]|qkv)|mlp\.(?:gate|up|down|gate_up))\.weight")
_TOWER = re.compile(r"vision\.(?:global_)?layers\.\d+\.(?:attn\.(?:[qkvo]|qkv)|mlp\.(?:up|down))\.weight")
_HEAD = f"{HEAD}.weight"
TABLE = "text.embed.weight"


@dataclass(frozen=True, slots=True)
class Floats:
    """The dtypes of what is not quantised: tensors of two axes and more, tensors of one axis, and scales of blocks.

    `own`: matrices with a dtype of their own, by name. `biases`: the dtype of those that a rank of `tp` adds within a product,
    where it is another than that of vectors.
    """

    matrices: str = "float32"
    vectors: str = "float32"
    scales: str = "float32"
    own: Mapping[str, str] = field(default_factory=dict)
    biases: str = ""
    tp: int = 1

    def of(self, name: str, shape: tuple[int, ...]) -> str:
        """The dtype of parameter `name`."""
        if self.biases and bias_in_product(name, self.tp):
            return self.biases
        return self.own.get(name, self.matrices) if len(shape) > 1 else self.vectors


def uniform(dtype: str) -> Floats:
    """Everything in one dtype."""
    return Floats(dtype, dtype, dtype)


FLOAT32 = uniform("float32")


def quant_of(name: str, quant: str) -> str:
    """The quantisation of parameter `name` in an artifact of `quant`: "none" but for the linear layers of the decoder's and
    perhaps the tower's blocks, and lm_head."""
    if _HEAD in (name, piece_of(name)[0]):
        return head_quant(quant)
    if _TOWER.fullmatch(name):
        return tower_quant(quant)
    return text_quant(quant) if _QUANTISED.fullmatch(name) else "none"


def stored_parts(
    name: str, shape: tuple[int, ...], quant: str, floats: Floats = FLOAT32, *, ascend: bool = False
) -> dict[str, StoredTensor]:
    """The stored tensors of parameter `name`: itself, or NAME.qweight, NAME.scales and perhaps NAME.zeros of NAME.weight.

    For Ascend some have forms of their own (ascend_forms.py).
    """
    kind = quant_of(name, quant)
    if kind == "none":
        return {name: StoredTensor(floats.of(name, shape), shape)}
    stem = name.removesuffix(".weight")
    parts = {key: StoredTensor(part.dtype or floats.scales, part.shape) for key, part in quant_parts(kind, *shape).items()}
    parts = ascend_parts(kind, quant, shape, parts) if ascend else parts
    return {f"{stem}.{key}": part for key, part in parts.items()}


def stored_shapes(config: ModelConfig, quant: str, tp: int = 1, *, ascend: bool = False) -> dict[str, Shape]:
    """The parameters of each rank of `tp` as they are stored, and their shapes; for Ascend some are merged (merging.py), heads
    of a tower may be filled up (head_padding.py), and a quantised lm_head may be cut (head_pieces.py).

    Raises WeightsError as `check_tp`.
    """
    shapes = rank_targets(config, tp)
    if not ascend:
        return shapes
    shapes = padded_shapes(config, shapes)
    return merged_shapes(shapes if head_quant(quant) == "none" else cut_shapes(shapes))


def stored_targets(
    config: ModelConfig, quant: str, floats: Floats = FLOAT32, tp: int = 1, *, ascend: bool = False
) -> dict[str, StoredTensor]:
    """All tensors in the weight files of each rank of `tp`, by name, in the order of `stored_shapes`, raising as it does."""
    assert quant in QUANTS + READY_MADE, quant
    shapes = stored_shapes(config, quant, tp, ascend=ascend)
    return {k: v for name, shape in shapes.items() for k, v in stored_parts(name, shape, quant, floats, ascend=ascend).items()}

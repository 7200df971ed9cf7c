"""How each parameter is stored in an artifact: in a float type, or in 8 bits with a scale for each block of a row."""

from __future__ import annotations

import re

from ..model_defs.config import ModelConfig, quant_block
from .shard import rank_targets
from .tensors import StoredTensor

QUANTS = ("none", "w8a16")
_QUANTISED = re.compile(r"text\.(?:layers\.\d+\.(?:attn\.[qkvo]|mlp\.(?:gate|up|down))|lm_head)\.weight")


def is_quantised(name: str, quant: str) -> bool:
    """Whether parameter `name` is stored in 8 bits: the decoder's linear layers and lm_head, under "w8a16"."""
    return quant == "w8a16" and _QUANTISED.fullmatch(name) is not None


def stored_parts(name: str, shape: tuple[int, ...], quant: str, dtype: str = "float32") -> dict[str, StoredTensor]:
    """What parameter `name` of `shape` becomes: itself in `dtype`, or NAME.qweight and NAME.scales for NAME.weight."""
    if not is_quantised(name, quant):
        return {name: StoredTensor(dtype, shape)}
    stem, (rows, columns) = name.removesuffix(".weight"), shape
    block = quant_block(columns)
    blocks = -(-columns // block)
    return {
        f"{stem}.qweight": StoredTensor("uint8", (rows, blocks, block)),
        f"{stem}.scales": StoredTensor(dtype, (rows, blocks)),
    }


def stored_targets(config: ModelConfig, quant: str, dtype: str = "float32", tp: int = 1) -> dict[str, StoredTensor]:
    """Every tensor that the weight files of one rank of `tp` hold, by name, in the order of `targets`.

    Raises WeightsError as `check_tp`.
    """
    assert quant in QUANTS, quant
    shapes = rank_targets(config, tp)
    return {k: v for name, shape in shapes.items() for k, v in stored_parts(name, shape, quant, dtype).items()}

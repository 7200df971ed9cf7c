"""How a weight [N, K] is stored under each quantisation: its parts, by name, with their dtypes and shapes.

    w8a16   qweight [N, B, block] uint8 around 128, scales [N, B]: B = ceil(K / block) blocks along a row
    w4a16   qweight [N, B, block / 2] uint8, two numbers of 4 bits around 8 in each, the first in the low bits; scales [N, B];
            w4a16g32 is the same in blocks of 32
    w8a8    qweight [K, N] int8 around 0, scales [N] float32; products are of whole numbers, so the layout is that of a product

What fills up a last block is zero. With "+vision" the linear layers of a vision tower are stored as in w8a8 too.
"""

from __future__ import annotations

from dataclasses import dataclass

QUANTS = ("none", "w8a16", "w8a8", "w8a8+vision", "w4a16", "w4a16g32")
# What lm_head is stored in where it is not stored as the layers are.
HEADS = {"w4a16": "w8a16", "w4a16g32": "w8a16", "w8a8": "w8a16"}


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor; dtype "" is whatever floats are stored in."""

    dtype: str
    shape: tuple[int, ...]


def text_quant(quant: str) -> str:
    """The quantisation of a decoder's layers."""
    return quant.removesuffix("+vision")


def tower_quant(quant: str) -> str:
    """The quantisation of a vision tower's layers: most work of a picture is their products."""
    return "w8a8" if quant.endswith("+vision") else "none"


def head_quant(quant: str) -> str:
    """The quantisation of lm_head. It sees one token of each row, where whole-number products gain nothing; in 4 bits it costs
    accuracy and saves little of a model."""
    quant = text_quant(quant)
    return HEADS.get(quant, quant)


def quant_block(columns: int, quant: str = "w8a16") -> int:
    """Weights of one row that share a scale: 128, or 32 where filling up the last block would take more than a 16th, or where
    `quant` asks for it."""
    return 32 if quant.endswith("g32") or -columns % 128 > columns // 16 else 128


def quant_parts(quant: str, rows: int, columns: int) -> dict[str, Part]:
    """What a weight [rows, columns] is stored as, by the names behind that of its layer."""
    if quant == "none":
        return {"weight": Part("", (rows, columns))}
    if quant == "w8a8":
        return {"qweight": Part("int8", (columns, rows)), "scales": Part("float32", (rows,))}
    block = quant_block(columns, quant)
    blocks = -(-columns // block)
    width = block if quant == "w8a16" else block // 2
    return {"qweight": Part("uint8", (rows, blocks, width)), "scales": Part("", (rows, blocks))}

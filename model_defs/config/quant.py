"""How a weight [N, K] is stored under each quantisation: its parts, by name, with their dtypes and shapes.

    w8a16   qweight [N, B, block] uint8 around 128, scales [N, B]: B = ceil(K / block) blocks along a row
    w4a16   qweight [N, B, block / 2] uint8, two numbers of 4 bits around 8 in each, the first in the low bits; scales [N, B]
    w8a8    qweight [K, N] int8 around 0, scales [N] float32; products are of whole numbers, so the layout is that of a product

What fills up a last block stands for zero. With "+vision" the linear layers of a vision tower are stored as in w8a8 too.

What checkpoints bring that are quantised already (READY_MADE) may differ in three ways:

    -g32, -g128   w8a16 in blocks of 32 whatever K is, since scales were given for fewer than 128 of a row; w4a16 in blocks of
                  128 where K divides by that
    -asym         numbers lie around zero points of their blocks: zeros [N, B] uint8, or two in each [N, ceil(B / 2)] of 4 bits
    +float-head   lm_head in floating point
"""

from __future__ import annotations

from dataclasses import dataclass

QUANTS = ("none", "w8a16", "w8a8", "w8a8+vision", "w4a16")  # what can be asked for
ASYMMETRIC, FLOAT_HEAD = "-asym", "+float-head"
GROUPED = ("w8a16", "w8a16-g32", "w4a16", "w4a16-g128")
READY_MADE = tuple(f"{kind}{FLOAT_HEAD}" for kind in ("w8a8", *GROUPED, *(f"{each}{ASYMMETRIC}" for each in GROUPED)))
HEADS = {"w4a16": "w8a16", "w8a8": "w8a16"}  # what lm_head is stored in where it is not stored as the layers are


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor; dtype "" is whatever floats are stored in."""

    dtype: str
    shape: tuple[int, ...]


def text_quant(quant: str) -> str:
    """The quantisation of a decoder's layers."""
    return quant.partition("+")[0]


def tower_quant(quant: str) -> str:
    """The quantisation of a vision tower's layers: most work of a picture is their products."""
    return "w8a8" if quant.endswith("+vision") else "none"


def head_quant(quant: str) -> str:
    """The quantisation of lm_head. It sees one token of each row, where whole-number products gain nothing; in 4 bits it costs
    accuracy and saves little of a model."""
    if quant.endswith(FLOAT_HEAD):
        return "none"
    quant = text_quant(quant)
    return HEADS.get(quant, quant)


def quant_bits(kind: str) -> int:
    """Bits of a stored number."""
    return 4 if kind.startswith("w4") else 8


def quant_block(columns: int, kind: str = "w8a16") -> int:
    """Weights of one row that share a scale: 128 of 8 bits, or 32 where rows do not divide by that; 32 of 4 bits. Their bytes
    tell which they are (runtime/ascend/weights.py)."""
    return 128 if columns % 128 == 0 and kind.removesuffix(ASYMMETRIC) in ("w8a16", "w4a16-g128") else 32


def quant_parts(kind: str, rows: int, columns: int) -> dict[str, Part]:
    """What a weight [rows, columns] is stored as, by the names behind that of its layer."""
    if kind == "none":
        return {"weight": Part("", (rows, columns))}
    if kind == "w8a8":
        return {"qweight": Part("int8", (columns, rows)), "scales": Part("float32", (rows,))}
    block, bits = quant_block(columns, kind), quant_bits(kind)
    blocks = -(-columns // block)
    parts = {"qweight": Part("uint8", (rows, blocks, block * bits // 8)), "scales": Part("", (rows, blocks))}
    return parts | ({"zeros": Part("uint8", (rows, -(-blocks * bits // 8)))} if kind.endswith(ASYMMETRIC) else {})

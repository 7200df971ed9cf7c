"""The stored form of a weight [N, K] under each quantisation: its parts, by name, with their dtypes and shapes.

    w8a16   qweight [N, B, block] uint8 around 128, scales [N, B]: B = ceil(K / block) blocks along a row
    w4a16   qweight [N, B, block / 2] uint8, two numbers of 4 bits around 8 in each, the first in the low bits; scales [N, B];
            w4a16-g32 is the same in blocks of 32
    w8a8    qweight [K, N] int8 around 0, scales [N] float32; products are of integers, so the layout is that of a product

Padding of a last block stands for zero. With "+vision" the linear layers of a vision tower are stored as in w8a8 too.

The forms of checkpoints that are quantised already (READY_MADE) may differ in three ways:

    -g32          blocks of 32 whatever K is, since scales were given for fewer than 128 of a row
    -asym         numbers lie around zero points of their blocks: zeros [N, B] uint8, or two in each [N, ceil(B / 2)] of 4 bits
    +float-head   lm_head in floating point
"""

from __future__ import annotations

from dataclasses import dataclass

QUANTS = ("none", "w8a16", "w8a8", "w8a8+vision", "w4a16", "w4a16-g32")  # the values of the option `quant`
KV_CACHES = ("float", "int8")  # the forms of keys and values of the text; the first is the default
ASYMMETRIC, FLOAT_HEAD, SMALL_BLOCKS = "-asym", "+float-head", "-g32"
GROUPED = ("w8a16", "w8a16-g32", "w4a16", "w4a16-g32")
READY_MADE = tuple(f"{kind}{FLOAT_HEAD}" for kind in ("w8a8", *GROUPED, *(f"{each}{ASYMMETRIC}" for each in GROUPED)))
# The quantisation of lm_head where it differs from that of the layers.
HEADS = {"w4a16": "w8a16", "w4a16-g32": "w8a16", "w8a8": "w8a16"}


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor; dtype "": that of stored floats."""

    dtype: str
    shape: tuple[int, ...]


def text_quant(quant: str) -> str:
    """The quantisation of a decoder's layers."""
    return quant.partition("+")[0]


def tower_quant(quant: str) -> str:
    """The quantisation of a vision tower's layers, whose products are most of the work of an image."""
    return "w8a8" if quant.endswith("+vision") else "none"


def head_quant(quant: str) -> str:
    """The quantisation of lm_head. It computes one token of each row, where integer products gain nothing; 4 bits cost accuracy
    and save little of a model."""
    if quant.endswith(FLOAT_HEAD):
        return "none"
    quant = text_quant(quant)
    return HEADS.get(quant, quant)


def quant_bits(kind: str) -> int:
    """Bits of a stored number."""
    return 4 if kind.startswith("w4") else 8


def quant_block(columns: int, kind: str = "w8a16") -> int:
    """Weights of one row that share a scale: 128, or 32 where padding the last block would take more than a 16th of a row, or
    where `kind` says so. Ascend derives it from the bits of a number and the bytes of a block
    (runtime/backends/ascend/weights.py)."""
    return 32 if SMALL_BLOCKS in kind or -columns % 128 > columns // 16 else 128


def quant_parts(kind: str, rows: int, columns: int) -> dict[str, Part]:
    """The stored parts of a weight [rows, columns], by their names after the name of its layer."""
    if kind == "none":
        return {"weight": Part("", (rows, columns))}
    if kind == "w8a8":
        return {"qweight": Part("int8", (columns, rows)), "scales": Part("float32", (rows,))}
    block, bits = quant_block(columns, kind), quant_bits(kind)
    blocks = -(-columns // block)
    parts = {"qweight": Part("uint8", (rows, blocks, block * bits // 8)), "scales": Part("", (rows, blocks))}
    return parts | ({"zeros": Part("uint8", (rows, -(-blocks * bits // 8)))} if kind.endswith(ASYMMETRIC) else {})

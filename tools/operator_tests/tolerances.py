"""How far results of a card may be from their reference, by the dtype in which a graph computes.

A distance is the length of a difference over the length of the reference. float16 keeps 11 bits of a number and bfloat16 keeps
8; what is wrong is off by the order of 1.
"""

from __future__ import annotations

# One operator, the worst of its rows: a few roundings, and sums in an order of their own.
OPERATOR = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 8e-2}
# A whole graph against the simulator: the roundings of all its layers.
GRAPH = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.6e-1}


def in_words(tolerances: dict[str, float]) -> str:
    return ", ".join(f"{value:g} in {dtype}" for dtype, value in tolerances.items())

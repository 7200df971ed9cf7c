"""Wrong scales, zero points and numbers of quantised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from staticvl.tools.comparing.open_side import open_side

from .fault import Base, Fault, Seeding
from .settings import LLAVA, QUICK
from .weights import changed, put, rewrite

FOUR, SMALL = Base("llava", quant="w4a16"), Base("qwen_vl", quant="w4a16-g32")
EIGHT, INTEGER = Base("llava", quant="w8a16"), Base("llava", quant="w8a8")
GPTQ, SMOOTH = Base("llava", quant="w4a16-g32", calibrated=True), Base("llava", quant="w8a8", calibrated=True)


def times(place: Any, factor: float) -> Callable[[np.ndarray], None]:
    def change(value: np.ndarray) -> None:
        value[place] *= factor

    return change


def next_nibbles(value: np.ndarray) -> np.ndarray:
    """Every number one higher, as another zero point reads them."""
    low, high = np.minimum((value & 15) + 1, 15), np.minimum((value >> 4) + 1, 15)
    return low | high << 4


def swapped_nibbles(value: np.ndarray) -> np.ndarray:
    return value >> 4 | (value & 15) << 4


def against_itself(name: str, factor: float) -> Callable[[Seeding], None]:
    """Two artifacts with the same stored form: one scale differs by little."""

    def seed(place: Seeding) -> None:
        place.reference = open_side(place.artifact, threads=1)
        rewrite(place.copy(), name, times((0, 0), factor))

    return seed


def fault(name: str, base: Base, seed: Callable[[Seeding], object], where: str, says: str = "", **more: Any) -> Fault:
    settings = {"settings": QUICK, "samples": ("text 2",)} | more
    return Fault(name=name, base=base, seed=seed, stage="weights", where=where, says=says, **settings)


DOWN, Q = r"text\.layers\.1\.mlp\.down\.weight", r"text\.layers\.1\.attn\.q\.weight"
FAULTS = (
    fault("one scale of 4 bits times 1.3", SMALL, changed("text.layers.1.mlp.down.scales", times((5, 2), 1.3)), DOWN,
          r"stored in 4 bits: the scale of row 5, block 2 is 1\.[23]\d* times", quick=True,
          scope="only weights that are stored in 4 bits are at fault"),
    fault("all scales of a tensor times 1.15", SMALL, changed("text.layers.1.attn.q.scales", times(..., 1.15)), Q,
          r"all its scales are 1\.1[45]\d* times"),
    fault("all scales doubled, w4a16-g32", SMALL, changed("text.layers.1.mlp.down.scales", times(..., 2)), DOWN,
          r"all its scales are (2|1\.9\d*|2\.0\d*) times"),
    fault("zero point off by one", SMALL, changed("text.layers.1.mlp.down.qweight", next_nibbles), DOWN,
          r"the zero point of .* is off by \+1"),
    fault("order of nibbles", FOUR, changed("text.layers.1.mlp.down.qweight", swapped_nibbles), DOWN, "order of nibbles"),
    fault("one byte of 4-bit numbers", FOUR, changed("text.layers.1.mlp.down.qweight", lambda value: value ^ 0x40 * (
          np.arange(value.size).reshape(value.shape) == 77)), DOWN, "1 of .* numbers are off by more than half a step"),
    fault("rows of 4-bit numbers one late", FOUR, changed("text.layers.1.mlp.down.qweight", lambda value: np.roll(value, 1, 0)),
          DOWN, "off by"),
    fault("a norm among 4-bit weights times 1.1", FOUR, changed("text.layers.0.attn_norm.weight", times(..., 1.1)),
          r"text\.layers\.0\.attn_norm\.weight", "it is 1.1 times"),
    fault("scale of 4 bits is NaN", FOUR, changed("text.layers.1.mlp.down.scales", put((0, 0), np.nan)), DOWN, "holds .* NaN"),
    fault("scales of a row of 8 bits times 1.02", EIGHT, changed("text.layers.1.mlp.down.scales", times(3, 1.02)), DOWN,
          r"stored in 8 bits: the scale of .*row 3, block 0.* is 1\.02\d* times"),
    fault("all scales doubled, w8a16", EIGHT, changed("text.layers.1.mlp.down.scales", times(..., 2)), DOWN,
          r"all its scales are (2|1\.9\d*|2\.0\d*) times", scope="only weights that are stored in 8 bits are at fault"),
    fault("sign of a scale of lm_head", EIGHT, changed("text.lm_head.scales", times((9, 0), -1)), r"text\.lm_head\.weight",
          r"the scale of row 9, block 0 is -(1|1\.0\d*|0\.99\d*) times"),
    fault("one scale of w8a8 times 1.05", INTEGER, changed("text.layers.1.mlp.down.scales", times(3, 1.05)), DOWN,
          r"row 3, block 0 is 1\.05\d* times"),
    fault("one scale of GPTQ times 1.6", GPTQ, changed("text.layers.1.mlp.down.scales", times((5, 2), 1.6)), DOWN,
          r"the scale of row 5, block 2 is 1\.[56]\d* times"),
    fault("all scales of GPTQ times 1.15", GPTQ, changed("text.layers.1.attn.q.scales", times(..., 1.15)), Q,
          r"all its scales are 1\.1\d* times"),
    fault("one scale of calibrated w8a8 times 1.1", SMOOTH, changed("text.layers.1.mlp.gate.scales", times(4, 1.1)),
          r"text\.layers\.1\.mlp\.gate\.weight", r"row 4, block 0 is 1\.1\d* times"),
    fault("two artifacts, one scale times 1.01", FOUR, against_itself("text.layers.1.mlp.down.scales", 1.01), DOWN,
          r"the scale of row 0, block 0 is 1\.01\d* times"),
    fault("rounded weights of a float artifact", LLAVA, changed("text.layers.1.mlp.down.weight", lambda value: np.round(
          value / 0.01) * 0.01), DOWN, "differs by"),
)  # fmt: skip

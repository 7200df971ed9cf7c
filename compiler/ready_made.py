"""Checkpoints that are quantised already: the quantisation that is stored, and conflicts with options. Reads no weights."""

from __future__ import annotations

from dataclasses import replace

from ..model_defs.config import ASYMMETRIC, READY_MADE
from ..weights.packing.settings import Packing, read_packing
from .choices import PlanError
from .options import Options


def resolve(options: Options) -> tuple[Options, Packing | None]:
    """The options with the quantisation of the checkpoint, and its packing; None: it is in floating point.

    Raises ConfigError for a packing that is not read, PlanError where options ask for another quantisation, or for an adapter.
    """
    packing = read_packing(options.checkpoint)
    if packing is None:
        if options.quant in READY_MADE:
            raise PlanError(
                f"--quant {options.quant} is for checkpoints that are quantised, and {options.checkpoint} is not; choose "
                "another or leave it out"
            )
        return options, None
    if options.quant == "none":
        return options, packing
    quant = packing.quant
    if options.quant not in ("", quant, *_short_names(quant)):
        raise PlanError(
            f"--quant is {options.quant}, but {options.checkpoint} is quantised already and would be stored as "
            f"{quant}: leave --quant out, or give --quant none, which stores it dequantised"
        )
    if options.calibration and not options.int8_cache:
        raise PlanError(f"{options.checkpoint} is quantised already, so nothing is left to calibrate; leave --calibrate out")
    if options.lora:
        raise PlanError(
            f"adapter {options.lora} cannot be merged into {options.checkpoint}, which is quantised: merge it into the "
            "checkpoint that this one was made from, or give --quant none, which merges into the dequantised weights"
        )
    return replace(options, quant=quant), packing


def _short_names(quant: str) -> tuple[str, str]:
    """Names under which --quant accepts it: w4a16-g32-asym+float-head is w4a16-g32, and w4a16."""
    kind = quant.partition("+")[0]
    return kind.removesuffix(ASYMMETRIC), kind.partition("-")[0]

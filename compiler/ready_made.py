"""Checkpoints that are quantised already: what is stored of them, and whether that was asked for. Reads no weights."""

from __future__ import annotations

from dataclasses import replace

from ..model_defs.config import ASYMMETRIC, READY_MADE
from ..weights.packing.settings import Packing, read_packing
from .choices import PlanError
from .options import Options


def resolve(options: Options) -> tuple[Options, Packing | None]:
    """The options with the quantisation that the checkpoint brings, and how it is packed; None: it is in floating point.

    Raises ConfigError for a packing that is not read, PlanError where another quantisation, or an adapter, was asked for.
    """
    packing = read_packing(options.checkpoint)
    if packing is None:
        if options.quant in READY_MADE:
            raise PlanError(
                f"--quant {options.quant} is what quantised checkpoints are stored as, and {options.checkpoint} is not "
                "quantised; choose another or leave it out"
            )
        return options, None
    if options.quant == "none":
        return options, packing
    brought = packing.quant
    if options.quant not in ("", brought, *_asked_for_by(brought)):
        raise PlanError(
            f"--quant {options.quant} was asked for, but {options.checkpoint} is quantised already and would be stored as "
            f"{brought}: leave --quant out, or give --quant none, which stores what it stands for in floating point"
        )
    if options.calibration and not options.int8_cache:
        raise PlanError(f"{options.checkpoint} is quantised already, so nothing is left to calibrate; leave --calibrate out")
    if options.lora:
        raise PlanError(
            f"adapter {options.lora} cannot be merged into {options.checkpoint}, which is quantised: merge it into the "
            "checkpoint that this one was made from, or give --quant none, which stores the sum in floating point"
        )
    return replace(options, quant=brought), packing


def _asked_for_by(brought: str) -> tuple[str, str]:
    """w4a16-g32-asym+float-head is what w4a16 asks for, and w4a16-g32."""
    kind = brought.partition("+")[0]
    return kind.removesuffix(ASYMMETRIC), kind.partition("-")[0]

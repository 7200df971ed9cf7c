"""The stored weights of a side, whatever runs it."""

from __future__ import annotations

from msgspec import UNSET

from ...compiler.calibration import METHODS
from ...runtime.artifact import Manifest
from ...weights.head_padding import head_width
from ...weights.storage import stored_targets
from .checkpoint import Checkpoint
from .hf_side import HfSide
from .rank_weights import RankWeights
from .sides import Side
from .static_side import StaticSide
from .weights import StoredWeights


def stored_weights(side: Side) -> StoredWeights:
    """The weights of every rank of a side."""
    if isinstance(side, StaticSide):
        folder, manifest, config = side.artifact.folder, side.artifact.manifest, side.config
        stored = stored_targets(config, manifest.quant, tp=manifest.tp) if config else {}
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        heads = {name: head_width(config, name) for name in stored} if config else {}
        ranks = [RankWeights(folder, weights, manifest.quant, shapes, heads) for weights in side.rank_weights]
        return StoredWeights(ranks, _calibration(manifest), bool(side.checkpoint and side.checkpoint.packing))
    assert isinstance(side, HfSide)
    checkpoint: Checkpoint = side.checkpoint
    return StoredWeights([RankWeights(checkpoint.out, checkpoint.weights)], ready_made=bool(checkpoint.packing))


def _calibration(manifest: Manifest) -> str:
    """A digest of the calibration that weights were rounded with; "" for none."""
    made = manifest.build.calibration
    return f"{made.method} {made.sha256}" if made is not UNSET and manifest.quant in METHODS else ""

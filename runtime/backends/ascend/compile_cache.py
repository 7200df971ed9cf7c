"""Where a card's compiler keeps what it has made of a graph."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..base import Group, world_rank
from .weight_layout import NZ


def compile_cache_folder(folder: Path, soc: str, group: Group | None, layout: str) -> Path:
    """The folder in which the device's compiler caches its results: beside the artifact, by chip, CANN version, layout of
    weights and rank, so that no two processes write one file; where that cannot be written, a temporary one."""
    import torch_npu  # pyright: ignore[reportMissingImports]

    name = f"{soc}-{torch_npu.npu.utils.get_cann_version()}".replace(" ", "").replace("/", "-")
    name += f"-{layout}" * (layout == NZ)
    if group:
        name += f"-rank-{world_rank(group)}-of-{group.stages * group.size}"
    path = folder / ".host" / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="staticvl-"))
    return path

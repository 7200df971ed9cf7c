"""The processes of one run and this one's place among them: the variables that torchrun and other launchers set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ...artifact import ArtifactError
from ...shown import quoted

LOOPBACK = "127.0.0.1"
LOCAL_ADDRESSES = (LOOPBACK, "localhost", "::1")
STORE_FILE = "STATICVL_STORE_FILE"  # set for ranks that rank 0 has started on its machine: where they find each other


@dataclass(frozen=True, slots=True)
class World:
    """All processes of one run. `rank` counts through the world; a rank's number within its stage is RankInfo.rank."""

    rank: int
    size: int
    local_size: int  # ranks on this machine
    address: str  # of the machine that rank 0 runs on

    @property
    def on_one_machine(self) -> bool:
        """Whether all ranks run on this machine."""
        return self.local_size == self.size


@dataclass(frozen=True, slots=True)
class RankInfo:
    """A rank's place among those that run one model: `rank` of the `size` that compute one of its `stages` together."""

    rank: int
    size: int
    stage: int = 0
    stages: int = 1


def rank_info_of(rank: int, tp: int, pp: int) -> RankInfo:
    """The place of a rank of the world: the first tp ranks are the first stage, the next tp the second."""
    stage, rank_in_stage = divmod(rank, tp)
    assert stage < pp, (rank, tp, pp)
    return RankInfo(rank_in_stage, tp, stage, pp)


def started_world(env: Mapping[str, str] = os.environ) -> World | None:
    """The world that a launcher has started this process in, if any.

    Raises ArtifactError for variables that are no numbers or do not fit each other.
    """
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if not 0 <= rank < size:
        raise ArtifactError(f"RANK is {rank} and WORLD_SIZE is {size}; expected a rank from 0 to WORLD_SIZE - 1")
    address = env.get("MASTER_ADDR", LOOPBACK)
    local = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else size if address in LOCAL_ADDRESSES else 1
    return World(rank, size, local, address)


def _number(env: Mapping[str, str], name: str) -> int:
    if not env[name].isdecimal():
        raise ArtifactError(f"the environment variable {name} is {quoted(env[name])}; expected a number, as torchrun sets it")
    return int(env[name])

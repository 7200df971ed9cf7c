"""Which processes take part and where this one sits: the variables that torchrun and other launchers set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..artifact import ArtifactError

LOOPBACK = "127.0.0.1"
HERE = (LOOPBACK, "localhost", "::1")


@dataclass(frozen=True, slots=True)
class World:
    """All processes of one run. `rank` counts through the world; a model's own rank is Seat.rank."""

    rank: int
    size: int
    local_size: int  # ranks on this machine
    address: str  # of the machine that rank 0 runs on

    @property
    def together(self) -> bool:
        """Whether all ranks run on this machine."""
        return self.local_size == self.size


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's place in the group that computes one model, or one stage of it."""

    group: str  # its name, the same for all its ranks and no other's
    rank: int
    size: int


def seat_of(rank: int, tp: int) -> Seat:
    """Ranks 0 .. tp - 1 of the world are the first group, the next tp the second."""
    group, own = divmod(rank, tp)
    return Seat(f"group-{group}", own, tp)


def started_world(env: Mapping[str, str] = os.environ) -> World | None:
    """The world that a launcher has started this process in, if any.

    Raises ArtifactError for variables that make no sense.
    """
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if not 0 <= rank < size:
        raise ArtifactError(f"RANK is {rank} and WORLD_SIZE is {size}; expected a rank from 0 to WORLD_SIZE - 1")
    address = env.get("MASTER_ADDR", LOOPBACK)
    local = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else size if address in HERE else 1
    return World(rank, size, local, address)


def _number(env: Mapping[str, str], name: str) -> int:
    if not env[name].isdecimal():
        raise ArtifactError(f"the environment variable {name} is {env[name]!r}; expected a number, as torchrun sets it")
    return int(env[name])

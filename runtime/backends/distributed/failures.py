"""When ranks stop: what each of them was doing, and who is to blame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Doing = Literal["idle", "computing", "meeting", "lost", "failed", "died", "silent"]
BAD = ("died", "failed", "lost", "silent")
MOST = 3  # ranks whose words are repeated


class RankError(RuntimeError):
    """Ranks cannot go on together; the message names the one at fault and says what happened to it."""


class CollectiveError(RuntimeError):
    """A collective failed, which is perhaps another rank's fault."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A rank as people find it."""

    rank: int  # in the world
    pid: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True, slots=True)
class RankStatus:
    """What a rank was doing when something went wrong.

    lost: a collective of its failed; failed: it raised something itself; died: its connection ended without a word; silent:
    it said nothing when it was asked. `text`: its own words, or what its starter knows.
    """

    peer: Peer
    doing: Doing
    text: str = ""


def failure_report(accounts: Sequence[RankStatus], timeout: float) -> str:
    """One sentence that names whoever is at fault.

    A rank that died, raised, or does not answer is the cause of what others lost; one that computes while others wait for it
    is only when they have lost patience.
    """
    found = [a for a in accounts if a.doing in ("died", "failed", "silent")]
    if not found and any(a.doing == "lost" for a in accounts):
        found = [a for a in accounts if a.doing == "computing"]
    if not found:
        found = [a for a in accounts if a.doing == "lost"]
    told = "; ".join(_sentence(account, timeout) for account in found[:MOST])
    return told + (f"; and {len(found) - MOST} more" if len(found) > MOST else "")


def _sentence(account: RankStatus, timeout: float) -> str:
    words = f": {account.text}" if account.text else ""
    if account.doing == "died":
        return f"{account.peer} died{words}"
    if account.doing == "silent":
        return f"{account.peer} does not answer: it is stopped, stuck, or out of reach"
    if account.doing == "computing":
        return f"{account.peer} kept the others waiting for more than {timeout:g} s; if that may be, give a longer timeout"
    if account.doing == "lost":
        return f"{account.peer} lost the others in a collective{words}"
    return f"{account.peer} failed{words}"

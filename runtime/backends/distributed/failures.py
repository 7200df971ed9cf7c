"""Failure reports: the state of each rank when something went wrong, and the ranks at fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# "meeting" is the word of the protocol for a rank that is in a collective.
Activity = Literal["idle", "computing", "meeting", "lost", "failed", "died", "silent"]
FAILURES = ("died", "failed", "lost", "silent")
MAX_NAMED = 3  # ranks that a report names; the others are counted


class RankError(RuntimeError):
    """Ranks cannot go on together; the message names the one at fault and says what happened to it."""


class CollectiveError(RuntimeError):
    """A collective failed, which is perhaps another rank's fault."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The identity of a rank: its number in the world, its process id and its machine."""

    rank: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True, slots=True)
class RankStatus:
    """The state of a rank when something went wrong.

    lost: one of its collectives failed; failed: it raised an error; died: its connection ended without a message; silent: it
    did not answer a status request. `text`: its error message, or how its process ended, as far as its starter knows.
    """

    peer: Peer
    activity: Activity
    text: str = ""


def failure_report(statuses: Sequence[RankStatus], timeout: float) -> str:
    """One sentence that names the ranks at fault. `timeout`: seconds that a collective waits.

    A rank that died, raised, or does not answer is the cause of what others lost; one that computes while others wait for it
    is the cause only if their timeout has passed.
    """
    causes = [each for each in statuses if each.activity in ("died", "failed", "silent")]
    if not causes and any(each.activity == "lost" for each in statuses):
        causes = [each for each in statuses if each.activity == "computing"]
    if not causes:
        causes = [each for each in statuses if each.activity == "lost"]
    report = "; ".join(_sentence(status, timeout) for status in causes[:MAX_NAMED])
    return report + (f"; and {len(causes) - MAX_NAMED} more" if len(causes) > MAX_NAMED else "")


def _sentence(status: RankStatus, timeout: float) -> str:
    words = f": {status.text}" if status.text else ""
    if status.activity == "died":
        return f"{status.peer} died{words}"
    if status.activity == "silent":
        return f"{status.peer} does not answer: it is stopped, stuck, or out of reach"
    if status.activity == "computing":
        return f"{status.peer} kept the others waiting for more than {timeout:g} s; if that is normal, give a longer timeout"
    if status.activity == "lost":
        return f"{status.peer} lost the others in a collective{words}"
    return f"{status.peer} failed{words}"

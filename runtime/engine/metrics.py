"""Counters that the engine keeps while it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..artifact import KINDS, GraphKey, Kind

if TYPE_CHECKING:
    from .request import Sequence
    from .scheduler import Step


@dataclass(slots=True)
class Metrics:
    """By graph kind: runs, seconds inside the backend, and sizes real and padded; what was reused; how requests ended."""

    runs: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    seconds: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    real: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    padded: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    graph_runs: Counter[GraphKey] = field(default_factory=Counter)
    prompt_tokens: int = 0  # positions of prompts that were run or reused
    reused_tokens: int = 0
    tiles: int = 0  # of images whose features or keys were needed
    reused_tiles: int = 0
    drafted: int = 0  # tokens of answers that were verified
    accepted: int = 0  # of them
    copies: int = 0  # of cache rows from slot to slot, or of a page
    copied_tokens: int = 0
    preemptions: int = 0  # of sequences whose blocks others needed
    evicted_blocks: int = 0  # of rows that were kept for later prompts
    finished: Counter[str] = field(default_factory=Counter)  # requests by finish_reason

    def count(self, step: Step, seconds: float) -> None:
        key = step.graph_key
        kind, bucket, _ = key
        self.runs[kind] += 1
        self.seconds[kind] += seconds
        self.real[kind] += len(step.sequences) if kind == "decode" else step.count
        self.padded[kind] += bucket
        self.graph_runs[key] += 1

    def count_end(self, sequence: Sequence, reason: str) -> None:
        """A request ended, at whatever point of its way."""
        self.finished[reason] += 1
        self.prompt_tokens += min(sequence.computed, sequence.prompt_length)
        self.reused_tokens += sequence.reused
        self.tiles += sequence.tiles_done
        self.reused_tiles += sequence.reused_tiles

    def summary(self) -> dict[str, Any]:
        """The figures as plain data; shares are of 1."""
        return {
            "runs": dict(self.runs),
            "seconds": {kind: round(seconds, 6) for kind, seconds in self.seconds.items()},
            "padding_waste": {kind: round(1 - self.real[kind] / n, 4) for kind, n in self.padded.items() if n},
            "buckets": {key.name: count for key, count in self.graph_runs.items()},
            "prefix_hit_rate": round(self.reused_tokens / max(self.prompt_tokens, 1), 4),
            "picture_hit_rate": round(self.reused_tiles / max(self.tiles, 1), 4),
            "acceptance_rate": round(self.accepted / max(self.drafted, 1), 4),
            "copies": self.copies,
            "copied_tokens": self.copied_tokens,
            "preemptions": self.preemptions,
            "evicted_blocks": self.evicted_blocks,
            "finished": dict(self.finished),
        }

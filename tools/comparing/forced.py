"""An engine that says what it is told, and shows what it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ...runtime.backends.base import Feed, Result
from ...runtime.engine.chunks import ChunkPlanner
from ...runtime.engine.engine import Engine
from ...runtime.engine.request import Sequence
from ...runtime.engine.scheduler import Step


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of a graph: what it was given, and which slot and image it worked on."""

    step: Step
    feed: Feed
    slot: int
    image: int
    past: dict[int, int]  # slot -> rows of the cache that were valid before


class ForcedEngine(Engine):
    """As Engine, but nothing is reused; a sequence in `forced` is given those tokens, whatever its logits say."""

    forced: dict[int, np.ndarray]
    slots: dict[int, int]  # of sequences that have answered
    watch: Callable[[Ran], None] | None

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings, reuse=False)
        self.forced, self.slots, self.watch = {}, {}, None

    def run_graph(self, step: Step, feed: Feed) -> Result:
        if self.watch:
            slot, image = self._place(step)
            past = {each.slot: int(self.cache.lengths[each.slot]) for each in step.sequences if each.slot is not None}
            self.watch(Ran(step, feed, slot, image, past))
        return super().run_graph(step, feed)

    def _choose(self, sequence: Sequence, result: Result, row: int) -> str | None:
        self.slots[sequence.id] = sequence.held_slot
        if sequence.id not in self.forced:
            return super()._choose(sequence, result, row)
        sequence.logits.append(result.row(row).copy())
        sequence.generated.append(int(self.forced[sequence.id][len(sequence.generated)]))
        return "length" if len(sequence.generated) == sequence.params.max_new_tokens else None

    @contextlib.contextmanager
    def only(self, route: Mapping[str, int] | None) -> Iterator[None]:
        """Run nothing but these buckets of vision and prefill graphs, by kind."""
        scheduler, route = self.scheduler, route or {}
        before = scheduler.vision, scheduler.prefill
        if "vision" in route:
            scheduler.vision = ChunkPlanner({route["vision"]: 1.0})
        if "prefill" in route:
            scheduler.prefill = {images: ChunkPlanner({route["prefill"]: 1.0}) for images in scheduler.prefill}
        try:
            yield
        finally:
            scheduler.vision, scheduler.prefill = before

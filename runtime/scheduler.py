"""What runs next, as which graph kind and bucket. Pure Python: it sees sequences and slots, never arrays.

Order: a waiting sequence is admitted as soon as a slot is free; a sequence is encoded and prefilled before the running
ones decode, so that batches are as full as they can be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .artifact import Kind
from .cache import SlotCache
from .chunks import ChunkPlanner
from .request import Sequence


@dataclass(frozen=True, slots=True)
class Step:
    """One run of one graph. `count` is the real size that the bucket pads: tiles, tokens, or rows.

    `images` says which variant of a text graph runs: how many pictures it can see (cross-attention only, else 0).
    """

    kind: Kind
    bucket: int
    sequences: tuple[Sequence, ...]
    count: int
    images: int = 0


Costs = Mapping[tuple[Kind, int], Mapping[int, float]]  # (kind, images) -> bucket -> cost of a run


class Scheduler:
    """First come, first served."""

    def __init__(self, cache: SlotCache, costs: Costs) -> None:
        self.cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.vision = ChunkPlanner(costs["vision", 0])
        self.prefill = {images: ChunkPlanner(cost) for (kind, images), cost in costs.items() if kind == "prefill"}
        self.decode = {images: sorted(cost) for (kind, images), cost in costs.items() if kind == "decode"}

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def next_step(self) -> Step:
        """The next step; call only when not idle."""
        self._admit()
        if not self.running:
            raise RuntimeError(
                f"all {self.cache.spec.slots} slots are held by chats, so no request can start; close a chat, or compile "
                f"with more: staticvl compile ... --slots {self.cache.spec.slots * 2}"
            )
        for sequence in self.running:
            if sequence.encoding:
                return self._vision(sequence)
            if sequence.prefilling:
                return self._prefill(sequence)
        return self._decode()

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its slot is freed unless a chat keeps it."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.slot is not None and not sequence.keep_slot:
            self.cache.release(sequence.slot)
            sequence.slot = None

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if sequence.slot is None:
                if not self.cache.free:
                    continue
                sequence.slot = self.cache.acquire()
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _vision(self, sequence: Sequence) -> Step:
        left = len(sequence.prompt.pixels) - sequence.tiles_done
        bucket = self.vision.split(left)[0]
        return Step("vision", bucket, (sequence,), min(bucket, left))

    def _prefill(self, sequence: Sequence) -> Step:
        left = sequence.prompt.length - sequence.computed
        images = _enough(self.prefill, sequence.images)
        bucket = self.prefill[images].next_bucket(left, self.cache.spec.rows - sequence.computed)
        return Step("prefill", bucket, (sequence,), min(bucket, left), images)

    def _decode(self) -> Step:
        # Row b of a decode graph is slot b, so the batch reaches up to the highest slot in use.
        rows = 1 + max(sequence.slot for sequence in self.running if sequence.slot is not None)
        images = _enough(self.decode, max(sequence.images for sequence in self.running))
        bucket = next(b for b in self.decode[images] if b >= rows)
        return Step("decode", bucket, tuple(self.running), rows, images)


def _enough(variants: Iterable[int], images: int) -> int:
    """The smallest variant of a graph that sees `images` pictures; 0 sees none and has no layers for them."""
    return min(variant for variant in variants if variant >= images)

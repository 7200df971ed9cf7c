"""The scheduler decides which graph runs next, by kind and bucket. Pure Python: it sees sequences and slots, no arrays.

Requests join and leave between steps. One that waits is admitted as soon as a slot is free or parked for a chat between its
turns, and the blocks of its prompt can be had. Answers grow by a block at a time. Where there is none left, the youngest
sequence is preempted: it gives up its slot, and waits again (preemption.py).

Prompts are encoded and prefilled in the order of admission, chunk by chunk. Between chunks the sequences that answer go on:
what runs between two of their tokens costs no more than one chunk.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from ..artifact import GraphKey, Kind
from .chunks import ChunkPlanner
from .preemption import begin_again
from .request import Sequence
from .text_cache import TextCache

AGING = 16  # admissions after which a waiting request is worth one priority more


@dataclass(frozen=True, slots=True)
class Step:
    """One run of one graph. `count` is the real size that the bucket pads: tiles, tokens, or rows.

    `draft`: the tokens that a verify step guesses after the last one of the answer.
    """

    graph_key: GraphKey
    sequences: tuple[Sequence, ...]
    count: int
    draft: tuple[int, ...] = ()

    @property
    def kind(self) -> Kind:
        return self.graph_key.kind

    @property
    def bucket(self) -> int:
        return self.graph_key.bucket

    @property
    def slots(self) -> list[int]:
        """The slots of its sequences."""
        return [sequence.held_slot for sequence in self.sequences]


Costs = Mapping[GraphKey, float]  # of a run of each graph


class PrefixCache(Protocol):
    """Knows which slots contain something that a sequence can use."""

    def slot_for(self, sequence: Sequence, free: SequenceOf[int]) -> int:
        """The slot that a sequence gets, of some free ones, none of which enlarges the batch."""
        ...

    def prepare(self, sequence: Sequence) -> None:
        """Called before the sequence's first run: fill in results that were computed before, and count them as done."""
        ...


class Scheduler:
    """First come, first served; of requests of several priorities, see `add`."""

    def __init__(
        self, cache: TextCache, costs: Costs, *, prefill_budget: int | None = None, prefix_cache: PrefixCache | None = None
    ) -> None:
        """`prefill_budget`: while sequences answer, no chunk is larger than this many tokens (None: as large as is cheapest),
        and what runs between two of their tokens costs no more than the costliest such chunk, or is a single run."""
        self.cache, self.prefix_cache = cache, prefix_cache
        self.waiting: list[Sequence] = []  # in the order of admission
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.short = False  # the one that is to be admitted next waits for blocks
        self.vision = ChunkPlanner(_by_images(costs, "vision").get(0, {}))
        self.prefill = {images: ChunkPlanner(table) for images, table in _by_images(costs, "prefill").items()}
        self.bounded: dict[int, ChunkPlanner] = {}  # what runs while sequences answer, if that is less
        if prefill_budget is not None:
            self.bounded = {
                images: ChunkPlanner(_within(prefill_budget, planner.costs)) for images, planner in self.prefill.items()
            }
        self.decode: dict[int, list[GraphKey]] = {}  # by the images that they see, the smallest bucket first
        for key in sorted(key for key in costs if key.kind == "decode"):
            self.decode.setdefault(key.images, []).append(key)
        self.verify = {images: sorted(table) for images, table in _by_images(costs, "verify").items()}
        self.costs = costs
        self.spent = 0.0  # cost of what ran since the sequences that answer gained a token
        self.may_draft: set[int] = set()  # ids of sequences in the last decode step that have not drafted since
        self.preparing: Sequence | None = None  # the device copies cache rows for it
        self._admitted = self._arrived = 0

    def sequences(self) -> list[Sequence]:
        """All that run or wait."""
        return [*self.running, *self.waiting]

    def clear(self) -> None:
        """Forget all sequences; the cache is reset by itself."""
        self.running, self.waiting, self.preparing = [], [], None
        self.spent, self.may_draft, self.short = 0.0, set(), False

    @contextlib.contextmanager
    def only(self, buckets: Mapping[str, int]) -> Iterator[None]:
        """Within the block, vision and prefill graphs run with these buckets alone, each given by its kind."""
        before = self.vision, self.prefill, self.bounded
        if "vision" in buckets:
            self.vision = ChunkPlanner({buckets["vision"]: 1.0})
        if "prefill" in buckets:
            self.prefill = {images: ChunkPlanner({buckets["prefill"]: 1.0}) for images in self.prefill}
            self.bounded = {}
        try:
            yield
        finally:
            self.vision, self.prefill, self.bounded = before

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one for whose conversation a slot is parked does not wait, unless others wait for blocks.

        A priority of p is worth as much as having come p * AGING admissions earlier, so no request waits for ever.
        """
        self._arrived += 1
        sequence.arrival, sequence.due = self._arrived, self._admitted - AGING * sequence.params.priority
        parked = self.cache.parked.get(sequence.conversation)
        if parked is not None and not self.short and self._affordable(sequence, parked):
            sequence.slot = self.cache.take_back(sequence.conversation)
            self._enter(sequence)
        else:
            bisect.insort(self.waiting, sequence, key=_order)

    def next_step(self) -> Step:
        """The next step; call only when not idle."""
        self._grow()
        self._admit()
        assert self.running, "those that wait have been admitted: each slot runs, is free or can be reclaimed"
        new, answering = None, []
        for sequence in self.running:
            if not sequence.encoding and not sequence.prefilling:
                answering.append(sequence)
            elif new is None:
                new = sequence
        if new is None:
            return self._answer(answering)
        if not new.prepared:
            self._prepare(new)
        step, cost, limit = self._vision(new) if new.encoding else self._prefill(new, bool(answering))
        if not answering:
            return step
        if self.spent and self.spent + cost > limit:
            return self._answer(answering)
        self.spent += cost
        return step

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its slot is freed, or parked for the chat that goes on in it."""
        if sequence not in self.running or sequence.slot is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        if sequence.conversation is None:
            self.cache.release(sequence.slot)
        else:
            self.cache.park(sequence.conversation, sequence.slot)
        sequence.slot = None

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's slot away, and let it wait again, before all that came later."""
        self.running.remove(sequence)
        self.may_draft.discard(sequence.id)
        self.cache.release(sequence.held_slot)
        begin_again(sequence)
        self.preemptions += 1
        bisect.insort(self.waiting, sequence, key=_order)

    def _admit(self) -> None:
        while self.waiting:
            sequence = self.waiting[0]
            parked = self.cache.parked.get(sequence.conversation)
            if parked is None and not self.cache.free and not self.cache.parked:
                return
            self.short = not self._affordable(sequence, parked)
            if self.short:
                return
            self.preparing = sequence
            sequence.slot = self._take_slot(sequence, parked)
            self.preparing = None
            self._admitted += 1
            self._enter(sequence)
            del self.waiting[0]
        self.short = False

    def _take_slot(self, sequence: Sequence, parked: int | None) -> int:
        """The slot that is parked for a sequence's conversation, or a free one."""
        if parked is not None:
            self.cache.take_back(sequence.conversation)
            return parked
        if not self.cache.free:
            self.cache.reclaim()
        return self.cache.acquire(self.prefix_cache.slot_for(sequence, self._near()) if self.prefix_cache else None)

    def _affordable(self, sequence: Sequence, slot: int | None) -> bool:
        """Whether a sequence can have the blocks of its prompt, and each answer that runs one more if it may need one.

        Without the latter, the sequence would be preempted as soon as one of them grows.
        """
        if not self.cache.bounded:
            return True
        growing = sum(each.most_rows > each.room for each in self.running)
        return self.cache.can_enter(slot, sequence.context_keys.keys, sequence.tokens, growing)

    def _grow(self) -> None:
        """Give the answers that fill their blocks another one each; the youngest sequences give theirs up for that."""
        full = [sequence for sequence in self.running if sequence.tokens > sequence.room]
        for sequence in sorted(full, key=_order) if len(full) > 1 else full:
            while sequence.slot is not None and not self.cache.can_reserve(sequence.slot, sequence.tokens):
                self.preempt(max(self.running, key=_order))
            if sequence.slot is not None:
                sequence.room = self.cache.reserve(sequence.slot, sequence.tokens)

    def _near(self) -> SequenceOf[int]:
        """The free slots that a batch reaches whichever of them is taken."""
        free = self.cache.free_slots
        rows = 1 + max([free[0], *(sequence.slot for sequence in self.running if sequence.slot is not None)])
        reach = self._decode_graph(rows, 0).bucket
        return free[: bisect.bisect_left(free, reach)]

    def _enter(self, sequence: Sequence) -> None:
        """The sequence has its slot: the part of its prompt that is there already is not run."""
        slot, cache_keys, tiles = sequence.held_slot, sequence.context_keys, sequence.cross_tiles
        sequence.computed, images = self.cache.settle(slot, cache_keys.keys, cache_keys.images if tiles else ())
        sequence.room = self.cache.reserve(slot, sequence.tokens)
        sequence.tiles_done = max(sequence.tiles_done, images * tiles)
        self.running.append(sequence)

    def _prepare(self, sequence: Sequence) -> None:
        """As late as possible: it may use the results of what ran before it."""
        if self.prefix_cache:
            self.preparing = sequence
            self.prefix_cache.prepare(sequence)
            self.preparing = None
        sequence.prepared = True
        if not sequence.preemptions:
            sequence.reused, sequence.reused_tiles = sequence.computed, sequence.tiles_done

    def _vision(self, sequence: Sequence) -> tuple[Step, float, float]:
        """The step, its cost, and what may run together."""
        left = len(sequence.prompt.pixels) - sequence.tiles_done
        bucket = self.vision.split(left)[0]
        limit = max(self._planner(sequence.images, True).costs.values())
        return Step(GraphKey("vision", bucket), (sequence,), min(bucket, left)), self.vision.costs[bucket], limit

    def _prefill(self, sequence: Sequence, answering: bool) -> tuple[Step, float, float]:
        """The step, its cost, and what may run together."""
        left = sequence.context_length - sequence.computed
        images = _enough(self.prefill, sequence.images)
        planner = self._planner(images, answering)
        bucket = planner.next_bucket(left, self.cache.spec.rows - sequence.computed)
        step = Step(GraphKey("prefill", bucket, images), (sequence,), min(bucket, left))
        return step, planner.costs[bucket], max(planner.costs.values())

    def _planner(self, images: int, answering: bool) -> ChunkPlanner:
        planners = self.bounded if answering and self.bounded else self.prefill
        return planners[_enough(planners, images)]

    def _answer(self, sequences: SequenceOf[Sequence]) -> Step:
        """The next step of the sequences that answer: each gains a token, or once in between one verifies a draft.

        One that has come since the last decode step drafts after the next, so that no stream waits for more drafts than there
        are slots.
        """
        decode, alone = self._decode(sequences), len(sequences) == 1
        for sequence in sequences if self.verify else ():
            if sequence.prompt_lookup and (alone or sequence.id in self.may_draft) and (step := self._draft(sequence, decode)):
                self.may_draft.discard(sequence.id)
                if alone:
                    self.spent = 0.0
                return step
        self.spent = 0.0
        self.may_draft = {sequence.id for sequence in sequences}
        return decode

    def _draft(self, sequence: Sequence, decode: Step) -> Step | None:
        """A step that verifies a draft, if there is one and it gives more tokens in its time than `decode` would."""
        assert sequence.prompt_lookup is not None, "only a lookup makes drafts"
        images = _enough(self.verify, sequence.images)
        room = self.cache.spec.rows - int(self.cache.lengths[sequence.held_slot])
        buckets = [bucket for bucket in self.verify[images] if bucket <= room]
        left = sequence.params.max_new_tokens - len(sequence.generated)
        draft = sequence.prompt_lookup.draft(sequence.generated, min(left, max(buckets, default=0)) - 1)
        if not draft:
            return None
        count = 1 + len(draft)
        bucket = next(bucket for bucket in buckets if bucket >= count)
        key = GraphKey("verify", bucket, images)
        if (1 + sequence.prompt_lookup.expected(len(draft))) * self.costs[decode.graph_key] <= len(
            decode.sequences
        ) * self.costs[key]:
            sequence.prompt_lookup.skipped()
            return None
        if not self._holds(sequence, sequence.tokens + len(draft)):
            return None
        return Step(key, (sequence,), count, draft)

    def _holds(self, sequence: Sequence, tokens: int) -> bool:
        """Whether a sequence has, or now gets, the blocks for so many tokens; none is preempted for a draft."""
        if tokens > sequence.room and self.cache.can_reserve(sequence.held_slot, tokens):
            sequence.room = self.cache.reserve(sequence.held_slot, tokens)
        return tokens <= sequence.room

    def _decode(self, sequences: SequenceOf[Sequence]) -> Step:
        rows = 1 + max(self.cache.rows_of([sequence.held_slot for sequence in sequences]))
        images = _enough(self.decode, max(sequence.images for sequence in sequences))
        return Step(self._decode_graph(rows, images), tuple(sequences), rows)

    def _decode_graph(self, rows: int, images: int) -> GraphKey:
        return next(key for key in self.decode[images] if key.bucket >= rows)


def _order(sequence: Sequence) -> tuple[int, int]:
    """The order of admission; the last one in it is the youngest."""
    return sequence.due, sequence.arrival


def _by_images(costs: Costs, kind: Kind) -> dict[int, dict[int, float]]:
    """The graphs of a kind: images that they see -> bucket -> cost of a run."""
    tables: dict[int, dict[int, float]] = {}
    for key, cost in costs.items():
        if key.kind == kind:
            tables.setdefault(key.images, {})[key.bucket] = cost
    return tables


def _enough(variants: Iterable[int], images: int) -> int:
    """The smallest variant of a graph that sees `images` images; 0 sees none and has no layers for them."""
    return min(variant for variant in variants if variant >= images)


def _within(budget: int, costs: Mapping[int, float]) -> Mapping[int, float]:
    """The buckets of at most `budget` tokens, or the smallest."""
    return {bucket: cost for bucket, cost in costs.items() if bucket <= max(budget, min(costs))}

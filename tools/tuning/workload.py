"""The workload of a trace: counts of each size, and one block of requests in their order. Its size is bounded however
long the trace is: counts by size, and one block of requests chosen at random, the same each time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .columns import Request
from .images import ImageCounter
from .trace_error import TraceError

_SEED = 20240


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the replay. `prompt`: positions that have to be computed, image tokens among them."""

    time: float | None
    prompt: int
    generated: int
    tiles: int
    images: int


@dataclass(slots=True)
class Workload:
    """Counts of a trace, by size. `lengths` are grouped by the number of images that a prompt sees by cross-attention."""

    requests: int = 0
    dropped: int = 0  # longer than the cache may be
    lengths: dict[int, Counter[int]] = field(default_factory=dict)  # images -> positions to compute -> requests
    tiles: Counter[int] = field(default_factory=Counter)  # tiles of a request -> requests, those without images left out
    images: Counter[int] = field(default_factory=Counter)  # images of a request -> requests
    totals: Counter[int] = field(default_factory=Counter)  # prompt and answer together -> requests
    generated: int = 0  # tokens of all answers
    block: list[Arrival] = field(default_factory=list)  # requests that follow one another

    @property
    def every_length(self) -> Counter[int]:
        return sum(self.lengths.values(), Counter())


@dataclass(slots=True)
class _Block:
    """Reservoir sampling (Vitter 1985, algorithm R) of one block of `size` requests that follow one another."""

    size: int
    rng: random.Random = field(default_factory=lambda: random.Random(_SEED))
    full: int = 0
    chosen: list[Arrival] = field(default_factory=list)
    filling: list[Arrival] = field(default_factory=list)

    def add(self, arrival: Arrival) -> None:
        self.filling.append(arrival)
        if len(self.filling) == self.size:
            self.full += 1
            if self.rng.randrange(self.full) == 0:
                self.chosen = self.filling
            self.filling = []


def gather(
    requests: Iterable[Request], images: ImageCounter | None, *, crossed: bool, context: int | None, block: int
) -> Workload:
    """Count requests. `crossed`: images enter by cross-attention. Those longer than `context` are counted as dropped, since
    the runtime refuses them. Raises TraceError for images whose tokens neither a counter nor the trace gives.
    """
    workload, sample = Workload(), _Block(block)
    for request in requests:
        tokens, tiles = _images(request, images)
        prompt_tokens = request.prompt + tokens
        if context is not None and prompt_tokens + request.generated > context:
            workload.dropped += 1
            continue
        prompt = max(1, prompt_tokens - min(request.reused, prompt_tokens))
        seen = request.images if crossed else 0
        workload.requests += 1
        workload.lengths.setdefault(seen, Counter())[prompt] += 1
        workload.totals[prompt_tokens + request.generated] += 1
        workload.generated += request.generated
        workload.images[request.images] += 1
        if tiles:
            workload.tiles[tiles] += 1
        sample.add(Arrival(request.time, prompt, max(1, request.generated), tiles, seen))
    workload.block = sample.chosen or sample.filling
    return workload


def _images(request: Request, counter: ImageCounter | None) -> tuple[int, int]:
    """Tokens and tiles of all images of a request."""
    if counter is None and request.images and request.image_tokens is None:
        raise TraceError(
            "the trace has images, and nothing says how many tokens one takes; give --artifact or --checkpoint beside --costs"
        )
    if counter is None or not request.images:
        return request.image_tokens or 0, 0
    sizes = request.sizes or (counter.usual,) * request.images
    counts = [counter.count(size) for size in sizes]
    tokens = sum(tokens for tokens, _ in counts)
    trace_tokens = request.image_tokens if not request.sizes else None
    return tokens if trace_tokens is None else trace_tokens, sum(tiles for _, tiles in counts)

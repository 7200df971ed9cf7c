"""What a trace comes to: how often each size occurs, and a stretch of requests as they arrived. Its size is bounded however
long the trace is: counts by size, and one block of requests chosen at random, the same each time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .columns import Request, TraceError
from .images import ImageCounter

_SEED = 20240


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the replay; `prompt` are positions that have to be computed, image tokens among them."""

    time: float | None
    prompt: int
    generated: int
    tiles: int
    images: int


@dataclass(slots=True)
class Workload:
    """Counts of a trace, by size. `lengths` is told apart by the number of images that a prompt sees by cross-attention."""

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
    kept: list[Arrival] = field(default_factory=list)
    filling: list[Arrival] = field(default_factory=list)

    def add(self, arrival: Arrival) -> None:
        self.filling.append(arrival)
        if len(self.filling) == self.size:
            self.full += 1
            if self.rng.randrange(self.full) == 0:
                self.kept = self.filling
            self.filling = []


def gather(
    requests: Iterable[Request], images: ImageCounter | None, *, crossed: bool, context: int | None, block: int
) -> Workload:
    """Count requests. `crossed`: images enter by cross-attention. Those longer than `context` are counted as dropped, since
    the runtime refuses them. Raises TraceError for images of which neither a counter nor the trace says what they take.
    """
    found, sample = Workload(), _Block(block)
    for request in requests:
        tokens, tiles = _images(request, images)
        whole = request.prompt + tokens
        if context is not None and whole + request.generated > context:
            found.dropped += 1
            continue
        prompt = max(1, whole - min(request.reused, whole))
        seen = request.images if crossed else 0
        found.requests += 1
        found.lengths.setdefault(seen, Counter())[prompt] += 1
        found.totals[whole + request.generated] += 1
        found.generated += request.generated
        found.images[request.images] += 1
        if tiles:
            found.tiles[tiles] += 1
        sample.add(Arrival(request.time, prompt, max(1, request.generated), tiles, seen))
    found.block = sample.kept or sample.filling
    return found


def _images(request: Request, counter: ImageCounter | None) -> tuple[int, int]:
    """Tokens and tiles of all images of a request."""
    if counter is None and request.images and request.image_tokens is None:
        raise TraceError(
            "the trace has images, and nothing says how many tokens one takes; give --artifact or --checkpoint beside --costs"
        )
    if counter is None or not request.images:
        return request.image_tokens or 0, 0
    sizes = request.sizes or (counter.usual,) * request.images
    counted = [counter.count(size) for size in sizes]
    tokens = sum(tokens for tokens, _ in counted)
    known = request.image_tokens if not request.sizes else None
    return tokens if known is None else known, sum(tiles for _, tiles in counted)

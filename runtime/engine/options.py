"""Options of an engine that the artifact leaves open."""

from __future__ import annotations

from dataclasses import dataclass

NGRAMS = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The choices of one engine; raises ValueError for ngrams that are no range."""

    prefill_budget: int | None = None  # tokens of the largest chunk that runs while sequences answer; None: of any
    reuse: bool = True  # requests reuse cache rows and image features of each other
    image_cache_mb: int = 256  # megabytes of image features that are kept for that
    speculate: int = 0  # tokens of a draft, for requests that do not say
    ngrams: tuple[int, int] = NGRAMS  # the fewest and the most tokens of an n-gram that prompt lookup matches
    cache_gb: float | None = None  # gigabytes of keys and values in each process; None: every slot may be full

    def __post_init__(self) -> None:
        fewest, most = self.ngrams
        if not 1 <= fewest <= most:
            raise ValueError(
                f"ngrams is {self.ngrams}; expected the fewest and the most tokens of an n-gram to match, such as {NGRAMS}"
            )

    @property
    def feature_bytes(self) -> int:
        """Bytes of image features that are kept."""
        return self.image_cache_mb << 20 if self.reuse else 0

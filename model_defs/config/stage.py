"""A pipeline stage: a part of a model's layers, held by one group of ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One of `count` parts; the first has the vision tower and the embedding too, the last the final norm and lm_head."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count, self

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, total: int) -> range:
        """The layers of this stage among `total` ones; stages differ by one layer at most."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)


WHOLE = Stage()

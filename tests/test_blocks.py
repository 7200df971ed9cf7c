"""The block pool against a plain model of it: lists of single blocks, and a search for the victim."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from staticvl.runtime.engine.blocks import BlockPool, blocks_for, tokens_in

HOLDERS = range(4)
Event = tuple[str, int, int]
EVENTS = st.tuples(
    st.sampled_from(("claim", "retire", "touch", "resize", "reset")), st.sampled_from(HOLDERS), st.integers(0, 9)
)


class PlainPool:
    """Every block by itself, and its owner; holders in the order of their last use."""

    def __init__(self, budget: int) -> None:
        self.owners: list[int | None] = [None] * budget
        self.idle: list[int] = []
        self.losses: list[tuple[int, int]] = []

    def blocks(self, holder: int) -> list[int]:
        return [block for block, owner in enumerate(self.owners) if owner == holder]

    def claim(self, holder: int) -> None:
        self.idle = [each for each in self.idle if each != holder]

    def retire(self, holder: int) -> None:
        self.claim(holder)
        self.idle.append(holder)

    def touch(self, holder: int) -> None:
        if holder in self.idle:
            self.retire(holder)

    def resize(self, holder: int, count: int) -> None:
        """One block at a time; raises IndexError where none can be had."""
        while len(self.blocks(holder)) > count:
            self.owners[self.blocks(holder)[-1]] = None
        while len(self.blocks(holder)) < count:
            if None not in self.owners:
                victim = next(each for each in self.idle if each != holder and self.blocks(each))
                self.owners[self.blocks(victim)[-1]] = None
                self.losses.append((victim, len(self.blocks(victim))))
            self.owners[self.owners.index(None)] = holder


@given(budget=st.integers(1, 12), events=st.lists(EVENTS, max_size=40))
def test_as_a_plain_model(budget: int, events: list[Event]) -> None:
    losses: list[tuple[int, int]] = []
    pool, plain = BlockPool(budget, lambda holder, left: losses.append((holder, left))), PlainPool(budget)  # type: ignore[arg-type]
    for name, holder, count in events:
        if name == "resize":
            others = sum(len(plain.blocks(each)) for each in HOLDERS if each not in plain.idle and each != holder)
            assert pool.can_hold(holder, count) == (others + count <= budget)
            if others + count > budget:
                before = dict(pool.counts)
                with pytest.raises(RuntimeError, match="blocks of"):
                    pool.resize(holder, count)
                assert pool.counts == before
                continue
            pool.resize(holder, count)
            plain.resize(holder, count)
        elif name == "reset":
            pool.reset()
            plain = PlainPool(budget)
            losses.clear()
        else:
            getattr(pool, name)(holder)
            getattr(plain, name)(holder)
        check(pool, plain)
    assert by_victim(losses) == by_victim(plain.losses)


def by_victim(losses: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Victims in order, each with what it has left after losses without another's between: the pool takes several at once."""
    pairs = itertools.zip_longest(losses, losses[1:], fillvalue=(-1, 0))
    return [loss for loss, after in pairs if loss[0] != after[0]]


def check(pool: BlockPool, plain: PlainPool) -> None:
    counts = {holder: len(plain.blocks(holder)) for holder in HOLDERS}
    assert {holder: pool.held(holder) for holder in HOLDERS} == counts
    assert pool.used == sum(count for holder, count in counts.items() if holder not in plain.idle)
    assert pool.cached == sum(count for holder, count in counts.items() if holder in plain.idle)
    assert pool.free == plain.owners.count(None) >= 0
    assert list(pool.idle) == plain.idle
    assert all(pool.peaks.get(holder, 0) >= count for holder, count in counts.items())
    assert pool.shrunk >= {holder for holder in HOLDERS if pool.peaks.get(holder, 0) > counts[holder]}


def test_tokens_and_blocks() -> None:
    assert [blocks_for(tokens) for tokens in (0, 1, 128, 129)] == [0, 1, 1, 2]
    assert tokens_in(3) == 384


def test_what_has_shrunk_is_known_until_it_is_settled() -> None:
    """Also after a reset: its memory is still there."""
    pool = BlockPool(8)
    pool.resize(0, 5)
    pool.resize(0, 2)
    assert pool.shrunk == {0} and pool.peaks[0] == 5
    pool.settle(0, 3)
    assert pool.shrunk == {0} and pool.peaks[0] == 3
    pool.settle(0, 2)
    assert not pool.shrunk
    pool.reset()
    assert pool.shrunk == {0} and pool.peaks[0] == 2

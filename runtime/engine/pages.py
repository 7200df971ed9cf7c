"""Pages of the KV cache: who holds each, what its tokens are, and which may be evicted.

Pages with known contents form a tree: the children of a page are those that followed it in some sequence, and page 0 is the
root. A page may have several holders once it is full, since nothing is written to it then. A page in the tree that has no
holder stays until others need it: the one used the longest ago is evicted first. A sequence that holds a page holds its
parent, and lets go of the child first, so no page loses its parent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from .cache_keys import KEY

ROOT = 0  # the null page, which no sequence holds
FEW = 8  # keys in which most children differ


class PageAllocator:
    """The pages of a cache but page 0. `tokens`: tokens of a page. `keep`: later sequences share contents.

    `keys[page, : filled[page]]` identify the tokens of a page (cache_keys.py).
    """

    def __init__(self, pages: int, tokens: int, *, keep: bool) -> None:
        self.budget, self.tokens, self.keep = pages - 1, tokens, keep
        self.keys = np.zeros((pages, tokens, KEY), np.int64)
        self.evicted = 0  # pages, since the allocator was made
        self.reset()

    def reset(self) -> None:
        """All pages are free."""
        self.holders: dict[int, int] = {}  # pages that are held -> by how many sequences
        self.filled: dict[int, int] = {}  # pages that are not free -> tokens whose keys are known
        self.parents: dict[int, int] = {}  # of the pages in the tree
        self.children: dict[int, dict[int, None]] = {}
        self.full: dict[tuple[int, int], int] = {}  # full pages by their parent and the hash of their keys
        self.idle: OrderedDict[int, None] = OrderedDict()  # pages of the tree without holders, the one used longest ago first
        self._released: list[int] = []
        self._fresh = ROOT + 1  # it and those after it were never taken

    @property
    def used(self) -> int:
        """Pages that are held."""
        return len(self.holders)

    @property
    def cached(self) -> int:
        """Pages that are evicted when others need them."""
        return len(self.idle)

    @property
    def free(self) -> int:
        return self.budget - self.used - self.cached

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return self.budget - self.used

    # ---- holders

    def take(self) -> int:
        """A page without contents for one holder; raises RuntimeError where all are held."""
        if not self._released and self._fresh > self.budget:
            self._evict()
        if self._released:
            page = self._released.pop()
        else:
            page, self._fresh = self._fresh, self._fresh + 1
        self.holders[page], self.filled[page] = 1, 0
        return page

    def hold(self, page: int) -> None:
        """One more sequence holds a page with contents."""
        self.idle.pop(page, None)
        self.holders[page] = self.holders.get(page, 0) + 1

    def drop(self, page: int) -> None:
        """A sequence lets go of a page; of its pages, the last one first."""
        if self.holders[page] > 1:
            self.holders[page] -= 1
            return
        del self.holders[page]
        if page in self.parents:
            self.idle[page] = None
        else:
            self._free(page)

    def touch(self, page: int) -> None:
        """A page was of use; a sequence holds its parent."""
        if page in self.idle:
            self.idle.move_to_end(page)

    def forget(self, page: int) -> bool:
        """As `drop`, but the contents may be wrong: no later sequence shares them, unless another page depends on them.
        Whether they are gone."""
        gone = self.alone(page) and page not in self.children
        if gone:
            self.blank(page)
        self.drop(page)
        return gone

    def blank(self, page: int) -> None:
        """A page with one holder and no children has no known contents any more."""
        assert self.alone(page) and page not in self.children, f"page {page} is shared"
        self._leave_tree(page)
        self.filled[page] = 0

    def alone(self, page: int) -> bool:
        """Whether one sequence holds a page."""
        return self.holders.get(page) == 1

    # ---- contents

    def find(self, parent: int, keys: np.ndarray) -> int | None:
        """The full page after `parent` with exactly these keys [tokens, KEY]."""
        page = self.full.get((parent, hash_of(keys)))
        return page if page is not None and np.array_equal(self.keys[page], keys) else None

    def nearest(self, parent: int, keys: np.ndarray) -> tuple[int, int]:
        """The page after `parent` that shares the most leading keys with keys [n, KEY], and their number; (0, 0): none does.

        Of several, one without holders that has nothing else, if there is one.
        """
        pages, common = np.fromiter(self.children.get(parent, ()), np.int64), np.empty(0, np.int64)
        for count in (min(FEW, len(keys)), min(self.tokens, len(keys))):
            common = self._common(pages, keys[:count])
            if not count or not (common == count).any():
                break
            pages, common = pages[common == count], common[common == count]
        best = int(common.max(initial=0))
        if not best:
            return ROOT, 0
        nearest = [int(page) for page in pages[common == best]]
        return max(nearest, key=lambda page: self.is_spare(page, best)), best

    def is_spare(self, page: int, tokens: int) -> bool:
        """Whether a page has no holder and exactly so many tokens: a sequence may go on in it."""
        return page in self.idle and self.filled[page] == tokens < self.tokens

    def write(self, page: int, parent: int, keys: np.ndarray) -> int:
        """Tokens with these keys [n, KEY] were written after those of a page that one sequence holds, and that follows
        `parent`.

        Returns the page that the sequence holds from now on: another one where that has the same contents.
        """
        assert self.alone(page), f"page {page} is shared and was written"
        start = self.filled[page]
        end = self.filled[page] = start + len(keys)
        self.keys[page, start:end] = keys
        if page not in self.parents and self.keep and (parent == ROOT or parent in self.parents):
            self.parents[page] = parent
            self.children.setdefault(parent, {})[page] = None
        return self._completed(page) if end == self.tokens and page in self.parents else page

    def goes_on(self, page: int) -> bool:
        """Whether a page has tokens, and has room for more than one: then `add` does."""
        return 0 < self.filled.get(page, 0) < self.tokens - 1

    def add(self, page: int, key: np.ndarray) -> None:
        """As `write`, of one token: the page stays where it is in the tree."""
        assert self.alone(page), f"page {page} is shared and was written"
        self.keys[page, self.filled[page]] = key
        self.filled[page] += 1

    def _completed(self, page: int) -> int:
        """A page of the tree is full from now on."""
        parent, keys = self.parents[page], self.keys[page]
        if (same := self.find(parent, keys)) is not None:
            self.hold(same)
            self._leave_tree(page)
            self.drop(page)
            return same
        self.full.setdefault((parent, hash_of(keys)), page)  # after a collision only `nearest` gives it
        return page

    def _common(self, pages: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The number of leading keys [n, KEY] that each page shares."""
        filled = np.array([self.filled[int(page)] for page in pages], np.int64)
        same = (self.keys[pages, : len(keys)] == keys).all(axis=2) & (np.arange(len(keys)) < filled[:, None])
        return same.cumprod(axis=1).sum(axis=1)

    def _evict(self) -> None:
        if not self.idle:
            raise RuntimeError(f"all {self.budget} pages of the cache are in use; load the artifact again")
        page, _ = self.idle.popitem(last=False)
        assert page not in self.children, f"page {page} was to be evicted before those after it"
        self._leave_tree(page)
        self._free(page)
        self.evicted += 1

    def _leave_tree(self, page: int) -> None:
        parent = self.parents.pop(page, None)
        if parent is None:
            return
        del self.children[parent][page]
        if not self.children[parent]:
            del self.children[parent]
        if self.filled[page] == self.tokens and self.full.get(place := (parent, hash_of(self.keys[page]))) == page:
            del self.full[place]

    def _free(self, page: int) -> None:
        del self.filled[page]
        self._released.append(page)

    def contents(self, pages: Sequence[int], tokens: int) -> np.ndarray:
        """The keys of the first tokens of a sequence with such pages, int64 [tokens, KEY]."""
        return self.keys[list(pages)].reshape(-1, KEY)[:tokens]


def hash_of(keys: np.ndarray) -> int:
    """Equal for equal keys, and the same for others at most by chance: compare the keys as well."""
    return hash(keys.tobytes())

"""What a position of the cache is of, as numbers that can be compared: so that a cache is reused only for the same content.

A key is four integers: what stands there (a token id, or -1 - r for row r of a tile's features), Prompt.state, and a digest of
128 bits: of the tile that the row belongs to or, with cross-attention, of everything that the position sees. Keys and
values of a position depend on the keys up to it and on nothing else. 128 bits, because whoever finds two pictures of one
digest could read what others asked about the first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ..processor.prompt import Prompt, Sight

KEY = 4  # integers
_DIGEST = 16  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """Of one prompt: L positions, and its pictures."""

    keys: np.ndarray  # int64 [L, KEY]
    answer: np.ndarray  # int64 [KEY]: the key of every token of the answer, but for its id
    pictures: tuple[bytes, ...]  # digests of the tiles of features or, with cross-attention, of pictures


NOTHING = Content(np.empty((0, KEY), np.int64), np.zeros(KEY, np.int64), ())


def content_of(prompt: Prompt, rows_per_tile: int, *, cross: bool) -> Content:
    """`rows_per_tile`: rows of features of one tile. `cross`: pictures enter by cross-attention."""
    keys = np.zeros((prompt.length, KEY), np.int64)
    keys[:, 0], keys[:, 1] = prompt.token_ids, prompt.state
    answer = np.array([0, prompt.state[-1], 0, 0], np.int64)
    if cross:
        pictures = _pictures(prompt)
        if prompt.sight:
            keys[:, 2:] = _seen(prompt.sight, pictures)
            answer[2:] = keys[-1, 2:]
        return Content(keys, answer, pictures)
    pictures = tuple(_digest(tile) for tile in prompt.pixels)
    shown = np.flatnonzero(prompt.rows >= 0)
    if len(shown):
        tile, row = np.divmod(prompt.rows[shown], rows_per_tile)
        keys[shown, 0] = -1 - row
        keys[shown, 2:] = np.array([_integers(digest) for digest in pictures])[tile]
    return Content(keys, answer, pictures)


def _pictures(prompt: Prompt) -> tuple[bytes, ...]:
    """Digests of whole pictures: their tiles attend to each other."""
    if prompt.grids is None or not len(prompt.grids):
        return ()
    stacks = np.split(prompt.pixels, len(prompt.grids))
    return tuple(_digest(stack, grid) for stack, grid in zip(stacks, prompt.grids, strict=True))


def _seen(sight: Sight, pictures: tuple[bytes, ...]) -> np.ndarray:
    """int64 [L, 2]: a digest of the pictures that each position sees, of which tiles, and through which gates.

    0 where both gates are shut: such a position is as in a text without pictures.
    """
    rows = np.concatenate((sight.visible, sight.gates), axis=1)  # [L, N * t + 2]
    starts = np.flatnonzero(np.concatenate(([True], (rows[1:] != rows[:-1]).any(axis=1))))
    visible = sight.visible.reshape(len(rows), len(pictures), -1)  # [L, N, t]
    digests = []
    for start in starts:
        if not sight.gates[start].any():
            digests.append((0, 0))
            continue
        seen = [place for place in range(len(pictures)) if visible[start, place].any()]
        parts = [part for place in seen for part in (np.frombuffer(pictures[place], np.uint8), visible[start, place])]
        digests.append(_integers(_digest(sight.gates[start], *parts)))
    return np.repeat(np.array(digests), np.diff(np.append(starts, len(rows))), axis=0)


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _integers(digest: bytes) -> tuple[int, int]:
    first, second = np.frombuffer(digest, np.int64)
    return int(first), int(second)

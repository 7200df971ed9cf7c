"""Comparable keys for the contents of the KV cache: equal prefixes of keys have equal cache rows.

A key is four integers: the token id (or -1 - r for row r of a tile's features), Prompt.state, and a digest of 128 bits. The
digest is that of the row's tile or, with cross-attention, of everything that the position sees. The cache rows of a position
depend on the keys up to it and on nothing else. 128 bits, because a user who finds two images of one digest could read
questions of others about the first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ..processor.prompt import CrossAttentionMask, Prompt

KEY = 4  # integers
_DIGEST = 16  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class CacheKeys:
    """The keys of one prompt of L positions, and of its images."""

    keys: np.ndarray  # int64 [L, KEY]
    answer: np.ndarray  # int64 [KEY]: the key of every token of the answer, but for its id
    images: tuple[bytes, ...]  # digests of the tiles of features or, with cross-attention, of images


NO_KEYS = CacheKeys(np.empty((0, KEY), np.int64), np.zeros(KEY, np.int64), ())


def cache_keys_of(prompt: Prompt, rows_per_tile: int, *, cross: bool) -> CacheKeys:
    """The keys of a prompt. `rows_per_tile`: rows of features of one tile. `cross`: images enter by cross-attention."""
    keys = np.zeros((prompt.length, KEY), np.int64)
    keys[:, 0], keys[:, 1] = prompt.token_ids, prompt.state
    answer = np.array([0, prompt.state[-1], 0, 0], np.int64)
    if cross:
        images = _images(prompt)
        if prompt.cross_attention:
            keys[:, 2:] = _attention_digests(prompt.cross_attention, images)
            answer[2:] = keys[-1, 2:]
        return CacheKeys(keys, answer, images)
    images = tuple(_digest(tile) for tile in prompt.pixels)
    places = np.flatnonzero(prompt.rows >= 0)
    if len(places):
        tile, row = np.divmod(prompt.rows[places], rows_per_tile)
        keys[places, 0] = -1 - row
        keys[places, 2:] = np.array([_integers(digest) for digest in images])[tile]
    return CacheKeys(keys, answer, images)


def _images(prompt: Prompt) -> tuple[bytes, ...]:
    """Digests of whole images: their tiles attend to each other."""
    if prompt.grids is None or not len(prompt.grids):
        return ()
    stacks = np.split(prompt.pixels, len(prompt.grids))
    return tuple(_digest(stack, grid) for stack, grid in zip(stacks, prompt.grids, strict=True))


def _attention_digests(cross_attention: CrossAttentionMask, images: tuple[bytes, ...]) -> np.ndarray:
    """int64 [L, 2]: for each position a digest of the images and tiles that it sees, and of its gates.

    0 where both gates are shut: such a position is as in a text without images.
    """
    rows = np.concatenate((cross_attention.visible, cross_attention.gates), axis=1)  # [L, N * t + 2]
    starts = np.flatnonzero(np.concatenate(([True], (rows[1:] != rows[:-1]).any(axis=1))))
    visible = cross_attention.visible.reshape(len(rows), len(images), -1)  # [L, N, t]
    digests = []
    for start in starts:
        if not cross_attention.gates[start].any():
            digests.append((0, 0))
            continue
        places = [place for place in range(len(images)) if visible[start, place].any()]
        parts = [part for place in places for part in (np.frombuffer(images[place], np.uint8), visible[start, place])]
        digests.append(_integers(_digest(cross_attention.gates[start], *parts)))
    return np.repeat(np.array(digests), np.diff(np.append(starts, len(rows))), axis=0)


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _integers(digest: bytes) -> tuple[int, int]:
    first, second = np.frombuffer(digest, np.int64)
    return int(first), int(second)

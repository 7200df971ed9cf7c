"""The state of a conversation between its turns."""

from __future__ import annotations

import numpy as np

from .request import Sequence

NO_FEATURES = np.empty((0, 0), np.float32)


class Conversation:
    """The image features of a conversation so far. Its slot of the cache is parked under this object (cache.py).

    It has no reference to the chat that holds it, which can be collected while a turn runs.
    """

    def __init__(self, features: np.ndarray = NO_FEATURES, tiles: tuple[bytes, ...] = ()) -> None:
        self.features = features  # [tiles * P, C] float32
        self.tiles = tiles  # digests of the tiles whose features these are

    def fork(self) -> Conversation:
        """Another conversation with the same images so far, and no slot."""
        return Conversation(self.features, self.tiles)

    def common_tiles(self, tiles: tuple[bytes, ...]) -> int:
        """The number of leading tiles of a prompt that are this conversation's: images may have been removed since."""
        pairs = enumerate(zip(self.tiles, tiles, strict=False))
        return next((place for place, (mine, other) in pairs if mine != other), min(len(self.tiles), len(tiles)))

    def keep(self, turn: Sequence) -> None:
        """Keep the image features of a turn that has finished."""
        if not turn.cross_tiles:
            self.features, self.tiles = turn.features, turn.cache_keys.images

"""What a request asks, before and after preparation.

Legend: L positions of the prompt, S side of a tile, P rows of features per tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .images import Frame


class PromptError(ValueError):
    """A prompt that cannot be run; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat: who speaks, the text, and how many pictures come with it."""

    role: str  # system | user | assistant
    text: str
    images: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sight:
    """What each position sees of the pictures, where they enter by cross-attention. N pictures of t tiles each."""

    visible: np.ndarray  # bool [L, N * t]: the tiles that a position attends to
    gates: np.ndarray  # float32 [L, 2]: factors 0 or 1 of a cross layer's attention and of its MLP


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """A prompt ready for the graphs: the arrays are read, never written, by those who get it."""

    token_ids: np.ndarray  # int32 [L]; at picture positions the image token, or 0 where pictures have no id
    rows: np.ndarray  # int32 [L]; -1: embed the token id, else that row of the features [tiles * P, C]
    pixels: np.ndarray  # uint8 [tiles, S, S, 3], in the order of the rows
    frames: tuple[Frame, ...]  # one per picture, in the order given
    image_tokens: int  # positions that pictures take
    grids: np.ndarray | None = None  # int32 [pictures, 2]: (rows, columns) of tiles of each, where pictures have tiles
    sight: Sight | None = None  # cross-attention only, and only with pictures
    ntk: float = 1.0  # dynamic NTK: the base's factor before its exponent, fixed by this prompt's length
    # int32 [L]: what the keys and values of a position depend on besides the positions up to it. A chat may keep cached
    # positions only where this agrees too.
    state: np.ndarray

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return int(self.token_ids.size)

    @property
    def text_tokens(self) -> int:
        return self.length - self.image_tokens

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
class Prompt:
    """A prompt ready for the graphs: the arrays are read, never written, by those who get it."""

    token_ids: np.ndarray  # int32 [L]; at picture positions the image token, or 0 where pictures have no id
    rows: np.ndarray  # int32 [L]; -1: embed the token id, else that row of the features [tiles * P, C]
    pixels: np.ndarray  # uint8 [tiles, S, S, 3], in the order of the rows
    frames: tuple[Frame, ...]  # one per picture, in the order given

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return int(self.token_ids.size)

    @property
    def image_tokens(self) -> int:
        """Positions that pictures take."""
        return int(np.count_nonzero(self.rows >= 0))

    @property
    def text_tokens(self) -> int:
        return self.length - self.image_tokens

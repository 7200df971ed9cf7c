"""The text of an answer while its tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Detokenizer, Tokenizer


class IncrementalDetokenizer:
    """Tokens in, pieces of text out: without blanks around the answer, ended before the first stop string.

    What may still turn out to be a stop string, or a blank at the end, is held back; the pieces together are the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], from_token: int = 0, *, streamed: bool = False) -> None:
        """`from_token`: how many tokens there must be before a stop string counts. `streamed`: pieces are in `given` as soon as
        they are certain, where a thread may read them that does not add tokens."""
        self.tokens, self.from_token = 0, from_token
        self.detokenizer = Detokenizer(tokenizer)
        self.stops, self.streamed = tuple(stop for stop in stops if stop), streamed
        self.given: list[str] = []
        self.unread: list[int] = []  # tokens whose text nobody has asked for
        self.held = ""
        self.stopped = False

    @property
    def pieces(self) -> list[str]:
        self._read()
        return self.given

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add_unread(self, token_id: int) -> None:
        """As `add`, but what is not streamed is turned into text at the end, unless a stop string may end it."""
        self.unread.append(token_id)
        if self.stops or self.streamed:
            self._read()

    def add(self, token_id: int) -> str:
        """The piece that this token sets free, perhaps empty."""
        self._read()
        self.tokens += 1
        return "" if self.stopped else self._release(self.detokenizer.add(token_id))

    def finish(self) -> str:
        """The last piece."""
        self._read()
        if self.stopped:
            return ""
        piece = self._release(self.detokenizer.finish())
        return piece if self.stopped else piece + self._give(self.held.rstrip())

    def stopped_at_end(self) -> bool:
        """Whether a stop string ends the text, what is held back included, where no token follows."""
        if self.stops:
            self.finish()
        return self.stopped

    def _read(self) -> None:
        unread, self.unread = self.unread, []
        for token_id in unread:
            self.add(token_id)

    @property
    def _counting(self) -> tuple[str, ...]:
        return self.stops if self.tokens >= self.from_token else ()

    def _release(self, new: str) -> str:
        self.held += new
        found = [at for at in (self.held.find(stop) for stop in self._counting) if at >= 0]
        if found:
            self.stopped = True
            return self._give(self.held[: min(found)].rstrip())
        return self._give(self.held[: self._safe()].rstrip())

    def _safe(self) -> int:
        """Characters held that cannot belong to a stop string any more."""
        for start in range(len(self.held)):
            if any(stop.startswith(self.held[start:]) for stop in self._counting):
                return start
        return len(self.held)

    def _give(self, piece: str) -> str:
        self.held = self.held[len(piece) :]
        piece = piece if self.given else piece.lstrip()
        if piece:
            self.given.append(piece)
        return piece

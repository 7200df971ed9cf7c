"""The incremental detokenizer: the text of an answer while its tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Detokenizer, Tokenizer


class IncrementalDetokenizer:
    """Tokens in, pieces of text out. The text has no blanks around it and ends before the first stop string.

    Text that may still become a stop string, or a blank at the end, is held back. The pieces together are the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], from_token: int = 0, *, streamed: bool = False) -> None:
        """`from_token`: how many tokens there must be before a stop string counts. `streamed`: `pieces` has each one as soon
        as it is certain, so that a thread that adds no tokens may read it."""
        self.tokens, self.from_token = 0, from_token
        self.detokenizer = Detokenizer(tokenizer)
        self.stops, self.streamed = tuple(stop for stop in stops if stop), streamed
        self.pieces: list[str] = []
        self.unread: list[int] = []  # tokens that are not decoded yet
        self.pending = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """The text so far, without the part that is held back."""
        self._read()
        return "".join(self.pieces)

    def add_unread(self, token_id: int) -> None:
        """As `add`, but the text is made later, at the end, unless it is streamed or a stop string may end it."""
        self.unread.append(token_id)
        if self.stops or self.streamed:
            self._read()

    def add(self, token_id: int) -> str:
        """The piece that is certain with this token, perhaps empty."""
        self._read()
        self.tokens += 1
        return "" if self.stopped else self._release(self.detokenizer.add(token_id))

    def finish(self) -> str:
        """The last piece: the text that was held back."""
        self._read()
        if self.stopped:
            return ""
        piece = self._release(self.detokenizer.finish())
        return piece if self.stopped else piece + self._emit(self.pending.rstrip())

    def stopped_at_end(self) -> bool:
        """Whether a stop string ends the text, with the part that is held back, where no token follows."""
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
        self.pending += new
        starts = [start for start in (self.pending.find(stop) for stop in self._counting) if start >= 0]
        if starts:
            self.stopped = True
            return self._emit(self.pending[: min(starts)].rstrip())
        return self._emit(self.pending[: self._safe()].rstrip())

    def _safe(self) -> int:
        """Pending characters that cannot belong to a stop string any more."""
        for start in range(len(self.pending)):
            if any(stop.startswith(self.pending[start:]) for stop in self._counting):
                return start
        return len(self.pending)

    def _emit(self, piece: str) -> str:
        self.pending = self.pending[len(piece) :]
        piece = piece if self.pieces else piece.lstrip()
        if piece:
            self.pieces.append(piece)
        return piece

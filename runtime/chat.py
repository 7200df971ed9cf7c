"""A conversation over a kept slot.

Each turn renders the whole conversation anew; the longest beginning that the slot holds is kept, only the rest is prefilled.
So the tokens are those of a fresh prompt, whatever the template does with earlier turns, and a turn that is changed or taken
back costs what comes after it. So does a turn whose slot somebody else needed meanwhile: what it has lost is computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import merge_params, one_answer
from .engine.request import Output, SamplingParams, Sequence
from .processor.images import ImageSource, load_image
from .processor.prompt import Message, as_list

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .model import Model


class Chat:
    """Made by Model.chat; a context manager that frees its slot at the end.

    For several threads: turns are sent one after another. A new turn, `rewind` and `close` end one that is still streamed,
    in whichever thread; `close` also one that is sent, whose answer then ends where it is ("cancelled") and is not kept.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        self.model = model
        self._words = threading.RLock()  # held while messages, images or the turn change
        self._sending = threading.RLock()  # held while a turn is sent
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.images: list[ImageSource] = []
        self.holder = object()  # what the slot is parked for; not the chat, which can be forgotten meanwhile
        self.turn: Sequence | None = None  # the turn that runs
        self.features = np.empty((0, model.info.hidden_size), np.float32)  # [tiles * P, C] of the images so far
        self.tiles: tuple[bytes, ...] = ()  # digests of the tiles whose features these are

    def send(
        self,
        text: str | Message,
        images: Any = None,
        *,
        sampling: SamplingParams | None = None,
        return_logits: bool = False,
        **settings: Any,
    ) -> Output:
        """One turn: the user's text or message and its images in, the answer out. Arguments as in Model.generate."""
        with self._sending:
            message, new, sequence = self._begin(text, images, sampling, return_logits, settings)
            try:
                output = self.model.run([sequence])[0]
                self._keep(message, new, sequence, output.text)
                return output
            finally:
                self._end(sequence)

    def stream(
        self, text: str | Message, images: Any = None, *, sampling: SamplingParams | None = None, **settings: Any
    ) -> Iterator[str]:
        """As `send`, in pieces; a turn whose pieces are not all taken is forgotten, at the latest when the next one begins."""
        with self._sending:
            message, new, sequence = self._begin(text, images, sampling, False, settings)
        pieces = []
        with closing(self.model.stream_sequence(sequence)) as stream:  # cancels the turn; the garbage collector must not wait
            for piece in stream:
                pieces.append(piece)
                yield piece
        self._keep(message, new, sequence, "".join(pieces))

    def rewind(self, turns: int = 1) -> None:
        """Take the last turns back, with their images; what was before them stays in the cache.

        A turn that is still streamed is forgotten, one that another thread sends is waited for.
        """
        with self._sending, self._words:
            self._rewind(turns)
            self._end(self.turn)

    def _rewind(self, turns: int) -> None:
        said = [place for place, message in enumerate(self.messages) if message.role == "user"]
        if not 0 <= turns <= len(said):
            raise ValueError(f"{turns} turns were to be taken back; the conversation has {len(said)}")
        keep = said[len(said) - turns] if turns else len(self.messages)
        taken = sum(message.images for message in self.messages[keep:])
        self.images = self.images[: len(self.images) - taken]
        self.messages = self.messages[:keep]

    def fork(self) -> Chat:
        """Another chat that has heard the same so far. Its first turn copies what this one's slot holds of it."""
        other = Chat(self.model)
        with self._words:
            other.messages, other.images = list(self.messages), list(self.images)
            other.features, other.tiles = self.features, self.tiles
        return other

    @property
    def slot(self) -> int | None:
        """The slot that is kept for the next turn, unless others need it before."""
        return self.model.engine.cache.parked.get(self.holder)

    def close(self) -> None:
        """Free the slot; the conversation can go on, at the cost of a fresh prefill."""
        with self._words:
            turn, self.turn = self.turn, None
        self.model.access.at_last(self._release, self.model.engine, self.holder, turn)

    @staticmethod
    def _release(engine: Engine, holder: object, turn: Sequence | None) -> None:
        if turn is not None:
            engine.cancel(turn)
        if (slot := engine.cache.take_back(holder)) is not None:
            engine.cache.release(slot)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "tiles" in self.__dict__:  # the garbage collector calls this at any time, and must not wait
            self.model.access.soon(self._release, self.model.engine, self.holder, self.turn)

    def _begin(
        self,
        text: str | Message,
        images: Any,
        sampling: SamplingParams | None,
        return_logits: bool,
        settings: dict[str, Any],
    ):
        given = as_list(images)
        message = self.model.processor.turn(text, len(given))
        new = [load_image(image, alpha=self.model.info.image.alpha) for image in given]
        with self._words:  # a turn that ends meanwhile would be missing from the prompt
            prompt = self.model.processor.prompt([*self.messages, message], [*self.images, *new])
            sequence = self.model.new_sequence(prompt, one_answer(merge_params(sampling, settings)), return_logits)
            self._end(self.turn)
            self._reuse(sequence)
            self.turn = sequence
        return message, new, sequence

    def _end(self, sequence: Sequence | None) -> None:
        """Forget a turn that was not kept: it must not write into the slot any more."""
        with self._words:
            if sequence is not None and sequence is self.turn:
                self.model.cancel(sequence)
                self.turn = None

    def _reuse(self, sequence: Sequence) -> None:
        """Give the sequence the features of earlier images, and this chat's slot, if there still is one when it starts."""
        sequence.holder = self.holder
        # Images may have been taken back since.
        wanted = sequence.cache_keys.images
        same = next((n for n, pair in enumerate(zip(self.tiles, wanted, strict=False)) if pair[0] != pair[1]), None)
        sequence.tiles_done = min(len(self.tiles), len(wanted)) if same is None else same
        rows = sequence.tiles_done * self.model.info.image.rows
        sequence.features[:rows] = self.features[:rows]

    def _keep(self, message: Message, new: list[Any], sequence: Sequence, answer: str) -> None:
        with self._words:
            if self.turn is not sequence:  # forgotten while its pieces were given out
                return
            self.turn = None
            self.messages += [message, Message("assistant", answer)]
            self.images += new
            if not sequence.cross_tiles:
                self.features, self.tiles = sequence.features, sequence.cache_keys.images

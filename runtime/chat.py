"""A conversation that keeps its slot of the cache between turns, or in an artifact with pages, its pages while they last.

Each turn renders the whole conversation anew; the longest prefix that the slot holds is kept, and only the rest is prefilled.
So the tokens are those of a fresh prompt, whatever the template does with earlier turns. After a
turn that was changed or taken back, what follows it is prefilled; where another request took the slot, all is prefilled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from .engine.conversation import Conversation
from .engine.request import Output, SamplingParams, Sequence, merge_params, one_answer
from .processor.images import ImageSource, load_image
from .processor.prompt import Message, as_list

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .model import Model


class Chat:
    """A conversation with a model, made by Model.chat; a context manager that frees its slot at the end.

    For several threads: turns are sent one after another. A new turn, `rewind` and `close` end one that is still streamed,
    in whichever thread; `close` also one that is sent, whose answer then ends where it is ("cancelled") and is not kept.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        self.model = model
        self._state = threading.RLock()  # while messages, images or the turn change
        self._sending = threading.RLock()  # while a turn is sent
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.images: list[ImageSource] = []
        self.turn: Sequence | None = None  # the turn that runs
        self.conversation = Conversation()

    def send(
        self,
        text: str | Message,
        images: Any = None,
        *,
        sampling: SamplingParams | None = None,
        return_logits: bool = False,
        **settings: Any,
    ) -> Output:
        """Send one turn, the user's text or message and its images, and return the answer. Arguments as in Model.generate."""
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
        """As `send`, in pieces. A turn whose pieces are not all read is dropped, at the latest when the next one begins."""
        with self._sending:
            message, new, sequence = self._begin(text, images, sampling, False, settings)
        pieces = []
        with closing(self.model.stream_sequence(sequence)) as stream:  # cancels the turn; the garbage collector must not wait
            for piece in stream:
                pieces.append(piece)
                yield piece
        self._keep(message, new, sequence, "".join(pieces))

    def rewind(self, turns: int = 1) -> None:
        """Remove the last turns with their images; the turns before them stay in the cache. Raises ValueError for too many.

        A turn that is still streamed is dropped; one that another thread sends is waited for.
        """
        with self._sending, self._state:
            self._rewind(turns)
            self._end(self.turn)

    def _rewind(self, turns: int) -> None:
        starts = [place for place, message in enumerate(self.messages) if message.role == "user"]
        if not 0 <= turns <= len(starts):
            raise ValueError(f"rewind of {turns} turns; the conversation has {len(starts)}, so give at most that")
        keep = starts[len(starts) - turns] if turns else len(self.messages)
        dropped = sum(message.images for message in self.messages[keep:])
        self.images = self.images[: len(self.images) - dropped]
        self.messages = self.messages[:keep]

    def fork(self) -> Chat:
        """Another chat with the same messages so far. Its first turn copies what this one's slot holds of them."""
        other = Chat(self.model)
        with self._state:
            other.messages, other.images = list(self.messages), list(self.images)
            other.conversation = self.conversation.fork()
        return other

    @property
    def slot(self) -> int | None:
        """The slot that is kept for the next turn, unless others need it before; None with pages, which nothing reserves."""
        return self.model.engine.slot_of(self.conversation)

    def close(self) -> None:
        """Free the slot; the conversation can go on, at the cost of a fresh prefill."""
        with self._state:
            turn, self.turn = self.turn, None
        self.model.access.at_last(self._release, self.model.engine, self.conversation, turn)

    @staticmethod
    def _release(engine: Engine, conversation: Conversation, turn: Sequence | None) -> None:
        if turn is not None:
            engine.cancel(turn)
        engine.release(conversation)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "conversation" in self.__dict__:  # the garbage collector calls this at any time, and must not wait
            self.model.access.soon(self._release, self.model.engine, self.conversation, self.turn)

    def _begin(
        self,
        text: str | Message,
        images: Any,
        sampling: SamplingParams | None,
        return_logits: bool,
        settings: dict[str, Any],
    ):
        sources = as_list(images)
        message = self.model.processor.turn(text, len(sources))
        new = [load_image(image, alpha=self.model.info.image.alpha) for image in sources]
        with self._state:  # a turn that ends meanwhile would be missing from the prompt
            prompt = self.model.processor.prompt([*self.messages, message], [*self.images, *new])
            sequence = self.model.new_sequence(prompt, one_answer(merge_params(sampling, settings)), return_logits)
            self._end(self.turn)
            self.model.engine.resume(sequence, self.conversation)
            self.turn = sequence
        return message, new, sequence

    def _end(self, sequence: Sequence | None) -> None:
        """Forget a turn that was not kept: it must not write into the slot any more."""
        with self._state:
            if sequence is not None and sequence is self.turn:
                self.model.cancel(sequence)
                self.turn = None

    def _keep(self, message: Message, new: list[Any], sequence: Sequence, answer: str) -> None:
        with self._state:
            if self.turn is not sequence:  # forgotten while its pieces were given out
                return
            self.turn = None
            self.messages += [message, Message("assistant", answer)]
            self.images += new
            self.conversation.keep(sequence)

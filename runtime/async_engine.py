"""Many requests at once for asyncio: a thread runs the engine's steps, and answers arrive in pieces.

The thread is the only one that touches the engine; everybody else leaves it commands, which it takes between two steps.
Prompts are prepared by a second thread, so that reading pictures holds up no stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .model import Model, as_list, grouped, merge_params, one_answer
from .prompt import Message
from .request import Output, SamplingParams, Sequence

Images = Any
Item = str | Output | Exception  # a piece, then the whole answer or what went wrong


@dataclass(slots=True, eq=False)
class _Answer:
    """One sequence and whoever waits for it."""

    sequence: Sequence
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item]
    given: int = 0  # pieces


class AsyncEngine:
    """Answers prompts of a model that nobody else uses meanwhile; use it in an `async with` block or close it.

    A prompt is a text, as in Model.generate, or a conversation as a list of messages, whose pictures are `images` in order;
    what an earlier turn left in the cache is taken over, so that no chat needs to be kept.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._answers: dict[int, _Answer] = {}  # by the id of the sequence; the worker's own
        self._commands: list[Callable[[], None]] = []
        self._closing = False
        self._wake = threading.Condition()
        self._preparing = ThreadPoolExecutor(1, "staticvl-prepare")
        self._worker = threading.Thread(target=self._work, name="staticvl-engine", daemon=True)
        self._worker.start()

    async def generate(
        self,
        prompt: str | SequenceOf[Message],
        images: Images = None,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        **settings: Any,
    ) -> Output:
        """The answer to one prompt; arguments and errors as of Model.generate. Cancelling the task cancels the request."""
        params = merge_params(sampling, settings)
        answers = [self._ask(sequence) for sequence in await self._prepared(prompt, images, raw, params)]
        try:
            return grouped([await _result(answer) for answer in answers], params.n)[0]
        finally:
            self._drop(answers)

    async def stream(
        self,
        prompt: str | SequenceOf[Message],
        images: Images = None,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        **settings: Any,
    ) -> AsyncGenerator[str, None]:
        """Pieces of the answer as they are decided; closing the generator cancels the request."""
        params = one_answer(merge_params(sampling, settings))
        [sequence] = await self._prepared(prompt, images, raw, params)
        answer = self._ask(sequence)
        try:
            while isinstance(item := await answer.items.get(), str):
                yield item
            if isinstance(item, Exception):
                raise item
        finally:
            self._drop([answer])

    async def close(self) -> None:
        """Stop after the step that runs; whoever still waits for an answer gets an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._worker.join)
        self._preparing.shutdown(cancel_futures=True)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- in the caller's thread

    async def _prepared(
        self, prompt: str | SequenceOf[Message], images: Images, raw: bool, params: SamplingParams
    ) -> list[Sequence]:
        def prepare() -> list[Sequence]:
            if isinstance(prompt, list | tuple):
                ready = self.model.prepare_messages(list(prompt), as_list(images))
            else:
                ready = self.model.prepare(prompt, as_list(images), raw)  # type: ignore[arg-type]
            return [self.model.new_sequence(ready, params, index=index) for index in range(params.n)]

        if self._closing:
            raise RuntimeError("the engine was closed; open another one")
        return await asyncio.get_running_loop().run_in_executor(self._preparing, prepare)

    def _ask(self, sequence: Sequence) -> _Answer:
        answer = _Answer(sequence, asyncio.get_running_loop(), asyncio.Queue())
        self._command(lambda: self._start(answer))
        return answer

    def _drop(self, answers: list[_Answer]) -> None:
        self._command(lambda: [self._forget(answer) for answer in answers])

    def _command(self, command: Callable[[], object]) -> None:
        with self._wake:
            self._commands.append(command)  # type: ignore[arg-type]
            self._wake.notify()

    # ---- in the worker's thread

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._commands or self._closing or not self.model.engine.scheduler.idle)
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            if self._closing:
                self._fail(RuntimeError("the engine was closed before the answer was complete"))
                return
            try:
                changed = self.model.advance()
            except Exception as error:  # whatever a device raises; it belongs to those who wait, and others may still come
                self._fail(error)
                continue
            for sequence in changed:
                if answer := self._answers.get(sequence.id):
                    self._deliver(answer)

    def _start(self, answer: _Answer) -> None:
        self._answers[answer.sequence.id] = answer
        self.model.start(answer.sequence)

    def _deliver(self, answer: _Answer) -> None:
        """What is new of an answer, to its loop."""
        sequence = answer.sequence
        output = self.model.output(sequence) if sequence.finish_reason else None
        pieces = self.model.texts[sequence.id].pieces
        new, answer.given = pieces[answer.given :], len(pieces)
        self._post(answer, *new, *([output] if output else []))
        if output:
            self._forget(answer)

    def _post(self, answer: _Answer, *items: Item) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits any more
            for item in items:
                answer.loop.call_soon_threadsafe(answer.items.put_nowait, item)

    def _forget(self, answer: _Answer) -> None:
        if self._answers.pop(answer.sequence.id, None):
            self.model.end(answer.sequence)

    def _fail(self, error: Exception) -> None:
        for answer in list(self._answers.values()):
            self._post(answer, error)
            self._forget(answer)


async def _result(answer: _Answer) -> Output:
    while isinstance(item := await answer.items.get(), str):
        pass
    if isinstance(item, Exception):
        raise item
    return item

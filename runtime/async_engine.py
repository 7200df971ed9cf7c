"""Many requests at once for asyncio: a thread runs the engine's steps, and answers arrive in pieces.

Tasks leave the thread commands, which it takes between two steps. Other threads may use the model meanwhile (access.py).
Prompts are prepared by a second thread, so that reading images holds up no stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .artifact import ArtifactError
from .backends.distributed.failures import RankError
from .engine.request import Output, SamplingParams, Sequence, grouped, merge_params, one_answer
from .model import Model
from .opening import RunError
from .processor.prompt import Message, Prompt, check_text
from .sampling.sampler import TokenLogprob

Images = Any
Turns = str | Message | SequenceOf[Message]  # one turn, or a conversation
CHECK_S = 2.0  # seconds between two checks of idle ranks
log = logging.getLogger(__name__)


class EngineClosedError(RuntimeError):
    """The engine was closed before the answer was complete."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer, with the log-probabilities of the tokens since the last piece, if the request asks for them."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


def _is_final(error: Exception) -> bool:
    """Whether the error would end every later request too: a rank is gone, or a file of the artifact cannot be opened."""
    return isinstance(error, RankError | ArtifactError) and not isinstance(error, RunError)


Item = Piece | Output | Exception  # pieces, then the whole answer or what went wrong


@dataclass(slots=True, eq=False)
class _Answer:
    """One sequence and the task that waits for it."""

    sequence: Sequence
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[tuple[int, Item]]  # with the index of the answer; one queue for the n answers to a prompt
    pieces: int = 0  # pieces sent so far
    logprobs: int = 0  # log-probabilities sent so far


class Answers:
    """The answers to one prompt as they are generated: iterate over it in an `async with` block, or close it.

    Each item comes with the index of its answer; the last of an answer is its Output. Errors of the device are raised here.
    """

    def __init__(self, items: asyncio.Queue[tuple[int, Item]], count: int, cancel: Callable[[], None]) -> None:
        self._items, self._left, self._cancel = items, count, cancel

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> tuple[int, Piece | Output]:
        if not self._left:
            raise StopAsyncIteration
        index, item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        self._left -= isinstance(item, Output)
        return index, item

    def close(self) -> None:
        """Cancel the answers that have not ended; may be called again."""
        self._cancel()

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncEngine:
    """An engine for asyncio that answers the prompts of many tasks; use it in an `async with` block or close it.

    A prompt is a text, as in Model.generate, or a conversation as a list of messages, whose images are `images` in order. The
    prefix cache serves what an earlier turn left in the cache, so that no chat is needed.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._answers: dict[int, _Answer] = {}  # by the id of the sequence; the worker's own
        self._commands: list[Callable[[], None]] = []
        self._closing = False
        self.failure: Exception | None = None  # the error of a rank or a file after which no request is answered
        self.on_failure: Callable[[], object] = lambda: None  # called once, in the engine's thread
        self._wake = threading.Condition()
        self._turn: float | None = None  # when the turn that runs began, by the engine's clock
        self._preparing = ThreadPoolExecutor(1, "staticvl-prepare")
        self._forming = ThreadPoolExecutor(1, "staticvl-form")  # a grammar may take seconds
        self._worker = threading.Thread(target=self._work, name="staticvl-engine", daemon=True)
        self._worker.start()

    @property
    def turn_s(self) -> float:
        """Seconds that the present turn of the engine has taken, at most one step; 0 while there is no work."""
        start = self._turn
        return 0.0 if start is None else self.model.engine.clock() - start

    async def generate(
        self,
        prompt: Turns,
        images: Images = None,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        **settings: Any,
    ) -> Output:
        """The answer to one prompt; arguments and errors as of Model.generate. Cancelling the task cancels the request."""
        params = merge_params(sampling, settings)
        async with await self.submit(prompt, params, images, raw=raw) as answers:
            outputs = {index: item async for index, item in answers if isinstance(item, Output)}
        return grouped([outputs[index] for index in range(params.n)], params.n)[0]

    async def stream(
        self,
        prompt: Turns,
        images: Images = None,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        **settings: Any,
    ) -> AsyncGenerator[str, None]:
        """Pieces of the answer as they are generated; closing the generator cancels the request."""
        params = one_answer(merge_params(sampling, settings))
        async with await self.submit(prompt, params, images, raw=raw) as answers:
            async for _, item in answers:
                if isinstance(item, Piece):
                    yield item.text

    async def prepare(self, prompt: Turns, images: Images = None, *, raw: bool = False) -> Prompt:
        """A prompt that is ready but not queued, so that its length is known; raises PromptError, ImageError."""
        return await self._aside(self._preparing, lambda: self._prepared(prompt, images, raw))

    async def submit(
        self, prompt: Turns | Prompt, params: SamplingParams, images: Images = None, *, raw: bool = False
    ) -> Answers:
        """Queue a prompt; returns its params.n answers. Raises as `generate` does."""
        ready = prompt if isinstance(prompt, Prompt) else await self.prepare(prompt, images, raw=raw)

        def sequences() -> list[Sequence]:
            return [self.model.new_sequence(ready, params, index=index) for index in range(params.n)]

        pool = self._forming if params.constrained else self._preparing
        items: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        answers = [_Answer(sequence, loop, items) for sequence in await self._aside(pool, sequences)]
        self._command(lambda: [self._start(answer) for answer in answers])
        return Answers(items, len(answers), lambda: self._command(lambda: [self._forget(answer) for answer in answers]))

    ask = submit  # its name in earlier releases

    async def close(self) -> None:
        """Stop after the running step; tasks that still wait for an answer get EngineClosedError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._worker.join)
        for pool in (self._preparing, self._forming):
            pool.shutdown(cancel_futures=True)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- in the caller's thread

    async def _aside(self, pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
        """The result of `work`, which runs in `pool` so that it does not block the loop."""
        if self._closing:
            raise EngineClosedError("the engine was closed; open another one")
        if self.failure is not None:
            raise self.failure
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closing and task is not None and not task.cancelling():
                raise EngineClosedError("the engine was closed before the prompt was ready") from None
            raise

    def _prepared(self, prompt: Turns, images: Images, raw: bool) -> Prompt:
        if raw and not isinstance(prompt, list | tuple):
            return self.model.processor.raw_prompt(check_text(prompt), images)
        return self.model.processor.prompt(prompt, images)

    def _command(self, command: Callable[[], object]) -> None:
        with self._wake:
            self._commands.append(command)  # type: ignore[arg-type]
            self._wake.notify()

    # ---- in the worker's thread

    def _work(self) -> None:
        while True:
            self._turn = None
            with self._wake:
                self._wake.wait_for(
                    lambda: self._commands or self._closing or self._answers,
                    timeout=CHECK_S if self.model.ranks and self.failure is None else None,
                )
                commands, self._commands = self._commands, []
            self._turn = self.model.engine.clock()
            for command in commands:
                command()
            if self._closing:
                self._fail(EngineClosedError("the engine was closed before the answer was complete"))
                return
            try:
                if self.model.ranks and self.failure is None and self.model.engine.scheduler.idle:
                    self.model.access.exclusively(self.model.ranks.check)
                if self._answers:
                    self.model.advance()
            except Exception as error:  # an error of all requests; that of a single request is its own `error`
                self._fail(error)
            for answer in list(self._answers.values()):  # another thread may have run steps as well
                self._deliver(answer)

    def _start(self, answer: _Answer) -> None:
        try:
            if self.failure is not None:
                raise self.failure
            self.model.start(answer.sequence, streamed=True)
            self._answers[answer.sequence.id] = answer
        except Exception as error:
            self._post(answer, error)

    def _deliver(self, answer: _Answer) -> None:
        """Send an answer's new pieces, or the error that has ended it, to its loop."""
        try:
            self._send(answer)
        except Exception as error:
            self._check_final(error)  # first: the task that gets the error may read `failure`
            self._post(answer, error)
            self._forget(answer)

    def _send(self, answer: _Answer) -> None:
        sequence = answer.sequence
        output = self.model.output(sequence) if sequence.finish_reason else None
        pieces = sequence.text.pieces if sequence.text else []
        new, answer.pieces = pieces[answer.pieces :], len(pieces)
        logprobs = tuple(sequence.logprobs[answer.logprobs :])
        if output and logprobs and not new:
            new = [""]
        for text in new:
            self._post(answer, Piece(text, logprobs))
            logprobs, answer.logprobs = (), len(sequence.logprobs)
        if output:
            self._post(answer, output)
            self._forget(answer)

    def _post(self, answer: _Answer, item: Item) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: no task waits any more
            answer.loop.call_soon_threadsafe(answer.items.put_nowait, (answer.sequence.sampling.index, item))

    def _forget(self, answer: _Answer) -> None:
        if self._answers.pop(answer.sequence.id, None):
            try:
                self.model.end(answer.sequence)
            except Exception as error:  # of the request log, for example: other requests go on
                log.error("%s", error)

    def _fail(self, error: Exception) -> None:
        """End all answers that have not ended, with an error."""
        self._check_final(error)
        for answer in list(self._answers.values()):
            self._post(answer, error)
            self._forget(answer)

    def _check_final(self, error: Exception) -> None:
        """Note an error that ends all later requests too: of a failed rank, or of a file that cannot be opened."""
        if _is_final(error) and self.failure is None:
            self.failure = error
            self.on_failure()

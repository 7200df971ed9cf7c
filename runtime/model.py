"""The Model: a loaded artifact that answers prompts, streams answers, and chats."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any, Protocol, overload

import numpy as np

from .artifact import Artifact
from .chat import Chat
from .engine.access import EngineAccess
from .engine.engine import Engine
from .engine.request import Output, SamplingParams, Sequence, grouped, merge_params, one_answer
from .engine.request_log import RequestLog, record_of
from .processor.detokenizer import IncrementalDetokenizer
from .processor.processor import Processor
from .processor.prompt import Images, Message, Prompt, Turn, check_text, check_turn, pair_up
from .processor.token_bytes import BadWords
from .sampling.constraints import ConstraintFactory
from .sampling.logits_processors import Constraint


class ModelClosedError(RuntimeError):
    """The model was closed, before a call or in the middle of one."""


class Ranks(Protocol):
    """The other ranks of a model, as rank 0 sees them."""

    def check(self) -> None:
        """Raise RankError if one of them has gone or failed while nothing was to be done."""
        ...

    def close(self) -> None:
        """End them, and all that waits for them."""
        ...


class Model:
    """A loaded artifact: `generate`, `stream` and `chat`. A context manager that closes it.

    For any number of threads: their requests run in one batch. A generator belongs to one thread at a time, as everywhere in
    Python; it may be dropped in any.
    """

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine,
        request_log: RequestLog | None = None,
        ranks: Ranks | None = None,
        *,
        system_in_user: bool = False,
    ) -> None:
        """`ranks`: the other ranks, which end with the model and are checked now and then while nothing runs; None for a model
        of one rank."""
        self.artifact, self.engine, self.request_log, self.ranks = artifact, engine, request_log, ranks
        self.access = EngineAccess(engine.interrupted)
        self.closed = False
        self.info = artifact.manifest.model
        self.processor = Processor.of(artifact, system_in_user=system_in_user)

    def close(self) -> None:
        """Free the memory of the graphs, and end the processes of other ranks; the model cannot be used any more.

        Waits for the step that runs. Calls of other threads that have no answer yet raise ModelClosedError.
        """
        if not self.closed:
            self.closed = True
            self.__dict__.pop("_constraint_factory", None)  # its process ends with it
            self.access.at_last(self._close)

    def _close(self) -> None:
        self._end_all()
        try:
            (self.ranks.close if self.ranks else self.engine.unload)()
        finally:
            self.artifact.close()

    def _end_all(self) -> None:
        self.engine.reset(ModelClosedError("the model was closed before the answer was complete; load the artifact again"))

    def open_graphs(self) -> None:
        """Open every graph now, not at its first run; raises ArtifactError naming one that cannot be opened."""
        self.engine.load()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def generate(
        self,
        prompts: Turn,
        images: Any = None,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        return_logits: bool = False,
        **settings: Any,
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[Message] | tuple[Turn, ...],
        images: Any = None,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        return_logits: bool = False,
        **settings: Any,
    ) -> list[Output]: ...

    def generate(
        self,
        prompts: Turn | SequenceOf[Turn],
        images: Any = None,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        return_logits: bool = False,
        **settings: Any,
    ) -> Output | list[Output]:
        """Answer one prompt (-> Output) or a list of them (-> list of Output), batched.

        prompts: a text, or a Message of the user, is one turn, rendered through the checkpoint's chat template; with raw=True a
        text is passed as it is, image marks and special tokens included. images: for one prompt an image or a list of them
        (path, http(s) URL, data URL or PIL image); for a list of prompts one such entry, or None, for each. Images stand first
        unless the text holds a mark for each, or a Message has them in its parts. Nothing else in a turn is a mark or a special
        token, whatever it spells.
        settings: fields of SamplingParams (max_new_tokens, temperature, top_k, seed, stop, json_schema ...) over `sampling`.
        Of n answers the first is the result and the others are its `others`.
        return_logits: keep the logits of every generated token, float32 [generated, V].

        Raises PromptError, ImageError, ContextError or ConstraintError for input that cannot be answered, ValueError and
        TypeError for settings; then nothing is generated at all.
        """
        params = merge_params(sampling, settings)
        pairs = [(prompts, images)] if isinstance(prompts, str | Message) else pair_up(prompts, images)
        prepared = [self._prompt(turn, some, raw) for turn, some in pairs]
        sequences = [self.new_sequence(prompt, params, return_logits, i) for prompt in prepared for i in range(params.n)]
        outputs = grouped(self.run(sequences), params.n)
        return outputs[0] if isinstance(prompts, str | Message) else outputs

    def stream(
        self, prompt: Turn, images: Images = None, *, sampling: SamplingParams | None = None, raw: bool = False, **settings: Any
    ) -> Generator[str, None, None]:
        """Pieces of the answer to one prompt as they are generated; arguments as in `generate`."""
        params = one_answer(merge_params(sampling, settings))
        return self.stream_sequence(self.new_sequence(self._prompt(prompt, images, raw), params))

    def chat(self, system: str | None = None) -> Chat:
        """A new conversation that keeps its slot of the cache, so that each turn only computes its new part."""
        return Chat(self, system)

    def run(self, sequences: SequenceOf[Sequence]) -> list[Output]:
        """Run sequences to their ends; on any error none of them keeps a slot."""
        try:
            for sequence in sequences:
                self.start(sequence)
            self.access.until(lambda: all(sequence.finish_reason for sequence in sequences), self._advance)
            return [self.output(sequence) for sequence in sequences]
        finally:
            for sequence in sequences:
                self.end(sequence)

    def stream_sequence(self, sequence: Sequence) -> Generator[str, None, None]:
        """Run one sequence and yield its text; a caller that stops iterating cancels it.

        Between two pieces the model may run other requests: the text that this sequence gains meanwhile is yielded later.
        """
        text = self.start(sequence, streamed=True)
        try:
            for index in itertools.count():
                self.access.until(partial(_has_news, sequence, text, index), self._advance)
                if index == len(text.pieces):
                    break
                yield text.pieces[index]
            if sequence.error is not None:
                raise sequence.error
            if last := text.finish():
                yield last
        except GeneratorExit:  # perhaps of the garbage collector, which comes at any time and must not wait
            self.access.soon(self._drop, sequence)
            raise
        except BaseException:
            self.end(sequence)
            raise
        self.end(sequence)

    def new_sequence(self, prompt: Prompt, params: SamplingParams, return_logits: bool = False, index: int = 0) -> Sequence:
        """Answer `index` of n to a prompt, checked and not queued; raises ContextError or ConstraintError."""
        constraints: list[Constraint] = [BadWords(params.bad_words, self.processor.token_bytes)] if params.bad_words else []
        if params.constrained:
            constraints.append(self._constraint_factory.make(params))
        return self.engine.new_sequence(
            prompt, params, return_logits=return_logits, index=index, constraints=tuple(constraints)
        )

    @functools.cached_property
    def _constraint_factory(self) -> ConstraintFactory:
        return ConstraintFactory(self.processor.token_bytes, self.info.eos_token_ids)

    def stops(self, sequence: Sequence) -> tuple[str, ...]:
        """The strings that end the text of a sequence: its own, and the model's."""
        return (*sequence.params.stop, *(() if sequence.params.ignore_eos else self.info.stop_strings))

    def _prompt(self, turn: Turn, images: Images, raw: bool) -> Prompt:
        """The prompt of one user turn; with `raw` of a text as it is."""
        if raw:
            return self.processor.raw_prompt(check_text(turn), images)
        return self.processor.prompt(check_turn(turn), images)

    def start(self, sequence: Sequence, *, streamed: bool = False) -> IncrementalDetokenizer:
        """Queue a sequence; its text grows with every step, of whichever thread. `streamed`: see IncrementalDetokenizer."""
        from_token = sequence.params.min_new_tokens
        text = self.processor.detokenizer(self.stops(sequence), from_token, streamed=streamed)
        self.access.exclusively(self._start, sequence, text)
        return text

    def _start(self, sequence: Sequence, text: IncrementalDetokenizer) -> None:
        if self.closed:
            raise ModelClosedError("the model was closed; load the artifact again")
        self.engine.add(sequence, text)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence that has not finished, between two steps."""
        if sequence.finish_reason is None:
            self.access.at_last(self.engine.cancel, sequence)

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence that was started; one that has not finished is cancelled."""
        self.cancel(sequence)
        self._forget(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """As `end`, where this thread has the engine."""
        self.engine.cancel(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        try:
            if self.request_log and sequence.text is not None:
                sizes = tuple((frame.image_width, frame.image_height) for frame in sequence.prompt.frames)
                arrived = time.time() - (self.engine.clock() - sequence.times.arrived)
                self.request_log.write(record_of(self._output(sequence), arrived, sizes, sequence.reused))
        finally:
            self.engine.forget(sequence)

    def advance(self) -> SequenceOf[Sequence]:
        """One engine step, and the new text of each sequence that gained a token; the sequences that have changed.

        Does nothing but end them where all that is left has passed its deadline. What a step raises is the `error` of the
        sequences that it concerns.
        """
        return self.access.step(self._advance)

    def _advance(self) -> SequenceOf[Sequence]:
        engine = self.engine
        if self.closed:  # by a thread that waits for the step that ran
            self._end_all()
            return tuple(engine.failed)
        expired = engine.expire()
        if engine.scheduler.idle:
            return expired
        try:
            return (*expired, *engine.step().sequences)
        except Exception:
            if not engine.failed:
                raise
            return (*expired, *engine.failed)

    def output(self, sequence: Sequence) -> Output:
        """The answer of a sequence that has finished and is not forgotten; raises what has ended it, where it failed."""
        if sequence.error is not None:
            raise sequence.error
        return self._output(sequence)

    def _output(self, sequence: Sequence) -> Output:
        text = sequence.text
        assert text is not None, "only a sequence that was started and is not forgotten has an answer"
        text.finish()
        return Output(
            text=text.text,
            token_ids=list(sequence.generated),
            finish_reason=sequence.finish_reason or "cancelled",
            boxes=list(self.processor.boxes(text.text, sequence.prompt.frames)),
            prompt_tokens=sequence.prompt.length,
            image_tokens=sequence.prompt.image_tokens,
            timings=sequence.timings(),
            logits=np.stack(sequence.logits) if sequence.logits else None,
            logprobs=sequence.logprobs if sequence.params.logprobs is not None else None,
            reused_tokens=sequence.reused,
        )


def _has_news(sequence: Sequence, text: IncrementalDetokenizer, count: int) -> bool:
    """Whether there are more than `count` pieces, or there will be no more."""
    return sequence.finish_reason is not None or len(text.pieces) > count

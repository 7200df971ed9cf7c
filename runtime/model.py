"""What users hold: a loaded artifact that answers prompts, streams answers, and chats."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, overload

import numpy as np

from .artifact import MANIFEST, Artifact, ArtifactError, Manifest
from .chat import Chat
from .constraints import Constraints
from .engine import NGRAMS, Engine
from .families import family
from .images import ImageSource
from .logit_rules import Guide
from .opening import Checks, open_checked, reading
from .prompt import Message, Prompt, PromptError
from .ranks.start import follow, lead, meet, read_timeout, spawn
from .ranks.world import World, started_world
from .request import Output, SamplingParams, Sequence
from .request_log import RequestLog, record_of
from .sampling import SETTINGS
from .soundness import TEMPLATE
from .text import AnswerText
from .token_bytes import BadWords, TokenBytes
from .tokenizer import load_tokenizer

Images = SequenceOf[ImageSource] | ImageSource | None


def load(
    artifact: str | Path,
    *,
    device: str = "cpu",
    tp: int | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    prefill_budget: int | None = None,
    reuse: bool = True,
    image_cache_mb: int = 256,
    speculate: int = 0,
    ngrams: tuple[int, int] = NGRAMS,
    request_log: str | Path | None = None,
    verify: bool = False,
    verify_key: str | Path | None = None,
) -> Model:
    """Open an artifact for use.

    device: "cpu" for ONNX artifacts; for Ascend ones "npu", "npu:1" (the second card), or "sim", which runs their graphs with
    torch on a CPU ("sim:float32": without rounding to 16 bits). tp: the number of ranks that each layer is cut among, which
    must be what the artifact was compiled for (default).
    threads: cores that ONNX Runtime computes with, in each rank; default every core that this process may use, split among
    the ranks of this machine, or one for a model of less than 16 MiB. timeout: seconds that ranks wait for each other; default
    STATICVL_TIMEOUT, or 300.
    prefill_budget: tokens of the largest chunk that may run while other requests are answered; default: any chunk.
    reuse: take over from earlier requests what a new one shares with them: the beginning of its prompt as it lies in the
    cache, and features of its pictures, of which image_cache_mb megabytes are kept.
    speculate: draft up to so many tokens of every answer from what was said before, where the artifact has graphs that verify
    them (compile with --speculate); ngrams: the fewest and the most last tokens that must have been said before.
    request_log: a file to which the sizes and times of every request are appended (request_log.py).
    verify: check the digest of every file, weights too, before anything is used; without it those of weights are only checked
    on Ascend. verify_key: a file with a public key; an artifact that is not signed with its private key is refused before
    anything of it is used. It includes `verify`.

    The files stay until the model is closed: a build that replaces the artifact meanwhile leaves them where they are.

    An artifact of several ranks runs as so many processes. Called by itself, `load` starts the others on this machine; they
    end with the model. Called in processes that torchrun has started, one for each rank, it returns the model in rank 0; in
    all others it takes part until rank 0's model is closed or gone, and then raises SystemExit, with status 1 if a rank failed.
    A whole model can be loaded in every process of such a run with tp=1.

    Raises ArtifactError for a missing, damaged or unsuitable artifact, RankError when ranks do not come together.
    """
    checks = Checks(verify, Path(verify_key) if verify_key is not None else None)
    world = started_world() if tp != 1 else None
    if world is not None and world.rank > 0:
        raise SystemExit(_take_part(Path(artifact), world, device, threads, timeout, checks))
    opened = open_checked(Path(artifact), checks, rank=0)
    manifest = opened.manifest
    if tp is not None and tp != manifest.tp:
        raise ArtifactError(
            f"{artifact} was compiled for tp={manifest.tp}, not tp={tp}; compile it again with --tp {tp} or load it with "
            f"tp={manifest.tp}"
        )
    if world is not None and world.size != manifest.ranks:
        raise ArtifactError(_wrong_number(artifact, manifest, world.size))
    log = RequestLog(Path(request_log)) if request_log is not None else None
    settings: dict[str, Any] = {"prefill_budget": prefill_budget, "reuse": reuse, "image_cache_mb": image_cache_mb}
    settings |= {"speculate": speculate, "ngrams": ngrams}
    if manifest.ranks == 1:
        engine = Engine(opened, device=device, threads=threads, verify=checks.all_files, **settings)
        return Model(opened, engine, log)
    start: Any = {"device": device, "threads": threads, "timeout": read_timeout(timeout), "checks": checks}
    backend = lead(opened, world, meet(world), **start) if world else spawn(opened, **start)
    return Model(opened, Engine(opened, backend=backend, **settings), log, backend.close, backend.crew.check)


def _take_part(folder: Path, world: World, device: str, threads: int | None, timeout: float | None, checks: Checks) -> int:
    """Run as a rank that a launcher has started, to the end; the exit status."""
    seconds = read_timeout(timeout)
    status, stuck = follow(folder, world, meet(world), device=device, threads=threads, timeout=seconds, checks=checks)
    if stuck:  # in a collective that does not end, and that the interpreter would wait for
        os._exit(status)
    return status


def _wrong_number(artifact: str | Path, manifest: Manifest, started: int) -> str:
    ranks = manifest.ranks
    compiled = f"{ranks} rank{'s' * (ranks > 1)} (tp={manifest.tp}, pp={manifest.pp})"
    right = f"torchrun --nproc-per-node {ranks} -m staticvl.tools.cli generate {artifact} ..."
    if ranks == 1:
        right = "no launcher, or load it with tp=1 for a whole model in every process"
    return f"{artifact} was compiled for {compiled}, but WORLD_SIZE says that {started} were started; start it with {right}"


class Model:
    """A loaded artifact; a context manager that closes it. Not for use from several threads at once."""

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine,
        request_log: RequestLog | None = None,
        on_close: Callable[[], object] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """on_close: what `close` does besides; default: free the graphs. check: raises RankError if the model's other ranks
        are not well, which somebody who does nothing else should ask now and then; None for a model of one rank."""
        self.artifact, self.engine, self.request_log = artifact, engine, request_log
        self.check = check
        self._on_close, self.closed = on_close or engine.unload, False
        self.texts: dict[int, AnswerText] = {}  # of the sequences that run or wait, by id
        engine.on_token = self._gained
        self.facts = artifact.manifest.model
        with reading(artifact.path(MANIFEST), artifact.folder):
            self.family = family(self.facts.family)
        folder = artifact.path(artifact.manifest.tokenizer)
        with reading(folder, artifact.folder):
            self.tokenizer = load_tokenizer(folder, self.facts.tokenizer)
        with reading(folder / TEMPLATE, artifact.folder):
            self.template = (folder / TEMPLATE).read_text(encoding="utf-8")

    def close(self) -> None:
        """Free what the graphs take, and end the processes of other ranks; the model cannot be used any more."""
        if not self.closed:
            self.closed = True
            try:
                self._on_close()
            finally:
                self.artifact.close()

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
        prompts: str,
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
        prompts: list[str] | tuple[str, ...],
        images: Any = None,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        return_logits: bool = False,
        **settings: Any,
    ) -> list[Output]: ...

    def generate(
        self,
        prompts: str | SequenceOf[str],
        images: Any = None,
        *,
        sampling: SamplingParams | None = None,
        raw: bool = False,
        return_logits: bool = False,
        **settings: Any,
    ) -> Output | list[Output]:
        """Answer one prompt (-> Output) or a list of them (-> list of Output), batched.

        prompts: a text is one user turn, rendered through the checkpoint's chat template; with raw=True it is passed as it
        is, picture marks included. images: for one prompt a picture or a list of them (path, http(s) URL, data URL or PIL
        image); for a list of prompts one such entry, or None, for each. Pictures stand first unless the text holds marks.
        settings: fields of SamplingParams (max_new_tokens, temperature, top_k, seed, stop, json_schema ...) over `sampling`.
        Of n answers the first is the result and the others are its `others`.
        return_logits: keep the logits of every generated token, float32 [generated, V].

        Raises PromptError, ImageError, ContextError for input that cannot be answered; then nothing is generated at all.
        """
        params = merge_params(sampling, settings)
        if isinstance(prompts, str):
            prepared = [self.prepare(prompts, as_list(images), raw)]
        else:
            prepared = [self.prepare(text, as_list(some), raw) for text, some in pair_up(prompts, images)]
        sequences = [self.new_sequence(prompt, params, return_logits, i) for prompt in prepared for i in range(params.n)]
        outputs = grouped(self.run(sequences), params.n)
        return outputs[0] if isinstance(prompts, str) else outputs

    def stream(
        self, prompt: str, images: Images = None, *, sampling: SamplingParams | None = None, raw: bool = False, **settings: Any
    ) -> Generator[str, None, None]:
        """Pieces of the answer to one prompt as they are decided; arguments as in `generate`."""
        params = one_answer(merge_params(sampling, settings))
        return self.stream_sequence(self.new_sequence(self.prepare(prompt, as_list(images), raw), params))

    def chat(self, system: str | None = None) -> Chat:
        """A conversation that keeps its slot of the cache, so that each turn only computes what is new."""
        return Chat(self, system)

    def run(self, sequences: SequenceOf[Sequence]) -> list[Output]:
        """Run sequences to their ends; on any error none of them keeps a slot."""
        try:
            for sequence in sequences:
                self.start(sequence)
            while not all(sequence.finish_reason for sequence in sequences):
                self.advance()
            return [self.output(sequence) for sequence in sequences]
        finally:
            for sequence in sequences:
                self.end(sequence)

    def stream_sequence(self, sequence: Sequence) -> Generator[str, None, None]:
        """Run one sequence, giving out text; a caller that stops listening cancels it.

        Between two pieces other requests may be made of the model: what they let this sequence gain is given out later.
        """
        text, given = self.start(sequence), 0
        try:
            while given < len(text.pieces) or not sequence.finish_reason:
                if given == len(text.pieces):
                    self.advance()
                else:
                    given += 1
                    yield text.pieces[given - 1]
            if last := text.finish():
                yield last
        finally:
            self.end(sequence)

    def new_sequence(self, prompt: Prompt, params: SamplingParams, return_logits: bool = False, index: int = 0) -> Sequence:
        """Answer `index` of n to a prompt, checked and not queued; raises ContextError or ConstraintError."""
        guides: list[Guide] = [BadWords(params.bad_words, self._token_bytes)] if params.bad_words else []
        if params.constrained:
            guides.append(self._constraints.make(params))
        return self.engine.new_sequence(prompt, params, return_logits=return_logits, index=index, guides=tuple(guides))

    @functools.cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    @functools.cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._token_bytes, self.facts.eos_token_ids)

    def stops(self, sequence: Sequence) -> tuple[str, ...]:
        return (*sequence.params.stop, *(() if sequence.params.ignore_eos else self.facts.stop_strings))

    def prepare_messages(self, messages: list[Message], images: list[ImageSource]) -> Prompt:
        """A chat's prompt, up to the place where the assistant answers."""
        return self.family.chat_prompt(messages, images, self.facts, self.tokenizer, self.template)

    def prepare(self, text: str, images: list[ImageSource], raw: bool) -> Prompt:
        """The prompt of one user turn, or of a text as it is."""
        check_text(text)
        if raw:
            return self.family.raw_prompt(text, images, self.facts, self.tokenizer)
        return self.prepare_messages([Message("user", text, len(images))], images)

    def start(self, sequence: Sequence) -> AnswerText:
        """Queue a sequence; its text grows with every step, whoever takes it."""
        if self.closed:
            raise RuntimeError("the model was closed; load the artifact again")
        stops = self.stops(sequence)
        text = self.texts[sequence.id] = AnswerText(self.tokenizer, stops, from_token=sequence.params.min_new_tokens)
        self.engine.add(sequence)
        return text

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence that was started; one that has not finished is cancelled."""
        self.engine.cancel(sequence)
        try:
            if self.request_log and sequence.id in self.texts:
                sizes = tuple((frame.image_width, frame.image_height) for frame in sequence.prompt.frames)
                arrived = time.time() - (self.engine.clock() - sequence.arrived)
                self.request_log.write(record_of(self.output(sequence), arrived, sizes, sequence.reused))
        finally:
            self.texts.pop(sequence.id, None)

    def advance(self) -> SequenceOf[Sequence]:
        """One engine step, and the new text of each sequence that gained a token; the sequences that have changed.

        Does nothing but end them where all that is left has passed its deadline.
        """
        expired = self.engine.expire()
        if self.engine.scheduler.idle:
            return expired
        return (*expired, *self.engine.step().sequences)

    def _gained(self, sequence: Sequence) -> None:
        """The text of a sequence's latest token; it may be the last one."""
        text = self.texts.get(sequence.id)
        if text is None:  # the engine was given it by somebody else
            return
        text.add_unread(sequence.generated[-1])
        if text.stopped:
            self.engine.stop(sequence)

    def output(self, sequence: Sequence) -> Output:
        """The answer of a sequence that has finished and is not forgotten."""
        text = self.texts[sequence.id]
        text.finish()
        if text.stopped:  # perhaps only by what was held back
            self.engine.stop(sequence)
        return Output(
            text=text.text,
            token_ids=list(sequence.generated),
            finish_reason=sequence.finish_reason or "cancelled",
            boxes=list(self.family.parse_boxes(text.text, sequence.prompt.frames)),
            prompt_tokens=sequence.prompt.length,
            image_tokens=sequence.prompt.image_tokens,
            timings=sequence.timings(),
            logits=np.stack(sequence.logits) if sequence.logits else None,
            logprobs=sequence.logprobs if sequence.params.logprobs is not None else None,
            reused_tokens=sequence.reused,
        )


def merge_params(sampling: SamplingParams | None, settings: dict[str, Any]) -> SamplingParams:
    """`sampling` with the settings given by name; an unknown one is an error."""
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise TypeError(f"unknown settings {', '.join(unknown)}; expected {', '.join(sorted(SETTINGS))}")
    return dataclasses.replace(sampling or SamplingParams(), **settings)


def one_answer(params: SamplingParams) -> SamplingParams:
    """The params of an answer that is streamed or kept in a conversation; raises ValueError where several are asked for."""
    if params.n > 1:
        raise ValueError(f"n is {params.n}; a stream or a chat's turn has one answer, so use generate for several")
    return params


def grouped(outputs: list[Output], n: int) -> list[Output]:
    """The answers to each prompt as one: the first, which has the others."""
    groups = (outputs[start : start + n] for start in range(0, len(outputs), n))
    return [dataclasses.replace(first, others=tuple(others)) for first, *others in groups]


def check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise PromptError(f"a prompt is {type(text).__name__}; expected text")


def as_list(images: Any) -> list[ImageSource]:
    """One picture, several or none -> a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def pair_up(prompts: SequenceOf[str], images: Any) -> list[tuple[str, Any]]:
    """Each prompt with its pictures."""
    if not isinstance(prompts, list | tuple):
        raise PromptError(f"prompts is {type(prompts).__name__}; expected a text or a list of texts")
    if images is None:
        return [(prompt, None) for prompt in prompts]
    if not isinstance(images, list | tuple) or len(images) != len(prompts):
        count = len(images) if isinstance(images, list | tuple) else "one entry that is no list"
        raise PromptError(
            f"{len(prompts)} prompts were given but images has {count}; give a list with one entry for each prompt: a picture, "
            "a list of them, or None"
        )
    return list(zip(prompts, images, strict=True))

"""A thousand requests over the fake backend: whatever runs together, joins, leaves or is reused, every answer is the one that
the request gets alone, and after every step the cache holds what its ledger says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.chat import Chat
from staticvl.runtime.engine import blocks, give_back
from staticvl.runtime.engine.request import Sequence
from staticvl.runtime.engine.scheduler import Step
from staticvl.runtime.processor.prompt import Message, Prompt

from .conftest import EMBEDDED
from .fake_backend import IMAGE_NUMBERS, FakeBackend
from .fakes import Guess, check_blocks, check_slots, fake_model, noise, oracle

CONTEXT = 512
BUDGET = CONTEXT // 4  # blocks of 4 tokens: one of the largest requests, or a few others
TEXTS = ("Hello!", "What is in the picture?", "日本 🙂", "a b c d e f g h i j k l m n", "Where is the circle? " * 3, "...")
IMAGES = [noise(seed, (20, 20)) for seed in range(3)]


class Watched:
    """A model over the fake backend whose every step is checked against what must always hold."""

    def __init__(self, model: runtime.Model, rng: np.random.Generator | None = None) -> None:
        """With `rng`, sequences are preempted at random too, in about one of thirty steps."""
        self.model, self.engine, self.rng = model, model.engine, rng
        self.sums: dict[bytes, int] = {}  # digest of a tile -> the sum of its pixels
        self.chats: list[Chat] = []
        self.steps = 0
        self.drafts = 0  # verified since then
        self.spent: list[float] = []  # costs of the runs since a token was gained by those who wait for one
        self.step, self.engine.step = self.engine.step, self.checked_step
        self.make, self.engine.new_sequence = self.engine.new_sequence, self.noted_sequence

    def noted_sequence(self, prompt: Prompt, *args: Any, **kwargs: Any) -> Sequence:
        sequence = self.make(prompt, *args, **kwargs)
        for digest, tile in zip(sequence.cache_keys.images, prompt.pixels, strict=True):
            self.sums[digest] = int(tile.sum())
        return sequence

    def checked_step(self) -> Step:
        if self.rng and self.rng.random() < 0.03 and (running := self.engine.scheduler.running):
            self.engine.scheduler.preempt(running[self.rng.integers(len(running))])
        answering = [s for s in self.engine.scheduler.running if not s.encoding and not s.prefilling]
        step = self.step()
        self.check_stall(step, sum(s.slot is not None or s.finish_reason is not None for s in answering))
        check_slots(self.engine)
        check_blocks(self.engine)
        self.check_lengths()
        self.steps += 1
        turn = self.steps % self.engine.cache.spec.slots
        for slot in {turn, *(sequence.slot for sequence in step.sequences)} - {None}:
            self.check_ledger(slot)
        return step

    def check_stall(self, step: Step, answering: int) -> None:
        """Between two tokens of a stream runs one run, or several that cost no more than the largest chunk; and, where others
        answer as well, a draft of each."""
        if step.kind == "decode" or not answering or (step.kind == "verify" and answering == 1):
            self.spent = []
            self.drafts = 0
            return
        if step.kind == "verify":
            self.drafts += 1
            assert self.drafts <= self.engine.cache.spec.slots
            return
        self.spent.append(self.engine.graphs[step.graph_key].cost_ms)
        scheduler = self.engine.scheduler
        planners = (scheduler.bounded or scheduler.prefill).values()
        largest = max(cost for planner in planners for cost in planner.costs.values())
        assert len(self.spent) == 1 or sum(self.spent) <= largest

    def check_lengths(self) -> None:
        for sequence in self.engine.scheduler.running:
            answered = 0 if sequence.prefilling else max(len(sequence.generated) - 1, 0)
            ran = sequence.computed + answered
            assert self.engine.cache.lengths[sequence.slot] == ran or not sequence.prepared
        assert self.engine.cache.lengths.max() < CONTEXT

    def check_ledger(self, slot: int) -> None:
        """What the backend keeps is what the ledger says that it is of."""
        backend, length = self.engine.backend, self.engine.cache.lengths[slot]
        keys = self.engine.cache.keys[slot, :length]
        values = keys[:, 0].copy()
        shown = np.flatnonzero(values < 0)
        sums = np.array([self.sums[keys[row, 2:].tobytes()] for row in shown], np.int64)
        values[shown] = (sums - 1 - values[shown]) % IMAGE_NUMBERS
        assert isinstance(backend, FakeBackend)
        assert np.array_equal(backend.kept[slot, :length], (values + 1) * (np.arange(length) + 1))


@dataclass
class BenchRequest:
    """One request or turn, and what must come of it."""

    wanted: runtime.Output
    sequence: Sequence | None = None  # of a request
    stream: Iterator[str] | None = None  # of a turn
    chat: Chat | None = None
    said: tuple[Message, list[Image.Image]] | None = None
    pieces: list[str] = field(default_factory=list)
    drop_after: int | None = None  # steps


class Traffic:
    """Random requests and turns, any number of them at once."""

    def __init__(self, watched: Watched, alone: runtime.Model, rng: np.random.Generator, *, most: int = 13) -> None:
        """`most`: tokens of an answer."""
        self.watched, self.model, self.alone, self.rng = watched, watched.model, alone, rng
        self.most = most
        self.open: list[BenchRequest] = []
        self.ended = dict.fromkeys(("whole", "dropped", "turns", "forks"), 0)

    def run(self, count: int) -> None:
        begun = 0
        while begun < count or self.open:
            if begun < count and self.rng.random() < 0.4:
                begun += 1
                self.open.append(self.turn() if self.rng.random() < 0.3 else self.request())
            self.advance()
        for chat in self.watched.chats:
            chat.close()
        assert self.model.engine.cache.free == self.model.engine.cache.spec.slots
        assert self.model.engine.scheduler.idle

    def guess(self, sequence: Sequence, answer: list[int]) -> None:
        """Let drafts come from an answer that is known, beyond the end where it is longer."""
        if sequence.prompt_lookup and self.rng.random() < 0.7:
            sequence.prompt_lookup = Guess(answer, self.rng)  # type: ignore[assignment]

    def settings(self) -> dict[str, Any]:
        rng = self.rng
        chosen: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, self.most + 1)), "ignore_eos": bool(rng.random() < 0.5)}
        chosen |= (
            {"temperature": 0.0} if rng.random() < 0.5 else {"temperature": 0.3, "seed": int(rng.integers(9)), "top_k": 50}
        )
        if rng.random() < 0.3:
            chosen["stop_token_ids"] = tuple(int(token) for token in rng.integers(3, 500, 40))
        if rng.random() < 0.2:
            chosen |= {"frequency_penalty": 0.7, "repetition_penalty": 1.4, "min_new_tokens": 1, "bad_words": ("e", "a")}
        return chosen

    def words(self) -> tuple[str, list[Image.Image]]:
        images = [IMAGES[i] for i in self.rng.integers(0, len(IMAGES), self.rng.choice([0, 0, 1, 2]))]
        return str(self.rng.choice(TEXTS)), images

    def request(self) -> BenchRequest:
        text, images = self.words()
        chosen = self.settings()
        params = runtime.SamplingParams(**chosen)
        message = Message("user", text, len(images))
        prompt = self.model.processor.prompt([message], images)
        wanted = longest = self.expected([message], images, params)
        if len(wanted.text) > 4 and self.rng.random() < 0.4:
            at = int(self.rng.integers(0, len(wanted.text) - 2))
            params = runtime.SamplingParams(**chosen, stop=(wanted.text[at : at + 3],))
            wanted = self.expected([message], images, params)
        entry = BenchRequest(wanted, sequence=self.model.new_sequence(prompt, params))
        self.guess(entry.sequence, longest.token_ids)  # type: ignore[arg-type]
        entry.drop_after = int(self.rng.integers(0, 30)) if self.rng.random() < 0.2 else None
        self.model.start(entry.sequence)  # type: ignore[arg-type]
        return entry

    def expected(self, messages: list[Message], images: list[Image.Image], params: runtime.SamplingParams) -> runtime.Output:
        """Of the same request alone, with one slot, nothing reused; where nothing but tokens matters, also by plain sums."""
        prompt = self.alone.processor.prompt(messages, images)
        out = self.alone.run([self.alone.new_sequence(prompt, params)])[0]
        if not (params.stop or params.stop_token_ids or params.bad_words):
            assert out.token_ids == oracle(prompt, params, self.alone.info)
        return out

    def turn(self) -> BenchRequest:
        """Of a chat: a new one, one that goes on, a fork, or one that takes its last turn back and asks something else."""
        idle = [chat for chat in self.watched.chats if not any(entry.chat is chat for entry in self.open)]
        # More chats than slots: whoever has been idle the longest gives up its slot.
        way, room = self.rng.random(), self.model.engine.cache.spec.slots + 2 - len(self.watched.chats)
        if not idle and not room:
            return self.request()
        if not idle or (room and way < 0.4):
            chat = self.model.chat()
            self.watched.chats.append(chat)
        else:
            chat = idle[self.rng.integers(len(idle))]
            if way < 0.3:
                chat.close()  # its place may go to its fork
                chat, left = chat.fork(), chat
                self.watched.chats[self.watched.chats.index(left)] = chat
                self.ended["forks"] += 1
            elif way < 0.5 and chat.messages:
                chat.rewind()
            if way > 0.9 or len(chat.messages) > 3 or len(chat.images) > 1:
                chat.messages.clear()
                chat.images.clear()
        text, images = self.words()
        message, settings_ = Message("user", text, len(images)), self.settings()
        wanted = self.expected([*chat.messages, message], [*chat.images, *images], runtime.SamplingParams(**settings_))
        stream = chat.stream(text, images, **settings_)
        dropped = int(self.rng.integers(1, 6)) if self.rng.random() < 0.15 else None
        return BenchRequest(wanted, stream=stream, chat=chat, said=(message, images), drop_after=dropped)

    def advance(self) -> None:
        if not self.open:
            return
        entry = self.open[self.rng.integers(len(self.open))]
        if entry.drop_after is not None:
            entry.drop_after -= 1
        if entry.sequence is not None:
            self.advance_request(entry, entry.sequence)
        else:
            self.advance_turn(entry)

    def advance_request(self, entry: BenchRequest, sequence: Sequence) -> None:
        if entry.drop_after is not None and entry.drop_after < 0 and not sequence.finish_reason:
            self.model.end(sequence)
            assert sequence.generated == entry.wanted.token_ids[: len(sequence.generated)]
            self.ended["dropped"] += 1
            self.open.remove(entry)
        elif sequence.finish_reason:
            out = self.model.output(sequence)
            self.model.end(sequence)
            wanted = entry.wanted
            assert (out.token_ids, out.text, out.finish_reason) == (wanted.token_ids, wanted.text, wanted.finish_reason)
            self.ended["whole"] += 1
            self.open.remove(entry)
        else:
            self.model.advance()

    def advance_turn(self, entry: BenchRequest) -> None:
        assert entry.stream is not None and entry.chat is not None and entry.said is not None
        if entry.drop_after is not None and entry.drop_after < 0:
            entry.stream.close()  # type: ignore[attr-defined]
            assert entry.wanted.text.startswith("".join(entry.pieces))
            self.open.remove(entry)
            return
        piece = next(entry.stream, None)
        if piece is not None:
            entry.pieces.append(piece)
            return
        assert "".join(entry.pieces) == entry.wanted.text
        assert entry.chat.messages[-2:] == [entry.said[0], Message("assistant", entry.wanted.text)]
        self.ended["turns"] += 1
        self.open.remove(entry)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    return one_at_a_time(tmp_path_factory)


def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    """One slot, one request at a time, nothing reused."""
    buckets = Buckets(prefill=(8, 32), decode=(1,), vision=(1,), context=CONTEXT, slots=1)
    return fake_model(EMBEDDED, tmp_path_factory.mktemp("alone"), buckets)


given_settings = given(
    seed=st.integers(0, 2**32),
    slots=st.sampled_from((3, 4, 7)),
    budget=st.sampled_from((None, 8, 32)),
    reuse=st.sampled_from((True, True, True, False)),
    speculate=st.sampled_from((0, 2, 5)),
)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given_settings
def test_hundreds_of_requests(alone: runtime.Model, tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    check_a_hundred(alone, tmp_path_factory, **drawn)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given_settings
def test_a_thousand_requests(alone: runtime.Model, tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    check_a_hundred(alone, tmp_path_factory, **drawn)


def check_a_hundred(
    alone: runtime.Model,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    slots: int,
    budget: int | None,
    reuse: bool,
    speculate: int,
) -> None:
    buckets = Buckets(prefill=(4, 16, 64), decode=(1, 2, slots), vision=(1, 2), verify=(3, 6), context=CONTEXT, slots=slots)
    folder = tmp_path_factory.mktemp("many")
    model = fake_model(EMBEDDED, folder, buckets, reuse=reuse, prefill_budget=budget, speculate=speculate)
    traffic = Traffic(Watched(model), alone, np.random.default_rng(seed))
    traffic.run(100)
    assert traffic.ended["whole"] > 30 and traffic.ended["turns"] > 3
    assert (model.engine.metrics.copies > 0) <= reuse
    assert (model.engine.metrics.accepted > 50) == (speculate > 0)


given_settings_of_few_blocks = given(
    seed=st.integers(0, 2**32),
    slots=st.sampled_from((5, 7)),
    reuse=st.booleans(),
    speculate=st.sampled_from((0, 5)),
    prefill_budget=st.sampled_from((None, 8)),
)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given_settings_of_few_blocks
def test_hundreds_of_requests_in_few_blocks(tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    check_a_hundred_in_few_blocks(tmp_path_factory, **drawn)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given_settings_of_few_blocks
def test_a_thousand_requests_in_few_blocks(tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    check_a_hundred_in_few_blocks(tmp_path_factory, **drawn)


def check_a_hundred_in_few_blocks(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    slots: int,
    reuse: bool,
    speculate: int,
    prefill_budget: int | None,
) -> None:
    """Blocks of 4 tokens, so few of them that answers are preempted; rows whose blocks are gone read as something else."""
    buckets = Buckets(prefill=(4, 16, 64), decode=(1, 2, slots), vision=(1, 2), verify=(3, 6), context=CONTEXT, slots=slots)
    folder = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 4)
        patch.setattr(give_back, "WORTH_BYTES", 0)
        patch.setattr(give_back, "STEP_BYTES", 0)  # one block a step, while requests run
        model = fake_model(
            EMBEDDED, folder, buckets, reuse=reuse, speculate=speculate, prefill_budget=prefill_budget, blocks=BUDGET
        )
        traffic = Traffic(
            Watched(model, np.random.default_rng(seed)), one_at_a_time(tmp_path_factory), np.random.default_rng(seed), most=60
        )
        traffic.run(100)
        assert traffic.ended["whole"] > 30 and traffic.ended["turns"] > 3
        assert model.engine.metrics.preemptions > 10
        assert (model.engine.metrics.evicted_blocks > 0) >= reuse
        assert model.engine.cache.blocks.used == 0

"""Conversations: every turn is answered as a fresh prompt with the same words would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from PIL import Image

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.chat import Chat
from staticvl.runtime.engine.fit import ContextError
from staticvl.runtime.processor.images import ImageError
from staticvl.runtime.processor.prompt import Message, Prompt, PromptError

from .checkpoints_mllama import tiny_mllama
from .checkpoints_tokenizers import text_of
from .conftest import EMBEDDED, REPO
from .fakes import check_slots, fake_model, lent, noise, oracle
from .tiny_families import GOLDEN_QWEN

TOLERANCE = 1e-4  # of the largest magnitude
BUCKETS = Buckets(prefill=(8, 32), decode=(1, 2, 4), context=512, slots=4)
PROOF = {"max_new_tokens": 12, "ignore_eos": True, "return_logits": True}


@pytest.fixture
def model(embedded_artifact: Path) -> Iterator[runtime.Model]:
    yield from lent(embedded_artifact)


@dataclass
class Transcript:
    """What was said, in the words of the checkpoint's template, written out by hand."""

    text: str = ""
    images: list[Image.Image] = field(default_factory=list)

    def ask(self, text: str, *images: Image.Image) -> None:
        self.text += "USER: " + "<image>\n" * len(images) + text + " ASSISTANT:"
        self.images += images

    def answer(self, text: str) -> None:
        self.text += f" {text} "


def check_turn(chat: Chat, said: Transcript, text: str, *images: Image.Image) -> runtime.Output:
    """One turn, equal in tokens and logits to a fresh prompt of the whole transcript."""
    said.ask(text, *images)
    fresh = chat.model.generate(said.text, said.images, raw=True, **PROOF)
    out = chat.send(text, list(images), **PROOF)
    assert out.token_ids == fresh.token_ids
    assert out.text == fresh.text
    assert out.prompt_tokens == fresh.prompt_tokens
    assert np.abs(out.logits - fresh.logits).max() <= TOLERANCE * np.abs(fresh.logits).max()
    said.answer(out.text)
    return out


# --- As a fresh prompt -------------------------------------------------------------------------------------------------


def test_every_turn_equals_a_fresh_prompt(model: runtime.Model) -> None:
    """Text, an image in a later turn, two more, then text again."""
    with model.chat() as chat:
        said = Transcript()
        check_turn(chat, said, "Hello!")
        check_turn(chat, said, "What is in the picture?", noise(1))
        check_turn(chat, said, "And in these?", noise(2), noise(3, (31, 200)))
        out = check_turn(chat, said, "Where is the circle?")
        assert out.image_tokens == 3 * 64


def test_several_chats_in_turns(model: runtime.Model) -> None:
    """With requests of other kinds between their turns."""
    with model.chat() as first, model.chat() as second, model.chat() as third:
        chats = [(first, Transcript()), (second, Transcript()), (third, Transcript())]
        for turn, text in enumerate(("What is in the picture?", "Where is the circle?", "How many shapes are there?")):
            for place, (chat, said) in enumerate(chats):
                check_turn(chat, said, text, *([noise(place)] if place == turn else []))
            model.generate(["Hello", "What is in the picture?"], [None, noise(9)], max_new_tokens=5)


def test_a_system_prompt_comes_first(model: runtime.Model) -> None:
    with model.chat("Be brief. ") as chat:
        check_turn(chat, Transcript("Be brief.  "), "Hello!")


def test_marks_in_the_text_say_where_images_stand(model: runtime.Model) -> None:
    with model.chat() as chat:
        chat.send("Hello!", **PROOF)
        before = chat.messages[1].text
        out = chat.send("Compare <image> and <image>.", [noise(1), noise(2)], **PROOF)
        text = f"USER: Hello! ASSISTANT: {before} USER: Compare <image> and <image>. ASSISTANT:"
        assert out.token_ids == model.generate(text, [noise(1), noise(2)], raw=True, **PROOF).token_ids


def test_a_stopped_answer_is_kept_as_it_was_shown(model: runtime.Model) -> None:
    """The slot holds tokens after the stop string that the conversation does not; what is before them is not run again."""
    with model.chat() as chat:
        whole = model.generate("Hello!", noise(1), max_new_tokens=12, ignore_eos=True).text
        stop = whole[len(whole) // 2 :][:2]
        said = Transcript()
        said.ask("Hello!", noise(1))
        out = chat.send("Hello!", noise(1), max_new_tokens=12, ignore_eos=True, stop=stop)
        assert out.finish_reason == "stop"
        assert out.text == whole[: whole.index(stop)].rstrip()
        said.answer(out.text)
        before = counts(model)
        chat.send("What is in the picture?", max_new_tokens=1)
        assert counts(model)[0] - before[0] < 24
        chat.messages[2:] = []
        check_turn(chat, said, "Where is the circle?")


def test_going_back_in_a_conversation(model: runtime.Model) -> None:
    """A turn that the slot holds already, and one that was forgotten in between."""
    with model.chat() as chat:
        first = check_turn(chat, Transcript(), "Hello!")
        chat.messages.clear()
        again = chat.send("Hello!", **PROOF)
        assert again.token_ids == first.token_ids
        chat.messages.clear()
        next(chat.stream("Where is the circle? " * 3, max_new_tokens=9, ignore_eos=True))
        check_turn(chat, Transcript(), "Hello!")


# --- What is computed --------------------------------------------------------------------------------------------------


def counts(model: runtime.Model) -> tuple[int, int]:
    """Tokens prefilled and tiles encoded so far."""
    return model.engine.metrics.real["prefill"], model.engine.metrics.real["vision"]


def test_only_new_tokens_are_prefilled(model: runtime.Model) -> None:
    with model.chat() as chat:
        first = chat.send("What is in the picture?", noise(1))
        held = first.prompt_tokens + len(first.token_ids) - 1
        assert first.finish_reason == "stop"
        before = counts(model)
        second = chat.send("Where is the circle?")
        after = counts(model)
        assert after[0] - before[0] == second.prompt_tokens - held < 20
        assert after[1] == before[1]
        assert second.prompt_tokens > 64


def test_only_new_images_are_encoded(model: runtime.Model) -> None:
    with model.chat() as chat:
        chat.send("What is in the picture?", noise(1))
        before = counts(model)
        chat.send("And in these?", [noise(2), noise(3)])
        assert counts(model)[1] - before[1] == 2


def test_a_chat_goes_on_after_it_was_closed(model: runtime.Model) -> None:
    """Images are not encoded again, everything is prefilled again."""
    said = Transcript()
    chat = model.chat()
    check_turn(chat, said, "What is in the picture?", noise(1))
    chat.close()
    chat.close()
    assert model.engine.cache.free == model.engine.cache.spec.slots
    model.generate(["What is in the picture?"] * 4, [noise(5)] * 4, max_new_tokens=3)
    before = counts(model)
    out = chat.send("Where is the circle?", max_new_tokens=1)
    after = counts(model)
    assert after[0] - before[0] == out.prompt_tokens
    assert after[1] == before[1]
    said.ask("Where is the circle?")
    said.answer(out.text)
    check_turn(chat, said, "How many shapes are there?")
    chat.close()


def test_a_forgotten_chat_frees_its_slot(model: runtime.Model) -> None:
    chat = model.chat()
    chat.send("Hello!")
    assert model.engine.cache.free == model.engine.cache.spec.slots - 1
    del chat
    assert model.engine.cache.free == model.engine.cache.spec.slots


# --- Slots -------------------------------------------------------------------------------------------------------------


def test_more_chats_than_slots(model: runtime.Model) -> None:
    """The chat that has been idle the longest gives up its slot to a request or to another chat, and loses nothing else."""
    chats, said = [model.chat() for _ in range(6)], [Transcript() for _ in range(6)]
    for place in (0, 1, 2, 3, 4, 5):
        said[place].ask("Hello!", noise(place))
        said[place].answer(chats[place].send("Hello!", noise(place), max_new_tokens=2).text)
    assert [chat.slot is not None for chat in chats] == [False] * 2 + [True] * 4
    before = counts(model)
    said[2].ask("And now?")
    said[2].answer(chats[2].send("And now?", max_new_tokens=2).text)
    assert counts(model)[0] - before[0] < 24, "it was in its slot"
    model.generate("Where is the circle?", max_new_tokens=2)
    assert [chat.slot is not None for chat in chats] == [False, False, True, False, True, True]
    chats[4].close()
    chats[5].close()
    for place in (0, 1, 2, 3):
        before = counts(model)
        check_turn(chats[place], said[place], "Where is the circle?")
        assert counts(model)[1] == before[1] + 1, "one image for the fresh prompt, none for the turn"
        assert chats[place].slot is not None
    for chat in chats:
        chat.close()


def test_a_chat_that_answers_keeps_its_slot(model: runtime.Model) -> None:
    """However long nobody reads on; a request waits for a slot only while all of them answer."""
    chats = [model.chat() for _ in range(4)]
    streams = [chat.stream("Hello!", max_new_tokens=20, ignore_eos=True) for chat in chats]
    first = [next(stream) for stream in streams]
    assert all(chat.turn and chat.turn.slot is not None for chat in chats)
    alone = model.generate("Where is the circle?", max_new_tokens=4)
    assert [first[i] + "".join(stream) for i, stream in enumerate(streams)] == [chats[0].messages[-1].text] * 4
    for chat in chats:
        chat.close()
    assert alone.token_ids == model.generate("Where is the circle?", max_new_tokens=4).token_ids


def test_a_chat_that_waits_for_a_slot(model: runtime.Model) -> None:
    """Until one of four streams ends; it keeps that slot."""
    streams = [model.stream("Hello!", max_new_tokens=count, ignore_eos=True) for count in (20, 9, 20, 20)]
    first = [next(stream) for stream in streams]
    fourth = model.chat()
    out = fourth.send("Where is the circle?", max_new_tokens=4)
    assert fourth.slot == 1
    before = counts(model)
    again = fourth.send("Hello!", max_new_tokens=4)
    assert again.prompt_tokens > counts(model)[0] - before[0]
    whole = first[0] + "".join(streams[0])
    for stream in streams:
        stream.close()
    fourth.close()
    assert whole == model.generate("Hello!", max_new_tokens=20, ignore_eos=True).text
    assert out.text == model.generate("Where is the circle?", max_new_tokens=4).text
    raw = f"USER: Where is the circle? ASSISTANT: {out.text} USER: Hello! ASSISTANT:"
    assert again.text == model.generate(raw, raw=True, max_new_tokens=4).text


# --- Streams -----------------------------------------------------------------------------------------------------------


def test_streamed_turns_equal_sent_ones(model: runtime.Model) -> None:
    with model.chat() as streamed, model.chat() as sent:
        for text, image in (("Hello!", None), ("What is in the picture?", noise(1)), ("Where is the circle?", None)):
            assert "".join(streamed.stream(text, image)) == sent.send(text, image).text
        assert streamed.messages == sent.messages


def test_a_turn_whose_pieces_are_not_all_taken_is_forgotten(model: runtime.Model) -> None:
    with model.chat() as chat:
        said = Transcript()
        check_turn(chat, said, "Hello!")
        for _ in chat.stream("What is in the picture?", noise(1), max_new_tokens=20, ignore_eos=True):
            break
        assert len(chat.messages) == 2
        assert chat.images == []
        assert model.engine.scheduler.idle
        check_turn(chat, said, "Where is the circle?")


def test_a_new_turn_ends_one_that_is_still_streamed(model: runtime.Model) -> None:
    """Two sequences must never write into one slot."""
    with model.chat() as chat:
        said = Transcript()
        check_turn(chat, said, "Hello!")
        stream = chat.stream("What is in the picture?", noise(1), max_new_tokens=20, ignore_eos=True)
        next(stream)
        check_turn(chat, said, "Where is the circle?")
        list(stream)
        assert len(chat.messages) == 4
        check_turn(chat, said, "How many shapes are there?")


def test_closing_a_chat_that_is_still_streamed(model: runtime.Model) -> None:
    """Whoever gets the slot next has it alone."""
    chat = model.chat()
    stream = chat.stream("What is in the picture?", noise(1), max_new_tokens=20, ignore_eos=True)
    next(stream)
    chat.close()
    assert model.engine.cache.free == model.engine.cache.spec.slots
    alone = model.generate("Where is the circle?", **PROOF)
    list(stream)
    assert chat.messages == []
    assert np.array_equal(model.generate("Where is the circle?", **PROOF).logits, alone.logits)
    check_turn(chat, Transcript(), "Hello!")
    chat.close()


# --- Errors ------------------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_chat_as_it_was(model: runtime.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.chat() as chat:
        said = Transcript()
        check_turn(chat, said, "Hello!")
        with pytest.raises(ContextError, match="64 image tokens, and max_new_tokens is 490"):
            chat.send("What is in the picture?", noise(1), max_new_tokens=490)
        with pytest.raises(PromptError, match="2 <image> marks but 1 image was given"):
            chat.send("<image> or <image>?", noise(1))
        with pytest.raises(ImageError, match="does not exist"):
            chat.send("What?", tmp_path / "none.png")
        with pytest.raises(TypeError, match="unknown settings beams"):
            chat.send("What?", beams=2)
        with pytest.raises(PromptError, match="a prompt is int; expected text"):
            chat.send(5)  # type: ignore[arg-type]
        check_turn(chat, said, "What is in the picture?", noise(1))
        with monkeypatch.context() as patch:
            fail_after(model, 2, patch)
            with pytest.raises(OSError, match="the device is gone"):
                chat.send("Where is the circle? " * 5, noise(2), max_new_tokens=30)
        assert len(chat.messages) == 4
        check_turn(chat, said, "And here?", noise(3))


def fail_after(model: runtime.Model, runs: int, patch: pytest.MonkeyPatch) -> None:
    """Let the backend fail after some runs."""
    run, left = model.engine.backend.run, iter(range(runs))

    def failing(*args: Any) -> np.ndarray:
        if next(left, None) is None:
            raise OSError("the device is gone")
        return run(*args)

    patch.setattr(model.engine.backend, "run", failing)


# --- Other families, over the fake backend -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every family; their weights are not read."""
    return {
        "llava": EMBEDDED,
        "llava_next": REPO / "tools" / "assets" / "tiny_llava16",
        "mllama": tiny_mllama(tmp_path_factory.mktemp("chat") / "mllama").folder,
        "qwen_vl": GOLDEN_QWEN,
    }


@pytest.fixture
def make(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., runtime.Model]:
    def make_model(family: str, **changes: Any) -> runtime.Model:
        images = {"images": (1, 3)} if family == "mllama" else {}
        buckets = replace(BUCKETS, **images)
        return fake_model(checkpoints[family], tmp_path / family, buckets, **changes)

    return make_model


def check_fake_turn(chat: Chat, text: str, *images: Image.Image) -> tuple[int, int]:
    """One turn, equal to the plain sum over the whole conversation; the tokens prefilled and the tiles encoded for it."""
    message = Message("user", text, len(images))
    whole = chat.model.processor.prompt([*chat.messages, message], [*chat.images, *images])
    before = counts(chat.model)
    out = chat.send(text, list(images), max_new_tokens=5, temperature=0.0, ignore_eos=True)
    params = runtime.SamplingParams(max_new_tokens=5, temperature=0.0, ignore_eos=True)
    assert out.token_ids == oracle(whole, params, chat.model.info)
    prefilled, encoded = (now - then for now, then in zip(counts(chat.model), before, strict=True))
    assert out.prompt_tokens >= prefilled
    return prefilled, encoded


@pytest.mark.parametrize("mode", ["transformers", "meta"])
def test_keys_of_earlier_images_are_kept_with_the_slot(make: Callable[..., runtime.Model], mode: str) -> None:
    """Text before an image sees it in one mode: then all text is run again when one comes."""
    model = make("mllama", text_before_image=mode)
    with model.chat() as chat:
        assert check_fake_turn(chat, "Hello!", noise(1))[1] == 4
        assert check_fake_turn(chat, "And now?")[1] == 0
        length = chat.model.processor.prompt([*chat.messages, Message("user", "These?", 2)], [noise(1)] * 3).length
        prefilled, encoded = check_fake_turn(chat, "These?", noise(2), noise(3, (9, 200)))
        assert encoded == 8
        assert (prefilled == length) == (mode == "transformers")
        assert check_fake_turn(chat, "Which is larger?")[1] == 0


def test_keys_of_images_go_with_the_slot(make: Callable[..., runtime.Model]) -> None:
    """Others had it in between, with images of their own."""
    model = make("mllama")
    chat = model.chat()
    check_fake_turn(chat, "Hello!", noise(1), noise(2))
    chat.close()
    model.generate(["x"] * 4, [[noise(3), noise(4), noise(5)]] * 4, max_new_tokens=2)
    assert check_fake_turn(chat, "And now?")[1] == 8
    assert check_fake_turn(chat, "Another?", noise(6))[1] == 4
    chat.close()


def test_keys_of_images_are_lost_with_the_slot(make: Callable[..., runtime.Model]) -> None:
    """To four other chats, of which one loses its own in turn."""
    model = make("mllama")
    chat = model.chat()
    assert check_fake_turn(chat, "Hello!", noise(1))[1] == 4
    others = [model.chat() for _ in range(4)]
    for other in others:
        check_fake_turn(other, "Hello!")
    assert chat.slot is None
    assert check_fake_turn(chat, "And now?", noise(2))[1] == 8
    assert others[0].slot is None
    assert check_fake_turn(chat, "And then?")[1] == 0


def test_a_forgotten_turn_leaves_the_keys_of_earlier_images(make: Callable[..., runtime.Model]) -> None:
    model = make("mllama")
    with model.chat() as chat:
        check_fake_turn(chat, "Hello!", noise(1))
        next(chat.stream("And this?", noise(2), max_new_tokens=9, ignore_eos=True))
        assert check_fake_turn(chat, "Which?", noise(3))[1] == 4


def test_too_many_images_for_a_conversation(make: Callable[..., runtime.Model]) -> None:
    """The turn is refused as a whole and the conversation goes on."""
    model = make("mllama")
    with model.chat() as chat:
        check_fake_turn(chat, "Hello!", noise(1), noise(2))
        with pytest.raises(ContextError, match=r"4 images, but the artifact holds 3 .* --images 4"):
            chat.send("And these?", [noise(3), noise(4)])
        assert check_fake_turn(chat, "And this?", noise(5))[1] == 4


def test_a_longer_rope_leaves_nothing_to_keep(make: Callable[..., runtime.Model]) -> None:
    """Qwen's keys are turned by a base that the length of the prompt chose; within one length the beginning is kept."""
    model = make("qwen_vl")
    with model.chat() as chat:
        kept, factors = [], []
        for text in ("Hello!", "And then?", *["a b c d e f g h i j k l m n"] * 6):
            prompt = model.processor.prompt([*chat.messages, Message("user", text)], [])
            kept.append(prompt.length - check_fake_turn(chat, text)[0])
            factors.append(prompt.ntk)
    assert len(set(factors)) >= 3
    for (before, after), count in zip(pairwise(factors), kept[1:], strict=True):
        assert (count > 0) == (before == after)


# --- Any conversation --------------------------------------------------------------------------------------------------


@dataclass
class Talk:
    """A chat and what its user remembers of it."""

    chat: Chat
    messages: list[Message] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)


@dataclass
class Reading:
    """A stream that is being read: the pieces so far and the text that they must become."""

    stream: Iterator[str]
    wanted: str
    talk: Talk | None
    message: Message | None = None
    image: Image.Image | None = None
    pieces: list[str] = field(default_factory=list)
    forgotten: bool = False


TEXTS = st.sampled_from(["Hello!", "What is in the picture?", "日本 🙂", "a b c d e f g h i j k l m n", "..."])
IMAGES = st.none() | st.none() | st.integers(0, 3)
LENGTHS = st.integers(1, 9)
ANY = st.integers(0, 99)


class Conversations(RuleBasedStateMachine):
    """Chats, streams and requests in any order over one fake backend, each turn against the plain sum."""

    make: Callable[[], runtime.Model]

    def __init__(self) -> None:
        super().__init__()
        self.model = type(self).make()
        self.talks: list[Talk] = []
        self.readings: list[Reading] = []

    def prepare(self, talk: Talk | None, text: str, size: int | None) -> tuple[Prompt, Message, Image.Image | None]:
        image = None if size is None else noise(size)
        message = Message("user", text, int(image is not None))
        before, seen = (talk.messages, talk.images) if talk else ([], [])
        return self.model.processor.prompt([*before, message], [*seen, *([image] if image else [])]), message, image

    def expect(self, prompt: Prompt, length: int) -> tuple[list[int], str]:
        tokens = oracle(prompt, runtime.SamplingParams(max_new_tokens=length, temperature=0.0), self.model.info)
        return tokens, text_of(self.model.processor.tokenizer, tokens).strip()

    def refused(self, prompt: Prompt, length: int) -> type[Exception] | None:
        """The error that a request must raise, if any."""
        cache = self.model.artifact.manifest.cache
        fits = prompt.length + length <= cache.context and not (cache.cross and len(prompt.frames) > cache.cross.images)
        return None if fits else ContextError

    def forget(self, talk: Talk | None) -> None:
        for reading in self.readings:
            reading.forgotten |= talk is not None and reading.talk is talk

    @staticmethod
    def remember(talk: Talk, message: Message, image: Image.Image | None, answer: str) -> None:
        talk.messages += [message, Message("assistant", answer)]
        talk.images += [image] if image else []

    @rule()
    @precondition(lambda self: len(self.talks) < 7)
    def open(self) -> None:
        self.talks.append(Talk(self.model.chat()))

    @rule(which=ANY, text=TEXTS, size=IMAGES, length=LENGTHS)
    @precondition(lambda self: self.talks)
    def send(self, which: int, text: str, size: int | None, length: int) -> None:
        talk = self.talks[which % len(self.talks)]
        prompt, message, image = self.prepare(talk, text, size)
        if error := self.refused(prompt, length):
            with pytest.raises(error):
                talk.chat.send(text, image, max_new_tokens=length, temperature=0.0)
            return
        self.forget(talk)
        out = talk.chat.send(text, image, max_new_tokens=length, temperature=0.0)
        assert (out.token_ids, out.text) == self.expect(prompt, length)
        self.remember(talk, message, image, out.text)

    @rule(text=TEXTS, size=IMAGES, length=LENGTHS)
    def ask(self, text: str, size: int | None, length: int) -> None:
        prompt, _, image = self.prepare(None, text, size)
        if self.refused(prompt, length):
            return
        out = self.model.generate(text, image, max_new_tokens=length, temperature=0.0)
        assert (out.token_ids, out.text) == self.expect(prompt, length)

    @rule(which=st.none() | ANY, text=TEXTS, size=IMAGES, length=LENGTHS)
    def start_reading(self, which: int | None, text: str, size: int | None, length: int) -> None:
        talk = None if which is None or not self.talks else self.talks[which % len(self.talks)]
        prompt, message, image = self.prepare(talk, text, size)
        if self.refused(prompt, length):
            return
        self.forget(talk)
        stream = (talk.chat if talk else self.model).stream(text, image, max_new_tokens=length, temperature=0.0)
        reading = Reading(stream, self.expect(prompt, length)[1], talk, message, image)
        self.read(reading)

    @rule(which=ANY)
    @precondition(lambda self: self.readings)
    def read_on(self, which: int) -> None:
        self.read(self.readings.pop(which % len(self.readings)))

    def read(self, reading: Reading) -> None:
        """One piece more; a stream that ended must have given the whole text."""
        piece = next(reading.stream, None)
        if piece is not None:
            reading.pieces.append(piece)
            self.readings.append(reading)
            return
        text = "".join(reading.pieces)
        if reading.forgotten:
            assert reading.wanted.startswith(text)
            return
        assert text == reading.wanted
        if reading.talk and reading.message:
            self.remember(reading.talk, reading.message, reading.image, text)

    @rule(which=ANY)
    @precondition(lambda self: self.readings)
    def stop_reading(self, which: int) -> None:
        self.readings.pop(which % len(self.readings)).stream.close()  # type: ignore[attr-defined]

    @rule(which=ANY)
    @precondition(lambda self: self.talks)
    def close(self, which: int) -> None:
        talk = self.talks[which % len(self.talks)]
        self.forget(talk)
        talk.chat.close()

    @invariant()
    def slots_are_sound(self) -> None:
        check_slots(self.model.engine)
        assert all(talk.chat.messages == talk.messages for talk in self.talks)

    def teardown(self) -> None:
        for reading in self.readings:
            reading.stream.close()  # type: ignore[attr-defined]
        for talk in self.talks:
            talk.chat.close()
        assert self.model.engine.cache.free == self.model.engine.cache.spec.slots
        assert self.model.engine.scheduler.idle


@pytest.mark.parametrize(("family", "examples"), [("llava", 30), ("llava_next", 5), ("mllama", 15), ("qwen_vl", 12)])
def test_any_conversation(family: str, examples: int, make: Callable[..., runtime.Model]) -> None:
    Conversations.make = staticmethod(lambda: make(family))
    chosen = settings(max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Conversations, settings=chosen)

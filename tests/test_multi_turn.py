"""Conversations in every family: each turn is answered as a fresh prompt of the whole conversation is, number by number."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.chat import Chat
from staticvl.runtime.engine.request import SamplingParams
from staticvl.runtime.processor.prompt import Message

from .checkpoints import tiny_llava
from .checkpoints_llava_next import tiny_llava_next
from .checkpoints_mllama import tiny_mllama
from .parity import as_answer, check, generated, noise_image

QWEN = Path(__file__).parent / "golden" / "qwen_vl_tiny" / "checkpoint"
TRAINED = 64  # of QWEN: prompts after it have another rotary base
BUCKETS = Buckets(prefill=(4, 64), decode=(2,), context=448, slots=2)  # one slot for the chat, one for fresh prompts
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
FAMILIES = ("llava", "llava_next", "mllama", "qwen_vl")


@dataclass(frozen=True, slots=True)
class Subject:
    """A compiled model and where it came from."""

    artifact: Path
    checkpoint: Path
    reference: Any  # the same weights in transformers; None for Qwen-VL, which transformers does not have


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """Compiled when first asked for."""
    return Subjects(tmp_path_factory.mktemp("subjects"))


class Subjects(dict[str, Subject]):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> Subject:
        makers = {"llava": tiny_llava, "llava_next": tiny_llava_next, "mllama": tiny_mllama}
        checkpoint, reference, buckets, before = QWEN, None, BUCKETS, "transformers"
        if name in makers:
            made = makers[name](self.folder / name)
            checkpoint, reference = made.folder, made.model
        elif name == "mllama base meta":  # the modes share every graph
            other, before = self["mllama base"], "meta"
            checkpoint, reference = other.checkpoint, other.reference
            shutil.copytree(other.artifact, self.folder / f"{name} artifact")
        elif name == "mllama base":
            made = tiny_mllama(self.folder / name, base=True)
            checkpoint, reference = made.folder, made.model
        if name.startswith("mllama"):
            buckets = buckets.merged(Buckets(images=(3,)))
        out = self.folder / f"{name} artifact"
        build(Options(checkpoint=checkpoint, out=out, buckets=buckets, text_before_image=before))
        self[name] = Subject(out, checkpoint, reference)
        return self[name]


@dataclass(slots=True)
class Conversation:
    """A chat, and beside it all that was said."""

    chat: Chat
    settings: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    prefilled: int = 0  # tokens that the last turn ran through prefill
    encoded: int = 0  # tiles that it encoded

    def turn(self, text: str, *images: Image.Image) -> runtime.Output:
        """One turn by the chat, equal to the same turn as a fresh prompt."""
        model, engine = self.chat.model, self.chat.model.engine
        self.messages.append(Message("user", text, len(images)))
        self.images += images
        params = SamplingParams(max_new_tokens=10, ignore_eos=True, **self.settings)
        prompt = model.processor.prompt(self.messages, list(self.images))
        before = dict(engine.metrics.real)
        out = self.chat.send(text, list(images), sampling=params, return_logits=True)
        self.prefilled, self.encoded = (engine.metrics.real[kind] - before[kind] for kind in ("prefill", "vision"))
        fresh = model.run([engine.new_sequence(prompt, params, return_logits=True)])[0]
        assert out.prompt_tokens == prompt.length
        check(out, as_answer(fresh), f"turn {len(self.messages) // 2 + 1}")
        assert out.text == fresh.text
        self.messages.append(Message("assistant", out.text))
        return out

    def whole(self, processor: Any) -> dict[str, torch.Tensor]:
        """The conversation up to the last question, as transformers prepares it."""
        said = []
        for message in self.messages[:-1]:
            parts = [*({"type": "image"} for _ in range(message.images)), {"type": "text", "text": message.text}]
            said.append({"role": message.role, "content": parts})
        text = processor.apply_chat_template(said, add_generation_prompt=True)
        settings: dict[str, Any] = {"text": text, "return_tensors": "pt"}
        if text.startswith(processor.tokenizer.bos_token):
            settings["add_special_tokens"] = False
        return dict(processor(images=self.images or None, **settings))


@contextmanager
def talk(subject: Subject, settings: dict[str, Any]) -> Iterator[Conversation]:
    model = runtime.load(subject.artifact, reuse=False)
    with model.chat() as chat:
        yield Conversation(chat, settings)
    assert model.engine.cache.free == BUCKETS.slots, "every slot was given back"


# --- As a fresh prompt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_equals_a_fresh_prompt(subjects: dict[str, Subject], family: str, settings: dict[str, Any]) -> None:
    """Text, an image in a later turn, text, two more images, text; greedy answers are those of transformers too."""
    subject = subjects[family]
    processor = AutoProcessor.from_pretrained(subject.checkpoint) if subject.reference else None
    turns = (
        ("Hello!", ()),
        ("What is this?", (noise_image((60, 41), 1),)),
        ("Where is the circle?", ()),
        ("And in these?", (noise_image((20, 90), 2), noise_image((28, 28), 3))),
        ("How many shapes are there?", ()),
    )
    with talk(subject, settings) as conversation:
        for text, images in turns:
            out = conversation.turn(text, *images)
            if processor and settings is GREEDY:
                expected = generated(subject.reference, conversation.whole(processor), new_tokens=10)
                check(out, expected, f"transformers on {text!r}")


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_prefill_only_what_is_new(subjects: dict[str, Subject], family: str) -> None:
    """A second question about the same image runs no vision, and none of the first question's prompt again."""
    with talk(subjects[family], GREEDY) as conversation:
        first = conversation.turn("What is it?", noise_image((30, 30)))
        assert conversation.encoded > 0
        second = conversation.turn("Why?")
        kept = second.prompt_tokens - conversation.prefilled
        if family == "qwen_vl":
            assert first.prompt_tokens <= TRAINED < second.prompt_tokens, "the rotary base changes"
            assert kept == 0
            third = conversation.turn("Why?")
            kept, first = third.prompt_tokens - conversation.prefilled, second
        assert kept >= first.prompt_tokens
        assert conversation.encoded == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_chat_goes_on(subjects: dict[str, Subject], family: str) -> None:
    """Its slot is gone and used by others meanwhile: with cross-attention that includes the keys of its images."""
    with talk(subjects[family], GREEDY) as conversation:
        conversation.turn("What is it?", noise_image((30, 30)))
        conversation.chat.close()
        conversation.chat.model.generate("Hello", noise_image((9, 9), 5), max_new_tokens=2)
        second = conversation.turn("Why?")
        assert conversation.prefilled == second.prompt_tokens
        conversation.turn("And this?", noise_image((50, 30), 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_abandoned_turn_leaves_nothing(subjects: dict[str, Subject], family: str) -> None:
    """A turn with an image of its own, dropped while it is answered; then another image in its place."""
    with talk(subjects[family], GREEDY) as conversation:
        conversation.turn("What is it?", noise_image((30, 30)))
        pieces = conversation.chat.stream("And this?", noise_image((90, 20), 6), max_new_tokens=20, ignore_eos=True)
        next(pieces)
        conversation.turn("And this?", noise_image((20, 50), 7))
        pieces.close()
        conversation.turn("Why?")


# --- What one family does alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["transformers", "meta"])
def test_text_before_a_new_image_is_run_again_where_it_sees_it(subjects: dict[str, Subject], before: str) -> None:
    """The base model's turns are joined as they are, so that only what positions see decides what can be kept."""
    with talk(subjects["mllama base" if before == "transformers" else "mllama base meta"], GREEDY) as conversation:
        out = conversation.turn("Hello!")
        for seed, text in enumerate(("Look at this: ", "and at this: ")):
            held = out.prompt_tokens
            out = conversation.turn(text, noise_image((30, 60), seed))
            assert conversation.encoded == 4, "one picture, always as four tiles"
            if before == "transformers":
                assert conversation.prefilled == out.prompt_tokens
            else:
                assert conversation.prefilled <= out.prompt_tokens - held


def test_the_rotary_base_follows_the_conversation(subjects: dict[str, Subject]) -> None:
    """Qwen-VL's alpha is that of the whole conversation so far: whenever it changes, everything is run again."""
    expected = []
    with talk(subjects["qwen_vl"], GREEDY) as conversation:
        for _ in range(7):
            out = conversation.turn("Where is the bus?", *([noise_image((40, 40))] if not expected else []))
            prompt = conversation.chat.model.processor.prompt(conversation.messages[:-1], list(conversation.images))
            changed = not expected or prompt.ntk != expected[-1]
            assert (conversation.prefilled == out.prompt_tokens) == changed
            expected.append(prompt.ntk)
    assert expected[0] == 1, expected
    assert set(expected) == {1.0, 3.0, 7.0}, expected
    assert expected == sorted(expected)

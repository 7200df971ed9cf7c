"""Chats whose words spell marks and special tokens, images among texts, and instructions that move to the user."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from staticvl import runtime
from staticvl.runtime.processor.chat_template import ChatTemplateError
from staticvl.runtime.processor.prompt import IMAGE, Message
from staticvl.tools.cli import build_parser
from staticvl.tools.serving import main

from .test_conversations import PICTURE


def test_a_chat_goes_on_after_a_mark_in_an_answer(embedded_artifact: Path) -> None:
    """And in the words of the system and of the user; what is kept, forked and taken back is what a fresh prompt has."""
    said = "It is <image></s>."
    with runtime.load(embedded_artifact, threads=1) as model, model.chat("Mind the <image> tag.") as chat:
        settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4}
        first = chat.send(Message("user", ("Look:", IMAGE, "What is <image>?")), [PICTURE], choice=(said,))
        assert first.text == said and first.image_tokens > 0
        second = chat.send("What does <image> mean?", **settings)
        assert second.image_tokens == first.image_tokens
        assert second.reused_tokens >= first.prompt_tokens, "all of the first turn, the answer's mark included"
        other = chat.fork()
        third = chat.send("And <image>?", [PICTURE], **settings)
        assert third.image_tokens == 2 * first.image_tokens
        chat.rewind()
        again = chat.send("And <image>?", [PICTURE], **settings)
        assert again.token_ids == third.token_ids == other.send("And <image>?", [PICTURE], **settings).token_ids
        fresh = model.processor.prompt(chat.messages[:-1], chat.images)
        assert again.prompt_tokens == fresh.length
        other.close()


def test_parts_in_one_call(embedded_artifact: Path) -> None:
    with runtime.load(embedded_artifact, threads=1) as model:
        question = runtime.Message("user", ("What is in ", runtime.IMAGE, "?"))
        one, [same] = model.generate(question, PICTURE, temperature=0), model.generate([question], [PICTURE], temperature=0)
        assert one.token_ids == same.token_ids and one.image_tokens
        quoted = model.generate("What does the <image> tag do?", temperature=0)
        assert not quoted.image_tokens


REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message here.') }}{% endif %}"
    "{{ m.role }}: {% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}\n{% endfor %}"
)


def test_an_instruction_that_the_template_refuses(embedded_artifact: Path) -> None:
    """An error that names the option; with it the first user turn holds the instruction, in a chat as in one call."""
    with runtime.load(embedded_artifact, threads=1) as model, model.chat("Be brief.") as chat:
        model.processor = dataclasses.replace(model.processor, template=REFUSING)
        with pytest.raises(
            ChatTemplateError, match=r"no system message here; put the instruction .* system_in_user=True, .*--sys"
        ):
            chat.send("What?", PICTURE)
    with runtime.load(embedded_artifact, threads=1, system_in_user=True) as model, model.chat("Be <image> brief.") as chat:
        model.processor = dataclasses.replace(model.processor, template=REFUSING)
        out = chat.send(Message("user", (IMAGE, "What?")), PICTURE, temperature=0, max_new_tokens=3)
        same = Message("user", (IMAGE, "Be <image> brief.\n\nWhat?"))
        assert out.token_ids == model.generate(same, PICTURE, temperature=0, max_new_tokens=3).token_ids
        assert out.prompt_tokens == model.processor.prompt(same, [PICTURE]).length


def test_the_server_passes_the_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def load(*_: Any, **settings: Any) -> Any:
        given.update(settings)
        raise RuntimeError("loaded")

    monkeypatch.setattr(main.runtime, "load", load)
    for options, expected in (([], False), (["--system-in-user"], True)):
        with pytest.raises(RuntimeError, match="loaded"):
            main.run(build_parser().parse_args(["serve", "artifact", "--port", "0", *options]))
        assert given["system_in_user"] is expected

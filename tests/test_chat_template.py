"""Chat templates against transformers' apply_chat_template, and LLaVA's own conversation by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from staticvl.runtime.processor import template_sandbox
from staticvl.runtime.processor.chat_template import (
    LLAVA_HF,
    LLAVA_NEXT_ORIGINAL,
    LLAVA_ORIGINAL,
    MLLAMA_BASE,
    ChatTemplateError,
    TemplateLimitError,
    render,
)

from .checkpoints import CHAT_TEMPLATE

PUBLISHED = Path(__file__).parents[2] / "shared" / "published"
SYSTEM_A = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


CHATS = [
    [turn("user", "What is this?", 1)],
    [turn("user", "No picture")],
    [turn("user", "Two <b> & 'of' them\n", 2), turn("assistant", "A cat. "), turn("user", "And its colour?")],
    [turn("system", "Be short."), turn("user", "Hi"), turn("assistant", "Hello")],
    [turn("user", "", 1)],
]


def ours(template: str, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    return render(template, messages, add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>")


def theirs(template: str, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[])), bos_token="<s>", eos_token="</s>"
    )
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text


def published_llava() -> str:
    path = PUBLISHED / "llava-hf--llava-1.5-7b-hf" / "chat_template.json"
    if not path.is_file():
        pytest.skip("the published files are not beside this checkout")
    return json.loads(path.read_text())["chat_template"]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_llava_hf(add_generation_prompt: bool) -> None:
    for messages in CHATS:
        expected = theirs(CHAT_TEMPLATE, messages, add_generation_prompt)
        assert ours(CHAT_TEMPLATE, messages, add_generation_prompt) == expected
        assert ours(LLAVA_HF, messages, add_generation_prompt) == expected
    assert ours(LLAVA_HF, CHATS[0]) == "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_llava_hf_as_published(add_generation_prompt: bool) -> None:
    template = published_llava()
    for messages in CHATS:
        expected = theirs(template, messages, add_generation_prompt)
        assert ours(template, messages, add_generation_prompt) == expected
        assert ours(LLAVA_HF, messages, add_generation_prompt) == expected


def test_llava_original() -> None:
    first = f"{SYSTEM_A} USER: <image>\nWhat is this? ASSISTANT:"
    assert ours(LLAVA_ORIGINAL, CHATS[0]) == first
    chat = [*CHATS[0], turn("assistant", "A cat."), turn("user", "And its colour?")]
    assert ours(LLAVA_ORIGINAL, chat) == first + " A cat.</s>USER: And its colour? ASSISTANT:"
    assert ours(LLAVA_ORIGINAL, chat[:2], add_generation_prompt=False) == first + " A cat.</s>"
    own = [turn("system", "Be short."), turn("user", " Hi\n")]
    assert ours(LLAVA_ORIGINAL, own) == "Be short. USER:  Hi\n ASSISTANT:"
    for messages in [*CHATS, chat, own]:
        assert ours(LLAVA_ORIGINAL, messages) == theirs(LLAVA_ORIGINAL, messages)


def test_llava_next_original() -> None:
    """The same conversation with a human."""
    system = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    )
    shown = f"{system} USER: <image>\nWhat is this? ASSISTANT:"
    assert ours(LLAVA_NEXT_ORIGINAL, CHATS[0]) == shown
    for messages in CHATS:
        assert ours(LLAVA_NEXT_ORIGINAL, messages) == ours(LLAVA_ORIGINAL, messages).replace(SYSTEM_A, system)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_mllama_base(add_generation_prompt: bool) -> None:
    """Turns are joined as they stand."""
    chat = [turn("user", " If I ", 2), turn("assistant", "had to\n"), {"role": "user", "content": "write"}]
    expected = "<s><|image|><|image|> If I had to\nwrite"
    assert ours(MLLAMA_BASE, chat, add_generation_prompt) == theirs(MLLAMA_BASE, chat, add_generation_prompt) == expected


TEMPLATES = {
    "trimmed blocks": "{% for m in messages %}\n    {% if loop.first %}\nA\n    {% endif %}\n{{ m.role }}\n{% endfor %}\n",
    "tojson": "{{ messages | tojson }}|{{ {'b': '<é>', 'a': 1} | tojson(indent=2, sort_keys=true) }}",
    "break": "{% for i in range(9) %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "continue": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
    "generation": "{% generation %}{% for m in messages %}{{ m.role }} {% endfor %}{% endgeneration %}.",
    "date": "{{ strftime_now('%d %b %Y') }}",
    "special tokens": "{{ bos_token }}{{ messages[0].content[-1].text | trim }}{{ eos_token }}{{ nothing }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "tools": "{% if tools is not none %}T{% endif %}{% if documents %}D{% endif %}-",
    "no escaping": "{{ '<a & b>' }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_may_use(name: str) -> None:
    for messages in CHATS:
        assert ours(TEMPLATES[name], messages) == theirs(TEMPLATES[name], messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", r"the chat template is not valid Jinja \(line 2: Expected"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template refuses these messages: roles must alternate"),
        ("{{ messages[0]['role'] + 1 }}", "the chat template refuses these messages: can only concatenate"),
        ("{{ nothing.deeper }}", "refuses these messages: 'nothing' is undefined"),
        ("{{ messages.append(1) }}", "refuses these messages: .*append"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: .*__class__"),
        ("{% for i in range(999999999) %}x{% endfor %}", "refuses these messages: .*[Rr]ange"),
    ],
)
def test_errors(template: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ours(template, CHATS[0])


GROWING = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set r = range(99999) | list %}{% for i in r %}{% for j in r if j < 0 %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in range(2) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "output": "{% for i in range(99999) %}{% for j in range(99) %}text{% endfor %}{% endfor %}",
    "output into a variable": "{% set x %}{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}",
    "text of a template into a variable": "{% set x %}{% for i in range(99999) %}" + "x" * 2000 + "{% endfor %}{% endset %}",
    "repeated text": "{{ 'x' * 999999999 }}",
    "repeated list": "{{ [1, 2] * 999999999 }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "joining": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "nested lists": "{% set n = namespace(s=[]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "nested tuples": "{% set n = namespace(s=()) %}{% for i in range(99) %}{% set n.s = (n.s, n.s) %}{% endfor %}",
    "nested mappings": "{% set n = namespace(s={}) %}{% for i in range(99) %}{% set n.s = {1: n.s, 2: n.s} %}{% endfor %}",
    "padding": "{{ 'x' | center(999999999) }}",
    "padding by a method": "{{ 'x'.ljust(999999999) }}",
    "padding by a format": "{{ '%999999999d' % 1 }}",
    "padding by a star": "{{ '%*d' % (999999999, 1) }}",
    "padding by braces": "{{ '{:>999999999}'.format(1) }}",
    "padding by a width": "{{ '{:>{}}'.format(1, 999999999) }}",
    "tabs": "{{ ('\\t' * 90000).expandtabs(90000) }}",
    "indent": "{{ ('\\n' * 90000) | indent(90000, blank=true) }}",
    "indented JSON": "{{ ([[1, 2]] * 9000) | tojson(indent=90000) }}",
    "replacement": "{{ ('x' * 90000).replace('x', 'y' * 90000) }}",
    "replacement by a filter": "{{ ('x' * 90000) | replace('x', 'y' * 90000) }}",
    "join": "{{ range(99999) | join('y' * 90000) }}",
    "join by a method": "{{ ('y' * 90000).join('x' * 90000) }}",
    "sum of lists": "{{ ([[1] * 300] * 300) | sum(start=[]) | length }}{{ ('x' * 9000) | list | sum(start='') }}",
    "format by a filter": "{{ ('%s' * 90000) | format('y' * 90000) }}",
    "mapped": "{{ range(99999) | map('center', 90000) | list | length }}",
    "a batch": "{{ [1] | batch(999999999, 0) | list }}",
    "slices": "{{ [1] | slice(999999999) | list }}",
    "power": "{{ 10 ** 99999999 }}",
    "large numbers": "{% set n = namespace(s=9) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "rounding": "{{ 1.5 | round(999999999, 'ceil') }}",
    "random text": "{{ lipsum(99999) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_every_template_ends(name: str) -> None:
    endless = name in ("recursive loop", "a macro that calls itself")  # these end where Python's stack does
    with pytest.raises(ChatTemplateError if endless else TemplateLimitError) as caught:
        ours(GROWING[name], CHATS[0])
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_template_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(template_sandbox.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(TemplateLimitError, match="the chat template was stopped: it takes more than 10 s; correct its loops"):
        ours("{% for i in range(50) %}{% endfor %}", CHATS[0])


def test_limits_grow_with_the_messages() -> None:
    """Long conversations are not cut by them: each of 2000 turns, and three million characters."""
    talk = [turn("user", "x" * 1500), turn("assistant", "y")] * 2000
    for template in (CHAT_TEMPLATE, LLAVA_HF, LLAVA_ORIGINAL, MLLAMA_BASE):
        assert ours(template, talk) == theirs(template, talk)
    looping = (
        "{% for m in messages %}{{ (messages | length) ~ loop.last ~ loop.length ~ (m.content[0].text | trim) }}{% endfor %}"
    )
    assert ours(looping, talk[:200]) == theirs(looping, talk[:200])

"""Chat templates: a checkpoint's Jinja text and messages to the text of a prompt.

The environment is the one that transformers gives a template (utils/chat_template_utils.py): sandboxed, blocks trimmed,
`raise_exception`, `strftime_now`, a `tojson` that escapes no HTML, break and continue, and the {% generation %} tag. Besides,
a rendering is bounded in time and size (template_sandbox.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from ..shown import shown
from .template_sandbox import BoundedEnvironment, Meter
from .template_sandbox import TemplateLimitError as _Limit

# LLaVA's conversations: 1.5 is trained and answers with "vicuna_v1"; for 1.6 the model's page gives "llava_v1", which calls
# the user a human.
_VICUNA = """\
{% if messages and messages[0]['role'] == 'system' -%}
{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}
{%- set messages = messages[1:] %}
{%- else -%}
A chat between a curious USER and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the USER's questions.
{%- endif %}
{{- ' ' }}
{%- for message in messages %}
{{- message['role'].upper() + ': ' }}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}
{{- eos_token if message['role'] == 'assistant' else ' ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""
LLAVA_ORIGINAL = _VICUNA.replace("USER", "user")
LLAVA_NEXT_ORIGINAL = _VICUNA.replace("USER", "human")

# The rule of the llava-hf checkpoints, for those that come without their template.
LLAVA_HF = """\
{% for message in messages %}
{{- '' if message['role'] == 'system' else message['role'].upper() + ': ' }}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""

# Base checkpoints of Llama-3.2-Vision have no template, for they continue text: whatever the turns hold is joined as it
# stands, images where their turn has them.
MLLAMA_BASE = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}
{%- for part in message['content'] %}{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}
{%- endif %}
{%- endfor %}
"""


class ChatTemplateError(ValueError):
    """A template that is wrong, or that refuses these messages; the error says why."""


class TemplateLimitError(ChatTemplateError):
    """A template that runs for too long or makes too much text, whatever the messages are."""


class _Generation(Extension):
    """{% generation %} marks what an assistant wrote, for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, bos_token: str, eos_token: str
) -> str:
    """The prompt text of `messages`: dicts with "role" and "content", where content is a list of {"type": "image"} and
    {"type": "text", "text": ...}.

    Raises ChatTemplateError when the template cannot be read or refuses the messages, TemplateLimitError when it runs for
    more than 10 s or about a million steps, or makes more than 200 000 characters and four times those of the messages.
    """
    values = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    try:
        compiled = _compile(template)
        meter = Meter.for_messages(_characters(messages))
        return cast(BoundedEnvironment, compiled.environment).write(compiled, meter, values)
    except (jinja2.TemplateSyntaxError, SyntaxError) as error:
        raise ChatTemplateError(f"the chat template is not valid Jinja (line {error.lineno}: {_reason(error)})") from error
    except _Limit as error:
        raise TemplateLimitError(f"the chat template was stopped: {error}") from error
    except _REFUSALS as error:
        raise ChatTemplateError(f"the chat template refuses these messages: {shown(error)}") from error


# A template is a program: whatever its expressions raise is a refusal.
_REFUSALS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError),
)


def _characters(messages: Sequence[Mapping[str, Any]]) -> int:
    contents = (message["content"] for message in messages)
    return sum(len(each) if isinstance(each, str) else sum(len(part.get("text", "")) + 1 for part in each) for each in contents)


def _reason(error: jinja2.TemplateSyntaxError | SyntaxError) -> str:
    return shown(error.msg if isinstance(error, SyntaxError) else error.message)

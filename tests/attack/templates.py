"""Chat templates by strangers: endless, huge, or reaching for the interpreter."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from staticvl.runtime.processor import chat_template
from staticvl.runtime.processor.chat_template import render

from .case import Attempt, Kind
from .mutate import BYTES, shuffled

MOST = 10_000_000  # characters of a prompt that a template may make; far more than any context holds
LEAKS = ("<class", "<module", "<frame", "<code", "root:x:", "environ(", "PATH=")  # of what is not given to a template
MESSAGES = (
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it? {{ 7 * 7 }} {% raw %}"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]},
)
ENDLESS = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s|length }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{{ ('x' * 10**6) * 10**6 }}", "{{ [0] * 10**10 }}", "{{ 9**9**9**9 }}", "{{ 2**(10**9) }}",
    "{{ (10**5000000)|string }}", "{{ '%0999999999d' % 1 }}", "{{ '{:>9999999999}'.format('x') }}",
    "{{ 'x'.ljust(10**10) }}", "{{ 'x'|center(10**10) }}", "{{ 'x'.zfill(10**10) }}", "{{ '\\t'.expandtabs(10**10) }}",
    "{{ range(10**10)|list }}", "{{ range(99999)|list|string * 99999 }}", "{{ 'a'|indent(10**10) }}",
    "{{ ('a' * 10000)|wordwrap(1) * 10000 }}", "{{ lipsum(n=10**9) }}", "{{ 'a,'.join(['x' * 10**6] * 10**5) }}",
    "{{ 'x'.replace('', 'y' * 10**9) }}", "{{ messages|tojson(indent=10**10) }}", "{{ strftime_now('%c' * 10**8) }}",
    "{{ 1.0|round(10**9) }}",
    "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = n.x + range(99999)|list %}{% endfor %}{{ n.x|min }}",
    "{{ 'a'|urlize * 10**9 }}", "{{ (range(99999)|list|string)|urlize }}", "{{ ('<' * 300000)|striptags }}",
    "{{ ('http://' * 50000)|urlize }}", "{{ dict(a=range(10**9)|batch(2)|list) }}",
)  # fmt: skip
ESCAPES = (
    "{{ ''.__class__ }}", "{{ ''['__class__'] }}", "{{ ''|attr('__class__') }}", "{{ ''|attr('\\x5f_class__') }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "{{ ('{0.__cla' ~ 'ss__}').format('') }}",
    "{{ '{a[__class__]}'.format_map({'a': ''}) }}", "{{ self }}", "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}", "{{ cycler.__init__.__globals__.os.environ }}",
    "{{ joiner.__init__.__globals__ }}", "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}", "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}", "{{ strftime_now.__code__ }}", "{{ strftime_now }}", "{{ raise_exception }}",
    "{{ range }}", "{{ messages.append }}", "{{ ''.join }}", "{{ messages.append(1) }}{{ messages|length }}",
    "{{ messages[0].update(a=1) }}", "{{ messages[0].pop('role') }}", "{{ messages.clear() }}", "{{ messages.sort() }}",
    "{{ (messages|list).append }}", "{{ loop }}", "{% for m in messages %}{{ loop }}{% endfor %}",
    "{% import '/etc/passwd' as x %}{{ x }}", "{% include '/etc/passwd' %}", "{% extends '/etc/passwd' %}",
    "{% from 'os' import environ %}", "{% set x = ''.__class__ %}{{ x }}", "{{ (messages|map(attribute='__class__')|list) }}",
    "{{ messages|map('attr', '__class__')|list }}", "{{ messages|selectattr('__class__')|list }}",
    "{{ messages|groupby('__class__') }}", "{{ messages|sum(attribute='__class__') }}",
    "{{ messages|sort(attribute='__class__') }}", "{{ ['{0.__class__}']|map('format', '')|list }}",
    "{{ '{0.__class__}'|format('') }}", "{{ ''.format.__self__ }}", "{{ (1).__class__.__base__ }}",
    "{{ 1|attr('real')|attr('__class__') }}", "{{ messages|pprint }}", "{{ range(3)|map('upper') }}",
    "{{ messages|map(attribute='role') }}", "{{ dict.__base__ }}", "{{ config }}", "{{ tojson }}",
    "{{ messages|tojson(sort_keys=true, separators=3) }}", "{{ self|tojson }}", "{{ range|tojson }}", "{{ strftime_now(3) }}",
    "{{ strftime_now('%' * 10000) }}", "{{ strftime_now('\\ud800') }}", "{{ strftime_now('\\0') }}",
    "{{ raise_exception() }}", "{{ raise_exception(messages) }}", "{{ raise_exception('x' * 1000000) }}",
    "{{ ('x' * 100000).nothing.more }}", "{{ undefined.x }}", "{{ 1 / 0 }}", "{{ [][0] }}", "{{ {}['x' * 100000] }}",
    "{{ 1 + 'a' }}", "{{ 'x'|int(base=99) }}", "{{ 'x'.encode('zip') }}", "{{ ''.join(messages) }}",
    "{{ messages|join|int + [] }}", "{{ '\\ud800' }}", "{% debug %}", "{% do x %}", "{% trans %}{% endtrans %}",
    "{% generation %}", "{% endgeneration %}", "{% break %}", "{% if %}", "{{", "{%", "{#", "{% raw %}", "{{ " + "(" * 5000,
    "{{ " + "-" * 5000 + "1 }}", "{{ " + "1+" * 5000 + "1 }}", "{{ " + "[" * 200 + "]" * 200 + " }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500, "{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "{{ a" + ".b" * 5000 + " }}",
    "{{ x|" + "|".join(["upper"] * 3000) + " }}", "{% set " + "a" * 100000 + " = 1 %}", "{{ '" + "x" * 3_000_000 + "' }}",
    "x" * 5_000_000, "{% block a %}{{ self.a() }}{% endblock %}", "{% call f() %}{% endcall %}",
    "{% filter nothing %}{% endfilter %}", "{% autoescape x %}{% endautoescape %}", "{{ caller() }}", "{{ varargs }}",
    "{{ super() }}", "{{ '%s' % messages }}", "{{ '%*d' % (10**9, 1) }}", "{{ ''|xmlattr }}", "{{ {'a b': 1}|xmlattr }}",
)  # fmt: skip
HOSTILE = shuffled((*ENDLESS, *ESCAPES))


@dataclass(frozen=True, slots=True)
class Ground:
    honest: Sequence[str]


@contextlib.contextmanager
def ground(_: Path) -> Iterator[Ground]:
    names = ("LLAVA_HF", "LLAVA_ORIGINAL", "LLAVA_NEXT_ORIGINAL", "MLLAMA_BASE")
    honest = tuple(getattr(chat_template, name) for name in names)
    for template in honest:
        _render(template)
    yield Ground(honest)


def make(ground: Ground, rng: random.Random, index: int) -> Attempt:
    if index < len(HOSTILE):
        template = HOSTILE[index]
    else:
        damaged = rng.choice(ground.honest).encode()
        template = BYTES[rng.choice(("flip", "cut", "swap", "zero"))](rng, damaged).decode(errors="replace")
    return Attempt(f"{template[:120]!r}", lambda: _render(template))


def _render(template: str) -> str:
    text = render(template, MESSAGES, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    if found := [mark for mark in LEAKS if mark in text]:
        return f"a text that shows {found[0]!r}"
    return "text" if len(text) <= MOST else "a text of more than 10,000,000 characters"


KIND = Kind(
    name="templates",
    what="endless and huge templates, ways out of the sandbox, broken Jinja",
    endings=("ChatTemplateError", "text"),
    limit_s=10,
    count=400,
    ground=ground,
    make=make,
)

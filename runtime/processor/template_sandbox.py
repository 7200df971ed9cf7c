"""A sandbox in which every chat template ends: a checkpoint's template is a program, and it may loop or grow without end.

Every iteration of a loop, call, filter, operator and output is a step, and what it makes is weighed: its characters and
elements, those of a shared element as often as it is held. Past a limit the rendering ends in one TemplateLimitError. What
could be large before it can be weighed is estimated first.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10.0  # that one rendering may take
STEPS = 1_000_000  # of one rendering, and one more for each character of the messages
ROOM, GROWTH = 200_000, 4  # characters of a value or of the output: ROOM and GROWTH for each character of the messages
TOTAL = 32  # so many times as much may be made in all
MOST_BITS = 4096  # of an integer

_WIDTH = re.compile(r"\d{5,}")  # of padding, in a format


class TemplateLimitError(jinja2.TemplateError):
    """A template that runs for too long or makes too much text."""


@dataclass(slots=True)
class Meter:
    """The budget of one rendering, which each step and each value reduces."""

    most: int  # characters of a value
    steps: int  # that remain
    characters: int  # that remain, of all values together
    deadline: float  # by time.monotonic

    @classmethod
    def for_messages(cls, characters: int) -> Meter:
        """The budget for messages of so many characters."""
        most = ROOM + GROWTH * characters
        return cls(most, STEPS + characters, TOTAL * most, time.monotonic() + SECONDS)

    def step(self) -> None:
        """Count a step; raises TemplateLimitError where there are too many, or the time is over."""
        self.steps -= 1
        if self.steps < 0:
            raise TemplateLimitError("it takes too many steps; correct its loops")
        if time.monotonic() > self.deadline:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} s; correct its loops")

    def weigh(self, value: Any) -> Any:
        """The value; raises TemplateLimitError where it is too large, alone or together with all values before it."""
        weight = weight_of(value, self.most)
        self.characters -= weight
        if weight > self.most or self.characters < 0:
            raise self.too_much()
        return value

    def expect(self, characters: int) -> None:
        """Raise TemplateLimitError where a value of so many characters would be too much."""
        if characters > self.characters:
            raise self.too_much()

    def too_much(self) -> TemplateLimitError:
        """The error for text that is too long."""
        return TemplateLimitError(f"it makes more than {self.most} characters; correct what it repeats")


_METER: ContextVar[Meter] = ContextVar("meter")


def weight_of(value: Any, most: int) -> int:
    """Characters and elements of a value, or something above `most` as soon as that is certain."""
    weight, waiting = 0, [value]
    while waiting and weight <= most:
        item = waiting.pop()
        weight += 1
        if isinstance(item, str | bytes):
            weight += len(item)
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
    return weight


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a step and a limit for all that a template can repeat. Nothing is computed when it is compiled."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **settings: Any) -> None:
        super().__init__(optimized=False, finalize=_output, **settings)
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        own = {"_counted": _counted, "_sized": _sized, "_joined": _joined}
        self.filters |= {name: jinja2.pass_context(function) for name, function in own.items()}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, within the limits."""
        self.filters[name] = _bounded(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _measured(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        meter.step()
        _expect_of_operator(meter, operator, left, right)
        return meter.weigh(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        meter = _METER.get()
        meter.step()
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps a text's format
        name = __obj.__name__ if isinstance(owner, str) else "lipsum" if __obj is __self.globals["lipsum"] else ""
        if name == "join":
            args = tuple(meter.weigh([*_counted(None, each)]) for each in args)
        _expect(meter, name, (owner, *args), kwargs)
        return meter.weigh(super().call(__context, __obj, *args, **kwargs))

    def write(self, template: jinja2.Template, meter: Meter, values: Mapping[str, Any]) -> str:
        """The text that a template makes; raises TemplateLimitError, and whatever its expressions raise."""
        token = _METER.set(meter)
        try:
            chunks, length = [], 0
            for chunk in template.generate(values):
                length += len(chunk)
                if length > meter.most:
                    raise TemplateLimitError(f"it writes more than {meter.most} characters; correct its loops")
                chunks.append(chunk)
            return "".join(chunks)
        finally:
            _METER.reset(token)


def _measured(tree: nodes.Template) -> nodes.Template:
    """The tree of a template, in which every loop is counted, and every output and every sum of parts is weighed."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _filter("_counted", loop.iter)
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for field, value in list(parent.iter_fields()):
            setattr(parent, field, [*map(_measured_node, value)] if isinstance(value, list) else _measured_node(value))
    return tree


def _measured_node(node: Any) -> Any:
    if isinstance(node, nodes.TemplateData):
        return nodes.Const(node.data, lineno=node.lineno)
    if isinstance(node, nodes.Concat):
        return _filter("_joined", nodes.List(node.nodes, lineno=node.lineno))
    if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _filter("_sized", node)
    return node


def _filter(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counted(_: Any, items: Any) -> Iterator[Any]:
    meter = _METER.get()
    for item in items:
        meter.step()
        yield item


def _sized(_: Any, value: Any) -> Any:
    meter = _METER.get()
    meter.step()
    return meter.weigh(value)


def _joined(context: Any, parts: Any) -> str:
    return "".join(map(str, _sized(context, parts)))


_output = jinja2.pass_context(_sized)  # since it takes the context, it is not applied when the template is compiled


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is estimated, then weighed."""
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @functools.wraps(function)
    def run(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.step()
        if name == "join" and not isinstance(value, str | list | tuple):
            value = meter.weigh([*_counted(context, value)])
        _expect(meter, name, (value, *args), kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        passed = [first[kind]] if kind else []
        return meter.weigh(function(*passed, value, *args, **kwargs))

    return jinja2.pass_context(run)


def _expect_of_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        values = right if isinstance(right, tuple) else (right,)
        _expect(meter, "format", (left, *values), {})
    elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise TemplateLimitError(f"it makes a number of more than {MOST_BITS} bits; correct what it multiplies")
    elif operator == "*":
        number = max((each for each in (left, right) if isinstance(each, int)), default=0)
        meter.expect(number * max(weight_of(left, meter.most), weight_of(right, meter.most)))


def _expect(meter: Meter, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise TemplateLimitError for a filter or a method of a text that could make too much of these arguments."""
    if name in _ESTIMATES:
        meter.expect(_ESTIMATES[name](_Arguments(args[0], [*args[1:], *kwargs.values()], meter.most)))


@dataclass(frozen=True, slots=True)
class _Arguments:
    """Arguments of a filter or a method: the value before its name, and the others."""

    value: Any
    others: list[Any]
    most: int

    def count(self, part: Any) -> int:
        return self.value.count(str(part)) if isinstance(self.value, str) else 0

    @property
    def size(self) -> int:
        return weight_of(self.value, self.most)

    @property
    def number(self) -> int:
        return max((each for each in self.others if isinstance(each, int)), default=0)

    @property
    def largest(self) -> int:
        """The largest number, or weight of an argument."""
        return max([self.number, *(weight_of(each, self.most) for each in self.others)])

    @property
    def length(self) -> int:
        """The length of the first argument."""
        return len(self.others[0]) if self.others and hasattr(self.others[0], "__len__") else 0


def _padded(arguments: _Arguments) -> int:
    return arguments.number * TOTAL


def _repeated(arguments: _Arguments) -> int:
    return arguments.size * arguments.largest


def _formatted(arguments: _Arguments) -> int:
    widths = sum(map(int, _WIDTH.findall(arguments.value))) if isinstance(arguments.value, str) else 0
    return (arguments.count("{") + arguments.count("%")) * arguments.largest + widths


# An upper bound of what these make, by the name of the filter or of the method of a text.
_ESTIMATES: dict[str, Callable[[_Arguments], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "batch", "slice"), _padded),
    **dict.fromkeys(("indent", "expandtabs", "tojson", "wordwrap"), _repeated),
    **dict.fromkeys(("format", "format_map"), _formatted),
    "replace": lambda arguments: arguments.count(arguments.others[0] if arguments.others else "") * arguments.largest,
    "join": lambda arguments: arguments.size * arguments.length,
    "sum": lambda arguments: arguments.size**2 if any(isinstance(each, list | tuple) for each in arguments.others) else 0,
    "round": lambda arguments: arguments.number**2,
    "lipsum": lambda arguments: arguments.number**2,
}

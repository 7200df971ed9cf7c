"""Operators of rows: norms, activations, rotary embedding, quantised rows, candidates.

M rows, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...compiler.ascend_graph import fused
from ...model_defs import ops
from . import formulas
from .case import Builder, Calls, Case, Expected, Numbers, Operands, Setting
from .forms import Form

EPS = 1e-5


def _norm(
    name: str, operator: str, call: Callable[..., Any], reference: Callable[..., tuple[Tensor, ...]], inputs: int = 1
) -> Builder:
    """A builder of a case over `inputs` tensors [M, C] and a weight [C]; the reference takes them in that order."""

    def build(form: Form, setting: Setting) -> Iterator[Case]:
        def operands(numbers: Numbers) -> Operands:
            given = [numbers.normal(form["rows"], form["width"], scale=1 + i) for i in range(inputs)]
            weight = numbers.normal(form["width"], scale=0.2, shift=1)
            outputs = reference(*given, weight)
            fed = {f"x{i}": x for i, x in enumerate(given)}
            expected = {f"out{i}": Expected(x) for i, x in enumerate(outputs)}
            return Operands(fed, expected, {"weight": weight.to(numbers.dtype)})

        yield Case(
            name=name,
            form=form,
            operators=(operator,),
            module=lambda: Calls(call, weight=(form["width"],)),
            operands=operands,
        )

    return build


def _unscaled(rows: Tensor, scales: Tensor) -> Tensor:
    """What quantised rows stand for."""
    return rows.float() * scales[:, None]


def _quantised_sum(p: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rows, scales, total = fused.add_rms_norm_quantised(x, y, p.weight, EPS)
    return _unscaled(rows, scales), total


rms_norm = _norm("RMS norm", "RmsNorm", lambda p, x: ops.rms_norm(x, p.weight, EPS), lambda x, w: (formulas.rms(x, w, EPS),))
add_rms_norm = _norm(
    "sum and its RMS norm",
    "AddRmsNorm",
    lambda p, x, y: fused.add_rms_norm(x, y, p.weight, EPS),
    lambda x, y, w: (formulas.rms(x + y, w, EPS), x + y),
    inputs=2,
)
add_rms_norm_rows = _norm(
    "sum, its RMS norm, and rows of that in 8 bits",
    "AddRmsNormDynamicQuant",
    _quantised_sum,
    lambda x, y, w: (formulas.rounded_rows(formulas.rms(x + y, w, EPS)), x + y),
    inputs=2,
)


def layer_norm(form: Form, setting: Setting) -> Iterator[Case]:
    def operands(numbers: Numbers) -> Operands:
        x = numbers.normal(form["rows"], form["width"], shift=0.5)
        weight, bias = numbers.normal(form["width"], scale=0.2, shift=1), numbers.normal(form["width"])
        stored = {"weight": weight.to(numbers.dtype), "bias": bias.to(numbers.dtype)}
        return Operands({"x": x}, {"out": Expected(formulas.standard(x, 1, EPS) * weight + bias)}, stored)

    shape = (form["width"],)
    yield Case(
        name="layer norm",
        form=form,
        operators=("LayerNormV4",),
        module=lambda: Calls(lambda p, x: ops.layer_norm(x, p.weight, p.bias, EPS), weight=shape, bias=shape),
        operands=operands,
    )


def _activation(name: str, operator: str, call: Callable[..., Tensor], reference: Callable[[Tensor], Tensor]) -> Builder:
    def build(form: Form, setting: Setting) -> Iterator[Case]:
        def operands(numbers: Numbers) -> Operands:
            x = numbers.normal(form["rows"], form["width"], scale=2)
            return Operands({"x": x}, {"out": Expected(reference(x))})

        yield Case(name=name, form=form, operators=(operator,), module=lambda: Calls(lambda _, x: call(x)), operands=operands)

    return build


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return formulas.silu(gate) * up


gelu = _activation("GELU", "GeluV2", ops.gelu, formulas.gelu)
quick_gelu = _activation("quick GELU", "FastGelu", ops.quick_gelu, formulas.quick_gelu)
rows = _activation("rows in 8 bits", "DynamicQuant", lambda x: _unscaled(*fused.quantised_rows(x)), formulas.rounded_rows)
swiglu = _activation("SwiGLU", "SwiGlu", lambda x: ops.silu_mul(*x.chunk(2, dim=-1)), _gated)


def rotary(form: Form, setting: Setting) -> Iterator[Case]:
    yield Case(
        name=f"rotary embedding, {_tokens(form)}",
        form=form,
        operators=("RotaryMul",),
        module=lambda: Calls(lambda _, x, cos, sin: ops.rope(x, cos, sin)),
        operands=lambda numbers: _turned(form, numbers, {"q": form["heads"]}),
    )


def rotary_both(form: Form, setting: Setting) -> Iterator[Case]:
    heads = {"q": form["heads"], "k": form["kv_heads"]}
    yield Case(
        name=f"rotary embedding of queries and keys, {_tokens(form)}",
        form=form,
        operators=("ApplyRotaryPosEmb",),
        module=lambda: Calls(lambda _, *x: fused.rope_of_both(*x)),
        operands=lambda numbers: _turned(form, numbers, heads),
    )


def _tokens(form: Form) -> str:
    return f"a token of each of {form['batch']} rows" if form["tokens"] == 1 else f"{form['tokens']} tokens"


def _turned(form: Form, numbers: Numbers, heads: dict[str, int]) -> Operands:
    batch, tokens, width = form["batch"], form["tokens"], form["width"]
    angles = (numbers.uniform(batch, tokens, width // 2) * 6.28).repeat(1, 1, 2)
    cos, sin = numbers.stored(angles.cos()), numbers.stored(angles.sin())
    given = {name: numbers.normal(batch, tokens, count * width) for name, count in heads.items()}
    expected = {
        f"{name}_out": Expected(formulas.turned(x.view(batch, tokens, -1, width), cos[:, :, None], sin[:, :, None]).flatten(2))
        for name, x in given.items()
    }
    return Operands(given | {"cos": cos, "sin": sin}, expected)


def candidates(form: Form, setting: Setting) -> Iterator[Case]:
    yield Case(
        name="top-k candidates of the next token",
        form=form,
        operators=("TopKV2",),
        module=lambda: Calls(lambda _, *x: ops.top_tokens(*x, form["count"])),
        operands=lambda numbers: _top(form, numbers),
    )


def _top(form: Form, numbers: Numbers) -> Operands:
    """The largest logits are all different, so that their order is known."""
    count, vocabulary = form["count"], form["vocabulary"]
    logits = numbers.normal(form["rows"], vocabulary).clamp(-4, 4)
    ids = numbers.uniform(form["rows"], vocabulary).argsort(-1)[:, :count]
    bits = torch.tensor(5, dtype=numbers.dtype).view(torch.int16) + torch.arange(count, 0, -1, dtype=torch.int16)
    largest = bits.view(numbers.dtype).float().expand(form["rows"], count)  # neighbours among numbers of the dtype
    logits = logits.scatter(1, ids, largest)
    temperature = torch.full((form["rows"],), 0.5)
    mass = torch.exp((logits.double() - largest[:, :1].double()) * 0.5).sum(-1)
    expected = {
        "top_logits": Expected(largest, exact=True),
        "top_ids": Expected(ids.int(), exact=True),
        "mass": Expected(mass[:, None].float()),
    }
    return Operands({"logits": logits, "inverse_temperature": temperature}, expected)

"""Matrix products with weights in floats, 8 and 4 bits, as layers of a model are lowered.

M rows, K in features, N out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...compiler.ascend_graph import fused
from ...model_defs.config import quant_bits, quant_block
from ...model_defs.layers import Linear
from ...runtime.backends.ascend.weights import to_offsets, to_signed
from ...weights.ascend_contents import packed_features
from ...weights.ascend_forms import has_column_scales, packs_features
from ...weights.quantize import joined_halves
from . import formulas
from .case import Calls, Case, Expected, Numbers, Operands, Setting
from .forms import Form

LARGEST = 127


def product(form: Form, setting: Setting) -> Iterator[Case]:
    yield Case(
        name=f"product with weights in {setting.dtype}{_words(form)}",
        form=form,
        operators=("MatMul",),
        module=lambda: _layer(form, "none"),
        operands=lambda numbers: _product(form, numbers),
    )


def _words(form: Form) -> str:
    rows = "one row" if form["rows"] == 1 else f"{form['rows']} rows"
    return f"{' and a bias' if _biased(form) else ''}, {rows}"


def _biased(form: Form) -> bool:
    return "_bias" in form.kind


def _layer(form: Form, quant: str, call: Callable[..., Tensor] = lambda p, x: p.layer(x)) -> Calls:
    """`call` on a module whose `layer` is a layer of the form."""
    with torch.device("meta"):
        layer = Linear(form["inputs"], form["features"], bias=_biased(form), quant=quant)
    return Calls(call, layer=layer)


def _product(form: Form, numbers: Numbers) -> Operands:
    x = numbers.normal(form["rows"], form["inputs"])
    weight = numbers.normal(form["features"], form["inputs"], scale=form["inputs"] ** -0.5)
    return _with_bias(form, numbers, x, x @ weight.T, {"weight": weight.to(numbers.dtype)})


def _with_bias(form: Form, numbers: Numbers, x: Tensor, y: Tensor, parts: dict[str, Tensor]) -> Operands:
    """The operands of a layer whose product without a bias is y."""
    stored = dict(parts)
    if _biased(form):
        bias = numbers.normal(form["features"])
        y = y + bias
        stored["bias"] = bias if numbers.dtype == torch.bfloat16 else bias.to(numbers.dtype)  # as artifacts hold it
    return Operands({"x": x}, {"out": Expected(y)}, {f"layer.{name}": each for name, each in stored.items()})


# ---- stored in 8 and 4 bits, computed in floats


def stored_product(form: Form, setting: Setting) -> Iterator[Case]:
    kind = stored_kind(form)
    yield Case(
        name=f"product with weights in {quant_bits(kind)} bits{_words(form)}",
        form=form,
        operators=("WeightQuantBatchMatmulV2",),
        module=lambda: _layer(form, kind),
        operands=lambda numbers: _stored(form, kind, setting, numbers),
    )


def stored_kind(form: Form) -> str:
    """The quantisation of a layer of a form such as w8_128_asym_one."""
    bits, block, *_ = form.kind.split("_")
    small = "-g32" if block == "32" and quant_block(form["inputs"]) != 32 else ""
    return f"{bits}a16{small}{'-asym' if '_asym' in form.kind else ''}"


def _stored(form: Form, kind: str, setting: Setting, numbers: Numbers) -> Operands:
    """Whole numbers around a middle, in blocks with scales, in the parts of a definition, then in those of Ascend."""
    features, inputs, bits = form["features"], form["inputs"], quant_bits(kind)
    columns = has_column_scales(kind, setting.quant)
    block = inputs if columns else quant_block(inputs, kind)
    blocks, top = -(-inputs // block), 2**bits
    q = numbers.whole(1 if bits == 8 else 0, top - 1, features, inputs)
    scales = numbers.stored(numbers.normal(features, blocks).abs() * 0.2 + 0.5) * (4 / top / inputs**0.5)
    scales = numbers.stored(scales)
    zeros = numbers.whole(top // 4, 3 * top // 4, features, blocks) if kind.endswith("-asym") else None
    middle = torch.full((features, blocks), top // 2) if zeros is None else zeros
    by_column = (each.repeat_interleave(block, dim=1)[:, :inputs] for each in (middle, scales))
    shift, step = by_column
    x = numbers.normal(form["rows"], inputs)
    y = x @ ((q - shift) * step).float().T
    parts = {"qweight": _blocked(q, block, bits), "scales": scales.to(numbers.dtype)}
    if zeros is not None:
        parts["zeros"] = zeros.to(torch.uint8) if bits == 8 else joined_halves(_even(zeros.to(torch.uint8)))
    return _with_bias(form, numbers, x, y, _as_taken(parts, kind, (features, inputs), columns))


def _blocked(q: Tensor, block: int, bits: int) -> Tensor:
    """qweight [N, blocks, block] uint8, two numbers of 4 bits in each; what fills the last block stands for zero."""
    missing = -q.shape[1] % block
    q = torch.nn.functional.pad(q, (0, missing), value=2 ** (bits - 1)).to(torch.uint8).unflatten(1, (-1, block))
    return q if bits == 8 else joined_halves(q)


def _even(zeros: Tensor) -> Tensor:
    return torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))


def _as_taken(parts: dict[str, Tensor], kind: str, shape: tuple[int, int], columns: bool) -> dict[str, Tensor]:
    """The parts of a definition as a kernel takes them."""
    if columns:
        parts = {**parts, "qweight": parts["qweight"].flatten(1)}
    elif packs_features(kind, shape):
        parts = {part: packed_features(part, each) for part, each in parts.items()}
    if "zeros" in parts:
        parts = {**parts, "zeros": to_offsets(parts["zeros"], parts["qweight"], parts["scales"])}
    return {**parts, "qweight": to_signed(parts["qweight"])}


# ---- products in whole numbers


def int8_product(form: Form, setting: Setting) -> Iterator[Case]:
    yield Case(
        name=f"product in 8 bits{_words(form)}",
        form=form,
        operators=("DynamicQuant", "QuantBatchMatmulV3"),
        module=lambda: _layer(form, "w8a8"),
        operands=lambda numbers: _int8(form, numbers),
    )


def _int8(form: Form, numbers: Numbers) -> Operands:
    x = _exact_rows(form, numbers)
    qweight, scales = _int8_weight(form, numbers)
    y = (x.double() @ (qweight.double() * scales.double())).float()
    return _with_bias(form, numbers, x, y, {"qweight": qweight, "scales": scales})


def _exact_rows(form: Form, numbers: Numbers) -> Tensor:
    """[M, K], each row whole steps of a 127th of its largest number: nothing is rounded when it is quantised."""
    steps = numbers.whole(-LARGEST, LARGEST, form["rows"], form["inputs"])
    steps[:, 0] = LARGEST
    return steps / 64


def _int8_weight(form: Form, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """[K, N] int8 and scales [N] float32, by which products of _exact_rows are of the order of 1."""
    qweight = numbers.whole(-LARGEST, LARGEST, form["inputs"], form["features"]).to(torch.int8)
    scales = (numbers.uniform(form["features"]) + 0.5) * form["inputs"] ** -0.5 / 80
    return qweight, scales


def swiglu_rows(form: Form, setting: Setting) -> Iterator[Case]:
    def call(p: Any, x: Tensor) -> Tensor:
        rows, scales = fused.swiglu_quantised(*fused.quantised_rows(x), p.layer.qweight, p.layer.scales)
        return rows.float() * scales[:, None]

    yield Case(
        name=f"product in 8 bits, SwiGLU, and its rows in 8 bits{_words(form)}",
        form=form,
        operators=("DynamicQuant", "QuantBatchMatmulV3", "DequantSwigluQuant"),
        module=lambda: _layer(form, "w8a8", call),
        operands=lambda numbers: _swiglu(form, numbers),
    )


def _swiglu(form: Form, numbers: Numbers) -> Operands:
    x = _exact_rows(form, numbers)
    qweight, scales = _int8_weight(form, numbers)
    gate, up = (x.double() @ (qweight.double() * scales.double())).chunk(2, dim=-1)
    out = formulas.rounded_rows(formulas.silu(gate) * up).float()
    return Operands({"x": x}, {"out": Expected(out)}, {"layer.qweight": qweight, "layer.scales": scales})

"""Attention: over caches that are written first, to images, and within a tower.

B rows, T tokens, H query heads, K kv heads, D head dim, S keys. Values differ by head. What a query must not see would show:
its value is far from all others, and its key matches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...model_defs import ops
from ...runtime.artifact import IN_FLOAT32
from .case import Calls, Case, Expected, Numbers, Operands, Setting
from .forms import Form
from .formulas import attended

FIA = "FusedInferAttentionScore"
CACHES = ("k_cache.0", "v_cache.0")
UNSEEN = 100.0  # a value that no query may see
FAULTY_KEYS = 512  # beyond so many keys a mask was ignored
STEPS = (1 / 16, 1 / 32)  # scales of an int8 cache: powers of two, so that new rows are whole steps and a quarter


def over_cache(form: Form, setting: Setting) -> Iterator[Case]:
    yield Case(
        name=f"attention over the cache, {_tokens(form)}",
        form=form,
        operators=(FIA, "Scatter"),
        module=lambda: Calls(lambda _, *x: ops.cached_attention(*x, form["heads"])),
        operands=lambda numbers: _over_cache(form, numbers),
        watches=("fault.padded_batch",),
    )


def over_int8_cache(form: Form, setting: Setting) -> Iterator[Case]:
    heads, shape = form["heads"], (form["kv_heads"], 1, form["width"])
    features = (form["kv_heads"] * form["width"],)

    def call(p: Any, *x: Tensor) -> Any:
        return ops.int8_cached_attention(*x[:5], p.k_scale.view(shape), p.v_scale.view(shape), x[5], heads)

    yield Case(
        name=f"attention over the cache in 8 bits, {_tokens(form)}",
        form=form,
        operators=(FIA, "Scatter", "Quantize"),
        module=lambda: Calls(call, k_scale=features, v_scale=features),
        operands=lambda numbers: _over_int8_cache(form, numbers),
        watches=("fault.padded_batch",),
    )


def _tokens(form: Form) -> str:
    if form["tokens"] > 1:
        return f"{form['tokens']} tokens after a full row of others"
    padded = _lengths(form)[1:].count(0)
    return f"a token of each of {form['batch']} rows" + (f", {padded} of them padding" if padded else "")


def _lengths(form: Form) -> list[int]:
    """Tokens before, of each row: nearly a full row; about 512; none, as padded rows have it."""
    most = form["keys"] - form["tokens"]
    rows = [most, 0] if form["batch"] == 2 else [most, min(most, FAULTY_KEYS + 1), *[0] * form["batch"]]
    return rows[: form["batch"]]


def _over_cache(form: Form, numbers: Numbers) -> Operands:
    q, k, v, caches, lengths = _cached_operands(form, numbers)
    k_cache, v_cache = (_written(cache, new, lengths) for cache, new in zip(caches, (k, v), strict=True))
    out = _joined(attended(_split(q, form["heads"]), k_cache, v_cache, _visible(form, lengths)))
    return _with_caches((q, k, v), caches, lengths, out, (k_cache, v_cache))


def _with_caches(
    new: tuple[Tensor, ...], caches: Sequence[Tensor], lengths: Sequence[int], out: Tensor, after: Sequence[Tensor]
) -> Operands:
    """The operands of attention over caches, which are `after` afterwards."""
    inputs = dict(zip(("q", "k", "v"), new, strict=True)) | dict(zip(CACHES, caches, strict=True)) | {"lengths": _ints(lengths)}
    written = {f"{name}.out": Expected(cache, exact=True) for name, cache in zip(CACHES, after, strict=True)}
    return Operands(inputs, {"out": Expected(out), **written})


def _cached_operands(form: Form, numbers: Numbers) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], list[int]]:
    batch, tokens, width, kv_heads = (form[name] for name in ("batch", "tokens", "width", "kv_heads"))
    lengths = _lengths(form)
    q = numbers.normal(batch, tokens, form["heads"] * width)
    matching = _matching(form, q)
    k = numbers.stored(matching + matching.roll(1, dims=1))  # also of the token before, which must not see it
    v = numbers.normal(batch, tokens, kv_heads * width)
    offsets = numbers.normal(1, kv_heads, 1, width)
    k_cache = numbers.normal(batch, kv_heads, form["keys"], width)
    v_cache = numbers.stored(numbers.normal(batch, kv_heads, form["keys"], width) + offsets)
    for row, length in enumerate(lengths):
        v_cache[row, :, length + tokens :] = UNSEEN
        k_cache[row, :, length + tokens :] = numbers.stored(_split(matching, kv_heads)[row, :, -1:])
    return q, k, v, (k_cache, v_cache), lengths


def _matching(form: Form, q: Tensor) -> Tensor:
    """Keys [B, T, K*D] that weigh about as much for the queries of their token as all others together."""
    batch, tokens, kv_heads, width = q.shape[0], form["tokens"], form["kv_heads"], form["width"]
    group = q.view(batch, tokens, kv_heads, -1, width).sum(3)
    return (group * math.log(max(form["keys"], 2)) / width**0.5).flatten(2)


def _over_int8_cache(form: Form, numbers: Numbers) -> Operands:
    """New rows lie a quarter of a step from whole steps, so that no two ways of rounding differ; some are cut off."""
    q, k, v, caches, lengths = _cached_operands(form, numbers)
    shape = (form["kv_heads"], 1, form["width"])
    k_scale, v_scale = (torch.tensor(STEPS)[numbers.whole(0, 1, *shape)] for _ in range(2))
    k, v = (_near_steps(new, scale, numbers) for new, scale in ((k, k_scale), (v, v_scale)))
    v[..., ::7] = 160 * v_scale.flatten()[::7] * v[..., ::7].sign()
    stored = [_steps(cache, scale[None]) for cache, scale in zip(caches, (k_scale, v_scale), strict=True)]
    news = (_split(new, form["kv_heads"]) for new in (k, v))
    steps = [_steps(new, scale[None]) for new, scale in zip(news, (k_scale, v_scale), strict=True)]
    after = [_written_heads(cache, new, lengths) for cache, new in zip(stored, steps, strict=True)]
    keys, values = (numbers.stored(cache.float() * scale) for cache, scale in zip(after, (k_scale, v_scale), strict=True))
    out = _joined(attended(_split(q, form["heads"]), keys, values, _visible(form, lengths)))
    scales = {f"{name}_scale": scale.flatten().to(numbers.dtype) for name, scale in (("k", k_scale), ("v", v_scale))}
    in_float32 = {name + IN_FLOAT32: scale.float() for name, scale in scales.items()}
    return replace(_with_caches((q, k, v), stored, lengths, out, after), weights=scales | in_float32)


def _near_steps(x: Tensor, scale: Tensor, numbers: Numbers) -> Tensor:
    steps = (x / scale.flatten()).round().clamp(-30, 30)
    return numbers.stored((steps + 0.25) * scale.flatten())


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-128, 127).to(torch.int8)


def _visible(form: Form, lengths: Sequence[int]) -> Tensor:
    """[B, T, S]: token t of row b sees rows 0 .. lengths[b] + t."""
    last = _ints(lengths)[:, None] + torch.arange(form["tokens"])
    return torch.arange(form["keys"]) <= last[..., None]


def _ints(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _written(cache: Tensor, new: Tensor, lengths: Sequence[int]) -> Tensor:
    return _written_heads(cache, _split(new, cache.shape[1]), lengths)


def _written_heads(cache: Tensor, new: Tensor, lengths: Sequence[int]) -> Tensor:
    """The cache [B, K, S, D] with new [B, K, T, D] from rows `lengths` on."""
    cache = cache.clone()
    for row, length in enumerate(lengths):
        cache[row, :, length : length + new.shape[2]] = new[row]
    return cache


# ---- to images


def cross(form: Form, setting: Setting) -> Iterator[Case]:
    """At the true number of keys, at some more than FAULTY_KEYS, and with a query that sees nothing."""
    one = f"a query of each of {form['batch']} rows" if form["tokens"] == 1 else f"{form['tokens']} queries"
    short = FAULTY_KEYS // form["tiles"] * form["tiles"] + FAULTY_KEYS // 4 // form["tiles"] * form["tiles"]
    sizes = dict(form.sizes)
    few = Form(form.kind, tuple((sizes | {"keys": short}).items()))
    known = ("fault.mask_beyond_512_keys",) if form["tokens"] == 1 else ()
    for name, own, blind in (
        (f"a mask over {short} keys, {one}", few, False),
        (f"a mask over {form['keys']} keys, {one}", form, False),
        (f"a query that sees no key, {one}", form, True),
    ):
        yield Case(
            name=name,
            form=own,
            operators=(FIA,),
            module=lambda own=own: Calls(lambda _, q, k, v, mask: ops.cross_attention(q, [k], [v], mask, own["heads"])),
            operands=lambda numbers, own=own, blind=blind: _cross(own, numbers, blind),
            watches=(*known, "fault.query_without_keys"),
        )


def _cross(form: Form, numbers: Numbers, blind: bool) -> Operands:
    batch, tokens, kv_heads, width, tiles = (form[name] for name in ("batch", "tokens", "kv_heads", "width", "tiles"))
    q = numbers.normal(batch, tokens, form["heads"] * width)
    shape = (batch, kv_heads, form["keys"], width)
    k, v = numbers.normal(*shape), numbers.stored(numbers.normal(*shape) + numbers.normal(1, kv_heads, 1, width))
    # Token t of row b sees the first tiles: one more than the token before. The last tile is never seen.
    seen = 1 + (torch.arange(batch)[:, None] + torch.arange(tokens)) % max(tiles - 1, 1)
    if blind:
        seen[0, 0] = 0
    visible = torch.arange(tiles) < seen[..., None]  # [B, T, tiles]
    if not blind and tiles > 1:
        v[:, :, -(form["keys"] // tiles) :] = UNSEEN
    hidden = torch.where(visible, 0.0, torch.finfo(torch.float16).min)
    by_key = visible.repeat_interleave(form["keys"] // tiles, dim=-1)
    out = _joined(attended(_split(q, form["heads"]), k, v, by_key))
    return Operands({"q": q, "cross_k.0.0": k, "cross_v.0.0": v, "cross_mask": hidden}, {"out": Expected(out)})


# ---- within a tower


def whole(form: Form, setting: Setting) -> Iterator[Case]:
    yield Case(
        name=f"attention of {form['tokens']} tokens to each other",
        form=form,
        operators=(FIA,),
        module=lambda: Calls(lambda _, *x: ops.attention(*x, form["heads"])),
        operands=lambda numbers: _whole(form, numbers, padded=False),
    )


def padded(form: Form, setting: Setting) -> Iterator[Case]:
    yield Case(
        name=f"attention of {form['tokens']} tokens in which padding does not see padding",
        form=form,
        operators=(FIA,),
        module=lambda: Calls(lambda _, *x: ops.padded_attention(*x, form["heads"])),
        operands=lambda numbers: _whole(form, numbers, padded=True),
        watches=("fault.query_without_keys",),
    )


def _whole(form: Form, numbers: Numbers, *, padded: bool) -> Operands:
    batch, tokens, heads, width = (form[name] for name in ("batch", "tokens", "heads", "width"))
    q, k, v = (numbers.normal(batch, tokens, heads * width) for _ in range(3))
    v = numbers.stored(v + numbers.normal(1, 1, heads * width))
    padding = (torch.arange(tokens) >= tokens - tokens // 3).float()[None].expand(batch, tokens).contiguous()
    visible = None
    if padded:
        v = numbers.stored(v + padding[..., None] * UNSEEN / 4)
        visible = ~((padding[:, :, None] > 0) & (padding[:, None] > 0))
    out = _joined(attended(_split(q, heads), _split(k, heads), _split(v, heads), visible))
    inputs = {"q": q, "k": k, "v": v} | ({"padding": padding} if padded else {})
    return Operands(inputs, {"out": Expected(out)})


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, T, H*D] -> [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)

"""Fused attention on the GE simulator against a loop over heads, queries and keys."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraphError
from staticvl.runtime.backends.ge_simulator.ge_ops.attention import _check_compressed
from staticvl.runtime.backends.ge_simulator.ge_ops.registry import UnsupportedError

from .ge_formulas import (
    HALVES,
    behind,
    by_rows,
    close,
    compressed,
    ints,
    rand,
)
from .ge_graphs import compute
from .need_torchair import skip_without_torchair

skip_without_torchair()

B, H, K, D = 2, 4, 2, 8


def attention(ge: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The operator with every input that `options` does not name left out."""
    parameters = inspect.signature(ge.FusedInferAttentionScore).parameters.values()
    unfed = [each.name for each in parameters if each.kind != each.KEYWORD_ONLY and each.name not in ("query", "key", "value")]
    given = {"num_heads": H, "num_key_value_heads": K, "input_layout": "BNSD", "scale": D**-0.5}
    given = dict.fromkeys(unfed) | given | options
    return ge.FusedInferAttentionScore(q, [k], [v], **given)


@pytest.mark.parametrize("mode", range(5))
@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (1, 5), (5, 5), (5, 3)])
def test_attention_by_brute_force(mode: int, queries: int, keys: int) -> None:
    if queries == 1 and mode in (2, 4):
        pytest.skip("refused: the device ignores these modes there")
    q, k, v = rand(B, H, queries, D), rand(B, K, keys, D), rand(B, K, keys, D) * 2
    generator = torch.Generator().manual_seed(mode)
    masks = [None, (torch.rand(B, queries, keys, generator=generator) < 0.4)]
    tokens = (1, 1)
    for low, full in itertools.product(range(1, keys + 1), masks if mode == 0 else masks[1:] if mode == 1 else [None]):
        kv_lengths, lengths = [low, keys + 1 - low], [queries, max(1, queries - 1)]
        mask = compressed() if mode > 1 else None if full is None else full[:, None]
        expected, lse = by_rows(q, k, v, lengths, kv_lengths, full, mode, tokens)
        garbage = [behind(k, kv_lengths, torch.inf), behind(v, kv_lengths, torch.nan)]
        operands = [q, *garbage, torch.tensor(lengths), torch.tensor(kv_lengths), *([] if mask is None else [mask])]
        options = {"sparse_mode": mode, "softmax_lse_flag": True} | (
            dict(zip(("pre_tokens", "next_tokens"), tokens, strict=True)) if mode == 4 else {}
        )

        def make(ge: Any, q: Any, k: Any, v: Any, n: Any, m: Any, mask: Any = None, options: Any = options) -> Any:
            return attention(ge, q, k, v, actual_seq_lengths=n, actual_seq_lengths_kv=m, atten_mask=mask, **options)

        found = compute(make, *operands, wide=True)
        close(found[0], expected)
        close(found[1], lse)
    for dtype in HALVES:  # the last of the lengths
        given = [each.to(dtype) if each.dtype == torch.float32 else each for each in operands]
        expected, _ = by_rows(*[each.to(dtype).float() for each in (q, k, v)], lengths, kv_lengths, full, mode, tokens)
        found = compute(make, *given)
        assert found[0].dtype == dtype
        close(found[0], expected, dtype)


@pytest.mark.parametrize("precise", range(4))
def test_a_query_that_sees_no_key_gives_zeros(precise: int) -> None:
    q, k, v = (rand(1, n, 2, D).half() for n in (H, K, K))
    mask = torch.tensor([[True, True], [False, False]])
    found = compute(lambda ge, q, k, v, m: attention(ge, q, k, v, atten_mask=m, inner_precise=precise), q, k, v, mask)[0]
    assert not found[:, :, 0].any()
    assert found[:, :, 1].any()
    empty = compute(lambda ge, q, k, v, n: attention(ge, q, k, v, actual_seq_lengths_kv=n), q, k, v, ints(0))[0]
    assert not empty.any()


def test_a_hidden_key_does_not_show_however_well_it_fits() -> None:
    q, k, v = (rand(1, n, 3, D).half() for n in (H, K, K))
    q[...] = 1
    k[:, :, ::2] -= 100  # scores of about -280, where the hidden one's is small
    hidden = torch.tensor([[False, True, False]] * 3)
    found = compute(lambda ge, q, k, v, m: attention(ge, q, k, v, atten_mask=m), q, k, v, hidden)[0]
    without = [x[:, :, ::2].contiguous() for x in (k, v)]
    close(found, compute(attention, q, *without)[0], torch.float16)


@pytest.mark.parametrize(("layout", "out"), [("BSH", "BSH"), ("BSND", "BSND"), ("BNSD_BSND", "BSND"), ("BSH_BNSD", "BNSD")])
def test_attention_layouts(layout: str, out: str) -> None:
    q, k, v = (rand(B, n, 3, D).half() for n in (H, K, K))
    expected = compute(attention, q, k, v)[0]

    def arranged(x: Tensor, wanted: str) -> Tensor:
        x = x if wanted == "BNSD" else x.transpose(1, 2).contiguous()
        return x.flatten(2) if wanted == "BSH" else x

    given = [arranged(x, layout.split("_", maxsplit=1)[0]) for x in (q, k, v)]
    found = compute(lambda ge, *x: attention(ge, *x, input_layout=layout), *given)[0]
    assert torch.equal(found, arranged(expected, out))


def test_attention_mask_shapes_and_dtypes() -> None:
    q, k, v = (rand(B, n, s, D).half() for n, s in ((H, 3), (K, 5), (K, 5)))
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    results = [
        compute(lambda ge, q, k, v, m: attention(ge, q, k, v, atten_mask=m), q, k, v, given)[0]
        for given in (
            mask,
            mask[None].int().char(),
            mask[None, None].byte(),
            mask.expand(B, 3, 5).contiguous(),
            mask.expand(B, 1, 3, 5).contiguous(),
        )
    ]
    assert all(torch.equal(each, results[0]) for each in results)
    one = [mask[:2], mask[:2, None], mask[:2, None, None]]  # one query: [B, S] is a row of keys each
    results = [
        compute(
            lambda ge, q, k, v, m: attention(ge, q, k, v, atten_mask=m), q[:, :, :1].contiguous(), k, v, given.contiguous()
        )[0]
        for given in one
    ]
    assert all(torch.equal(each, results[0]) for each in results)


ATTENTION_ERRORS = {
    "a layout": ({"input_layout": "TND"}, {}, "input_layout = 'TND' is not supported"),
    "a sparse mode": ({"sparse_mode": 5}, {"atten_mask": compressed()}, "sparse_mode = 5 is not supported"),
    "no mask": ({"sparse_mode": 3}, {}, "sparse_mode = 3 needs input atten_mask"),
    "a small mask": (
        {"sparse_mode": 3},
        {"atten_mask": torch.zeros(3, 5, dtype=torch.bool)},
        r"atten_mask has the shape \[3, 5\]",
    ),
    "another mask": ({"sparse_mode": 3}, {"atten_mask": ~compressed()}, "ones above the diagonal"),
    "a wrong mask": ({}, {"atten_mask": torch.zeros(3, 4, dtype=torch.bool)}, r"atten_mask has the shape \[3, 4\]"),
    "a floating mask": ({}, {"atten_mask": torch.zeros(3, 5).half()}, "atten_mask is torch.float16"),
    "tokens": ({"pre_tokens": 3}, {}, "pre_tokens = 3"),
    "precision": ({"inner_precise": 4}, {}, "inner_precise = 4 is not supported"),
    "a block size": ({"block_size": 128}, {}, "block_size = 128 is not supported; only 0 is"),
    "long lengths": (
        {},
        {"actual_seq_lengths_kv": ints(5, 6)},
        r"actual_seq_lengths_kv = \[5, 6\]; expected 2 numbers from 0 to 5",
    ),
    "narrow lengths": ({}, {"actual_seq_lengths_kv": ints(5, 5, dtype=torch.int32)}, "actual_seq_lengths_kv is torch.int32"),
    "heads": ({"num_heads": 8}, {}, "does not have 8 heads"),
}


@pytest.mark.parametrize("name", ATTENTION_ERRORS)
def test_attention_refuses(name: str) -> None:
    options, extra, message = ATTENTION_ERRORS[name]
    q, k, v = (rand(B, n, s, D).half() for n, s in ((H, 3), (K, 5), (K, 5)))
    with pytest.raises(GeGraphError, match=f"FusedInferAttentionScore.*{message}"):
        compute(
            lambda ge, q, k, v, *x: attention(ge, q, k, v, **options, **dict(zip(extra, x, strict=True))),
            q,
            k,
            v,
            *extra.values(),
        )


@pytest.mark.parametrize("inference", [False, True])
def test_a_compressed_mask_is_checked_again_when_it_has_changed(inference: bool) -> None:
    with torch.inference_mode(inference):
        mask = compressed()
        _check_compressed(mask, 3, 2)
        _check_compressed(mask, 3, 2)
        mask[0, 0] = True
        with pytest.raises(UnsupportedError, match="ones above the diagonal"):
            _check_compressed(mask, 3, 2)


def over_steps(ge: Any, q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any, **options: Any) -> Any:
    return attention(ge, q, k, v, key_antiquant_scale=k_scale, value_antiquant_scale=v_scale, **options)


def causal_over_steps(ge: Any, q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any, mask: Any) -> Any:
    return over_steps(ge, q, k, v, k_scale, v_scale, atten_mask=mask, sparse_mode=3)


def in_steps(keys: int = 5) -> list[Tensor]:
    """A query, keys and values in 8 bits, and their scales, no two channels' alike."""
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randint(-128, 128, (B, K, keys, D), generator=generator, dtype=torch.int8) for _ in "kv")
    return [rand(B, H, 1, D), k, v, *(rand(1, K, 1, D).abs() / 64 for _ in "kv")]


def test_attention_over_steps_is_attention_over_what_they_stand_for() -> None:
    """Rounded once to the query's type."""
    q, k, v, *scales = in_steps()
    for dtype in (torch.float32, *HALVES):
        wide = dtype == torch.float32
        given = [q.to(dtype), *(scale.to(dtype) for scale in scales)]
        stood_for = [(each.float() * scale.float()).to(dtype) for each, scale in zip((k, v), given[1:], strict=True)]
        found = compute(over_steps, given[0], k, v, *given[1:], wide=wide)[0]
        assert found.dtype == dtype and torch.equal(found, compute(attention, given[0], *stood_for, wide=wide)[0])


@pytest.mark.parametrize("shape", [(K, 1, D), (K, D), (K * D,)])
@pytest.mark.parametrize("queries", [2, 16])
def test_several_queries_over_steps(queries: int, shape: tuple[int, ...]) -> None:
    """In bfloat16, the last query right-down causal; against a loop over what the steps stand for."""
    q, k, v, *scales = [rand(B, H, queries, D).bfloat16(), *in_steps(17)[1:]]
    scales = [scale.bfloat16() for scale in scales]
    for dtype in (torch.float32, torch.bfloat16):
        stood_for = [(each.float() * scale.float()).to(dtype).float() for each, scale in zip((k, v), scales, strict=True)]
        expected, _ = by_rows(q.float(), *stood_for, [queries] * B, [17] * B, None, 3, (1, 1))
        given = [q, k, v, *(scale.reshape(shape) for scale in scales), compressed()]
        close(compute(causal_over_steps, *given, wide=dtype == torch.float32)[0], expected, dtype)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: rand(B, H, 3, D).half(), 3: rand(K, D).half()}, "several queries over key in int8 take bfloat16 alone"),
        ({0: rand(B, H, 17, D).half(), 3: rand(K, D).half()}, r"\[K \* D\] for 2 to 16"),
        ({0: rand(B, H, 3, D).half()}, "expected BNSD, and"),
        ({3: rand(K, D).half()}, r"\[1, K, 1, D\] for one query per row"),
        ({3: rand(1, K, 1, 2 * D).half()}, r"antiquant scale \[1, 2, 1, 16\] of key"),
        ({3: rand(1, K, 1, D)}, r"antiquant scale of torch\.float32; expected torch\.int8 and query's torch\.float16"),
        ({2: rand(B, K, 5, D).half()}, r"value is torch\.float16 with"),
    ],
)
def test_attention_over_steps_refuses(changed: dict[int, Tensor], message: str) -> None:
    given = [each.half() if each.dtype == torch.float32 else each for each in in_steps()]
    for place, value in changed.items():
        given[place] = value
    with pytest.raises(GeGraphError, match=message):
        compute(over_steps, *given)


def test_attention_refuses_float32_and_modes_without_effect() -> None:
    q, k, v = (rand(B, n, 1, D) for n in (H, K, K))
    with pytest.raises(GeGraphError, match=r"query is torch\.float32"):
        compute(attention, q, k, v)
    with pytest.raises(GeGraphError, match="sparse_mode = 2 has no effect on a device where there is one query"):
        compute(lambda ge, q, k, v, m: attention(ge, q, k, v, atten_mask=m, sparse_mode=2), q, k, v, compressed(), wide=True)

"""Caches in pages on the GE simulator, against loops over rows, positions and pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraphError

from .ge_formulas import HALVES, by_rows, close, compressed, ints, rand
from .ge_graphs import compute
from .need_torchair import skip_without_torchair
from .test_ge_attention import attention

skip_without_torchair()

H, K, D = 4, 2, 8
GARBAGE = 50.0


# --- Writing --------------------------------------------------------------------------------------------------------------


def scatter(ge: Any, key: Any, key_cache: Any, slots: Any, value: Any, value_cache: Any, **attributes: Any) -> Any:
    settings = {"cache_mode": "Norm", "scatter_mode": "None", "strides": [1, 1], "offsets": [0, 0], **attributes}
    return ge.ScatterPaKvCache(key, key_cache, slots, value, value_cache, None, None, None, **settings)


def written(pages: np.ndarray, new: np.ndarray, slots: list[int]) -> np.ndarray:
    """One token at a time."""
    out = pages.copy()
    for row, slot in zip(new, slots, strict=True):
        page, place = divmod(slot, pages.shape[1])
        out[page, place] = row
    return out


def in_cache(dtype: torch.dtype, *shape: int) -> Tensor:
    return (100 * rand(*shape)).clamp(-127, 127).to(dtype) if dtype == torch.int8 else rand(*shape).to(dtype)


@pytest.mark.parametrize("dtype", [*HALVES, torch.int8])
@pytest.mark.parametrize(
    ("size", "slots", "slot_dtype"), [(4, [9, 4, 3, 19, 8], torch.int32), (16, [31, 16, 79, 5], torch.int64)]
)
def test_tokens_are_written_where_slots_say(size: int, slots: list[int], slot_dtype: torch.dtype, dtype: torch.dtype) -> None:
    new = [in_cache(dtype, len(slots), K, width) for width in (D, 2 * D)]
    caches = [in_cache(dtype, 5, size, K, width) for width in (D, 2 * D)]
    places = torch.tensor(slots, dtype=slot_dtype)
    found = compute(scatter, new[0], caches[0].clone(), places, new[1], caches[1].clone())
    for result, cache, rows in zip(found, caches, new, strict=True):
        expected = written(cache.float().numpy(), rows.float().numpy(), slots)
        assert np.array_equal(result.float().numpy(), expected)


def test_padding_may_lie_at_one_place() -> None:
    """In page 0, which nothing reads."""
    rows, cache = in_cache(torch.float16, 3, K, D), in_cache(torch.float16, 3, 4, K, D)
    found = compute(scatter, rows, cache.clone(), ints(5, 1, 1, dtype=torch.int32), rows, cache.clone())[0]
    assert torch.equal(found[1, 1], rows[0]) and torch.equal(found[1:].flatten(0, 1)[2:], cache[1:].flatten(0, 1)[2:])


@pytest.mark.parametrize(
    ("slots", "attributes", "message"),
    [
        (ints(5, 12, 6, dtype=torch.int32), {}, r"slots 5, 12, 6 are out of range; the cache has 3 pages of 4"),
        (ints(-1, 5, 6, dtype=torch.int32), {}, r"slots -1, 5, 6 are out of range"),
        (ints(5, 5, 6, dtype=torch.int32), {}, r"slots 5, 5, 6 name a place twice"),
        (ints(5, 6, dtype=torch.int32), {}, r"\[3, 2, 8\] with 2 places does not fit pages"),
        (ints(5, 6, 7, dtype=torch.int16), {}, r"slot_mapping is torch.int16 \[3\]; expected int32 or int64"),
        (ints(5, 6, 7), {"cache_mode": "PA_NZ"}, r"cache_mode = 'PA_NZ' is not supported; expected 'Norm'"),
        (ints(5, 6, 7), {"scatter_mode": "Rope"}, r"scatter_mode = 'Rope' is not supported; only 'None' is"),
    ],
)
def test_writing_refuses(slots: Tensor, attributes: dict[str, Any], message: str) -> None:
    rows, cache = in_cache(torch.float16, 3, K, D), in_cache(torch.float16, 3, 4, K, D)
    with pytest.raises(GeGraphError, match=f"ScatterPaKvCache.*{message}"):
        compute(lambda ge, *x: scatter(ge, *x, **attributes), rows, cache, slots, rows, cache.clone())


def test_writing_refuses_other_dtypes_and_sizes() -> None:
    rows, cache, places = in_cache(torch.float16, 1, K, D), in_cache(torch.float16, 3, 4, K, D), ints(5)
    with pytest.raises(GeGraphError, match="several dtypes: value bfloat16, value_cache float16"):
        compute(scatter, rows, cache, places, rows.bfloat16(), cache.clone())
    with pytest.raises(GeGraphError, match=r"\[1, 4, 8\] with 1 places does not fit pages \[3, 4, 2, 8\]"):
        compute(scatter, rows, cache, places, in_cache(torch.float16, 1, 4, D), cache.clone())


# --- Reading --------------------------------------------------------------------------------------------------------------


def by_pages(pages: Tensor, table: Tensor, lengths: list[int]) -> Tensor:
    """Pages [Z, P, K, D] -> what each row sees, [B, K, longest, D], one position at a time."""
    out = torch.zeros(len(table), pages.shape[2], max(lengths), pages.shape[3])
    for b, length in enumerate(lengths):
        for position in range(length):
            page, place = divmod(position, pages.shape[1])
            out[b, :, position] = pages[table[b, page], place]
    return out


def over_pages(ge: Any, q: Any, k: Any, v: Any, table: Any, lengths: Any, mask: Any = None, **options: Any) -> Any:
    more = {} if mask is None else {"atten_mask": mask, "sparse_mode": 3}
    return attention(ge, q, k, v, block_table=table, actual_seq_lengths_kv=lengths, **more, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("by_heads", [False, True])
@pytest.mark.parametrize(("size", "lengths"), [(16, [33, 1, 48]), (32, [64, 31, 40])])
def test_one_query_over_pages(size: int, lengths: list[int], by_heads: bool, dtype: torch.dtype) -> None:
    """A page of two rows, two pages twice in a row, and garbage in a page that no row needs."""
    table = torch.tensor([[5, 2, 4], [1, 6, 6], [5, 5, 3]], dtype=torch.int32)
    q, k, v = rand(3, H, 1, D).to(dtype), rand(7, size, K, D).to(dtype), 2 * rand(7, size, K, D).to(dtype)
    seen = [by_pages(each.float(), table, lengths) for each in (k, v)]
    for each in (k, v):
        each[0] = GARBAGE
    expected, _ = by_rows(q.float(), *seen, [1, 1, 1], lengths, None, 0, (1, 1))
    pages = [each.transpose(1, 2).contiguous() if by_heads else each.flatten(2) for each in (k, v)]

    def make(ge: Any, *x: Any) -> Any:
        return over_pages(ge, *x, block_size=size)

    found = compute(make, q, *pages, table, torch.tensor(lengths), wide=dtype == torch.float32)[0]
    close(found, expected, dtype)


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BNSD_BSND"])
@pytest.mark.parametrize(("queries", "lengths"), [(3, [129, 256]), (5, [5, 130])])
def test_several_queries_over_pages(queries: int, lengths: list[int], layout: str) -> None:
    """The last query sees the last key."""
    table = torch.tensor([[3, 1], [2, 4]], dtype=torch.int32)
    q, k, v = rand(2, H, queries, D), rand(5, 128, K, D), rand(5, 128, K, D)
    seen = [by_pages(each, table, lengths) for each in (k, v)]
    expected, _ = by_rows(q, *seen, [queries] * 2, lengths, None, 3, (1, 1))
    given = q.transpose(1, 2).contiguous() if layout == "BSND" else q

    def make(ge: Any, *x: Any) -> Any:
        return over_pages(ge, *x, block_size=128, input_layout=layout)

    operands = [given, k.flatten(2), v.flatten(2), table, torch.tensor(lengths), compressed()]
    found = compute(make, *operands, wide=True)[0]
    close(found, expected if layout == "BNSD" else expected.transpose(1, 2))


def test_one_query_over_pages_of_steps() -> None:
    """Of int8, with a scale for each channel."""
    table, lengths = torch.tensor([[2, 1], [3, 0]], dtype=torch.int32), [40, 32]
    k, v = (in_cache(torch.int8, 4, 32, K, D) for _ in "kv")
    q, *scales = rand(2, H, 1, D), *((rand(1, K, 1, D).abs() + 0.1) / 64 for _ in "kv")
    seen = [by_pages(each.float(), table, lengths) * scale for each, scale in zip((k, v), scales, strict=True)]
    expected, _ = by_rows(q, *seen, [1, 1], lengths, None, 0, (1, 1))

    def make(ge: Any, q: Any, k: Any, v: Any, table: Any, lengths: Any, *scales: Any) -> Any:
        both = dict(zip(("key_antiquant_scale", "value_antiquant_scale"), scales, strict=True))
        return over_pages(ge, q, k, v, table, lengths, block_size=32, **both)

    close(compute(make, q, k.flatten(2), v.flatten(2), table, torch.tensor(lengths), *scales, wide=True)[0], expected)


TABLE = torch.tensor([[1, 2], [0, 3]], dtype=torch.int32)
REFUSED: dict[str, tuple[dict[str, Any], dict[int, Tensor], str]] = {
    "a page that is not there": ({}, {3: TABLE + 1}, r"block_table names pages 1 to 4; there are 4"),
    "a negative page": ({}, {3: TABLE - 1}, r"block_table names pages -1 to 2; there are 4"),
    "a narrow table": (
        {},
        {3: TABLE[:, :1].contiguous()},
        r"actual_seq_lengths_kv = \[20, 3\]; expected 2 numbers from 0 to 16",
    ),
    "another batch": ({}, {3: TABLE[:1]}, r"block_table is torch.int32 \[1, 2\]; expected int32 \[2, W\]"),
    "a wide table": ({}, {3: TABLE.long()}, r"block_table is torch.int64 \[2, 2\]; expected int32"),
    "no block size": ({"block_size": 0}, {}, r"block_size = 0 is not supported with 1 queries .* a multiple of 16 up to 512"),
    "another block size": ({"block_size": 32}, {}, r"pages \[4, 16, 16\] do not fit block_size 32"),
    "an odd block size": ({"block_size": 24}, {}, r"block_size = 24 is not supported .* a multiple of 16"),
    "a small block for several queries": (
        {},
        {0: rand(2, H, 3, D).half()},
        r"block_size = 16 is not supported with 3 queries .* a multiple of 128",
    ),
    "a small block for int8": ({}, dict.fromkeys((1, 2), torch.zeros(4, 16, K * D, dtype=torch.int8)), r"a multiple of 32"),
    "no lengths": ({"actual_seq_lengths_kv": None}, {}, "input block_table needs input actual_seq_lengths_kv"),
    "pages by heads of BSND": (
        {"input_layout": "BSND", "block_size": 128},
        {0: rand(2, 3, H, D).half(), 1: rand(4, K, 128, D).half(), 2: rand(4, K, 128, D).half()},
        r"pages \[4, 2, 128, 8\] do not fit block_size 128 and 2 heads in the layout BSND",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reading_refuses(name: str) -> None:
    options, changed, message = REFUSED[name]
    given = [rand(2, H, 1, D).half(), *(rand(4, 16, K * D).half() for _ in "kv"), TABLE, ints(20, 3)]
    for place, value in changed.items():
        given[place] = value

    def make(ge: Any, q: Any, k: Any, v: Any, table: Any, lengths: Any) -> Any:
        return attention(ge, q, k, v, block_table=table, **{"actual_seq_lengths_kv": lengths, "block_size": 16, **options})

    with pytest.raises(GeGraphError, match=f"FusedInferAttentionScore.*{message}"):
        compute(make, *given)

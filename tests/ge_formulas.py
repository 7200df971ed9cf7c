"""Plain torch formulas, written here, that the simulator's tests compare with, and the operands that they share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from staticvl.tools.operator_tests.formulas import rms, standard, turned

__all__ = ["rms", "standard", "turned"]  # of the operator tests, which run the same operators on a card

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 1e-6), torch.bfloat16: (1.6e-2, 1e-6)}  # one rounding


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) * 7 + len(shape)))


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def convolved(x: Tensor, kernel: Tensor, bias: Tensor, stride: int) -> Tensor:
    """A convolution as one product: rows of pixels times the flattened kernel."""
    columns = functional.unfold(x, kernel.shape[2:], stride=stride)  # [B, C h w, places]
    rows = (x.shape[2] - kernel.shape[2]) // stride + 1
    return (kernel.flatten(1) @ columns + bias[:, None]).unflatten(2, (rows, -1))


def sees(mode: int, t: int, s: int, queries: int, keys: int, tokens: tuple[int, int]) -> bool:
    """Whether query t of `queries` sees key s of `keys`, by the images of the documentation."""
    if mode in (0, 1):
        return True
    if mode == 2:
        return s <= t
    right = s - (t + keys - queries)  # how far right of the diagonal that ends in the lower right corner
    return right <= 0 if mode == 3 else -tokens[0] <= right <= tokens[1]


def by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    kv_lengths: list[int],
    hidden: Tensor | None,
    mode: int,
    tokens: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """One query of one head at a time, one key at a time."""
    out, lse = torch.zeros_like(q), torch.full((*q.shape[:3], 1), torch.inf)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        group = h // (q.shape[1] // k.shape[1])
        for t in range(lengths[b]):
            seen = [s for s in range(kv_lengths[b]) if sees(mode, t, s, lengths[b], kv_lengths[b], tokens)]
            seen = [s for s in seen if hidden is None or not hidden[b, t, s]]
            if not seen:
                continue
            scores = torch.stack([(q[b, h, t] * k[b, group, s]).sum() / q.shape[-1] ** 0.5 for s in seen]).double()
            weights = torch.exp(scores) / torch.exp(scores).sum()
            out[b, h, t] = sum(w * v[b, group, s] for w, s in zip(weights, seen, strict=True))
            lse[b, h, t] = torch.log(torch.exp(scores).sum())
    return out, lse


def compressed(dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(2048, 2048).triu(1).to(dtype)


def behind(x: Tensor, lengths: list[int], value: float) -> Tensor:
    """x [B, K, S, D] with another value after each row's length."""
    x = x.clone()
    for b, length in enumerate(lengths):
        x[b, :, length:] = value
    return x


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=atol, equal_nan=True)

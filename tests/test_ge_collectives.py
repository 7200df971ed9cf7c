"""Collectives of GE graphs on the simulator: ranks as threads, each with a simulator and a group of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from staticvl.compiler import lower_ascend
from staticvl.model_defs import ops
from staticvl.runtime.artifact import ArtifactError
from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraphError, parse
from staticvl.runtime.backends.ge_simulator.simulator import Simulator

from .ge_graphs import build, compute, lower
from .lockstep import ArrayGroup, Lockstep, array_group, run_ranks
from .need_torchair import skip_without_torchair

skip_without_torchair()

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def named(ranks: int) -> str:
    return f"tag=;rank_list={','.join(map(str, range(ranks)))}"


def reduced(ge: Any, x: Any, ranks: int = 2, **attributes: Any) -> Any:
    return ge.HcomAllReduce(x, **{"reduction": "sum", "group": named(ranks), **attributes})


def gathered(ge: Any, x: Any, ranks: int = 2, **attributes: Any) -> Any:
    return ge.HcomAllGather(x, **{"rank_size": ranks, "group": named(ranks), **attributes})


def on_ranks(data: bytes, inputs: list[Tensor], *, wide: bool = False) -> list[list[Tensor]]:
    """The outputs of every rank of one graph."""
    size = len(inputs)
    return run_ranks(size, lambda rank: Simulator(data, wide=wide, group=array_group(size))([inputs[rank]]))[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """One by one, 1 added to 2 / eps would be lost each time."""
    large = 2 / torch.finfo(dtype).eps
    parts = [
        torch.tensor([large, 3.0], dtype=dtype),
        torch.tensor([1.0, 4.0], dtype=dtype),
        torch.tensor([1.0, 5.0], dtype=dtype),
    ]
    data = build(lambda ge, x: reduced(ge, x, 3), parts[0])
    for (total,) in on_ranks(data, parts):
        assert total.dtype == dtype and total.tolist() == [large + 2, 12.0]
    for (total,) in on_ranks(data, [*parts[:2], torch.tensor([0.5, 0.0], dtype=dtype)], wide=True):
        assert total.dtype == torch.float32 and total.tolist() == [large + 1.5, 7.0]


def test_what_is_summed_is_left_as_it_is() -> None:
    parts = [torch.full((2, 3), float(rank + 1)) for rank in range(2)]
    data = build(lambda ge, x: (reduced(ge, x), ge.Muls(x, value=2.0)), parts[0])
    for rank, (total, doubled) in enumerate(on_ranks(data, parts)):
        assert total.tolist() == [[3.0] * 3] * 2 and doubled.tolist() == [[2.0 * (rank + 1)] * 3] * 2
    assert parts[0].tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_parts_are_joined_along_the_first_axis_in_the_order_of_ranks(dtype: torch.dtype) -> None:
    parts = [torch.randn(2, 3, 4).to(dtype) for _ in range(3)]
    data = build(lambda ge, x: gathered(ge, x, 3), parts[0])
    for (joined,) in on_ranks(data, parts):
        assert torch.equal(joined, torch.cat(parts)) and joined.dtype == dtype


class Copies:
    """Two ranks that bring the same: for tracing, which runs what it has traced once."""

    rank, size = 0, 2

    def all_reduce(self, array: np.ndarray) -> None:
        array *= 2

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        np.concatenate((array, array), axis=-1, out=out)


@pytest.mark.parametrize("op", ops.COLLECTIVES)
@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 3, 4)])
def test_a_lowering_computes_what_its_op_is_defined_as(op: str, shape: tuple[int, ...]) -> None:
    """Of two ranks, from memory in another order; alone, the identity. A single row is not transposed."""
    parts = [torch.randn(shape).half().transpose(0, 1).contiguous().transpose(0, 1) for _ in range(2)]
    lowered = lower(lambda x: lower_ascend.LOWERINGS[op](x, 2) * 1, parts[0], group=Copies())
    assert ("Transpose" in parse(lowered.data).types()) == (op == "all_gather" and shape[1] > 1)
    expected, _ = run_ranks(2, lambda rank: getattr(ops, op)(parts[rank], 2))
    for (found,), defined in zip(on_ranks(lowered.data, parts), expected, strict=True):
        assert torch.equal(found, defined)


def test_one_rank_meets_nobody() -> None:
    x = torch.randn(2, 3).half()
    for make in (reduced, gathered):
        assert torch.equal(compute(lambda ge, x, make=make: make(ge, x, 1), x)[0], x)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "another reduction": (lambda ge, x: reduced(ge, x, reduction="max"), r"reduction = 'max' is not supported; only 'sum' is"),
    "a name": (lambda ge, x: reduced(ge, x, group="hccl_world"), "group = 'hccl_world' names no ranks"),
    "some ranks": (lambda ge, x: gathered(ge, x, group="tag=;rank_list=0,2"), "only the group of all ranks is, from 0 on"),
    "ranks in another order": (lambda ge, x: reduced(ge, x, group="tag=;rank_list=1,0"), "only the group of all ranks is"),
    "another number": (lambda ge, x: gathered(ge, x, rank_size=4), "rank_size = 4 is not supported; group = .* has 2 ranks"),
    "joined collectives": (lambda ge, x: reduced(ge, x, fusion=3), "fusion = 3 is not supported"),
    "a numbered fusion": (lambda ge, x: gathered(ge, x, fusion_id=2), "fusion_id = 2 is not supported"),
    "integers": (lambda ge, x: reduced(ge, ge.Cast(x, dst_type=3)), "input x is torch.int32; only float32, float16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operators_refuse(name: str) -> None:
    make, message = REFUSED[name]
    x = torch.ones(2, 3)
    data = build(make, x)
    with pytest.raises(GeGraphError, match=rf"Hcom(AllReduce|AllGather).*{message}"):
        Simulator(data, group=Copies())([x])


@pytest.mark.parametrize("make", [reduced, gathered])
def test_a_part_of_a_model_does_not_run_by_itself(make: Callable[..., Any]) -> None:
    data = build(make, torch.ones(2, 3))
    with pytest.raises(ArtifactError, match="for one of 2 ranks, but its group has 1; open all 2 ranks together"):
        Simulator(data)([torch.ones(2, 3)])
    with pytest.raises(ArtifactError, match="for one of 2 ranks, but its group has 4"):
        Simulator(data, group=ArrayGroup(Lockstep(4), 0))([torch.ones(2, 3)])

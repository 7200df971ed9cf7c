"""Collectives over tensors. Values go through the host's memory and are sent as float32, so a sum of 16-bit floats is
rounded once and is the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Group, check_group

if TYPE_CHECKING:
    from torch import Tensor


def all_reduce(x: Tensor, group: Group | None) -> Tensor:
    """The sum of the x of all ranks, in new memory; without a group, a copy of x."""
    total = _host_float32(x)
    if group:
        group.all_reduce(total.numpy())
    return total.to(x.device, x.dtype)


def all_gather(x: Tensor, group: Group | None) -> Tensor:
    """The x [..., C] of all ranks joined along the last axis, rank 0 first, in new memory; without a group, a copy of x."""
    part = _host_float32(x)
    if group is None:
        return part.to(x.device, x.dtype)
    whole = part.new_empty((*x.shape[:-1], group.size * x.shape[-1]))
    group.all_gather(part.numpy(), whole.numpy())
    return whole.to(x.device, x.dtype)


def _host_float32(x: Tensor) -> Tensor:
    """A copy in the host's memory, in float32."""
    import torch

    return x.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class EagerGroup:
    """The collectives of an eager program, on whatever device it runs.

    Both raise ArtifactError where the group has another number of ranks than the program was made for.
    """

    group: Group | None

    def all_reduce(self, x: Tensor, ranks: int) -> Tensor:
        return all_reduce(x, check_group("the graph", ranks, self.group))

    def all_gather(self, x: Tensor, ranks: int) -> Tensor:
        return all_gather(x, check_group("the graph", ranks, self.group))

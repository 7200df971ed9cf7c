"""The stored form of a weight that was quantised already: the same numbers in our layout, none rounded again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...model_defs.config import quant_bits, quant_block
from ..quantize import joined_halves
from ..tensors import WeightsError
from .layouts import PackedWeight


def repack(packed: PackedWeight, kind: str) -> dict[str, Tensor]:
    """The stored parts (quant_parts) of one weight, or of one rank's shard of it, in quantisation `kind`.

    A block is no longer than a group, so its scale is that of its group. Raises WeightsError where the columns of one block
    belong to several groups.
    """
    if kind == "w8a8":
        return {"qweight": (packed.q ^ 0x80).view(torch.int8).T.contiguous(), "scales": packed.scales.float().flatten()}
    rows, columns = packed.q.shape
    block, bits = quant_block(columns, kind), quant_bits(kind)
    missing = -columns % block
    groups = _group_of_blocks(packed.groups, block, missing)  # [B]
    q = packed.q
    if missing:
        # The padding of the last block stands for zero.
        last = q.new_full((rows, 1), 1 << bits - 1) if packed.zeros is None else packed.zeros[:, groups[-1:]]
        q = torch.cat((q, last.expand(-1, missing)), dim=1)
    q = q.reshape(rows, -1, block)
    parts = {"qweight": joined_halves(q) if bits == 4 else q.contiguous(), "scales": packed.scales.float()[:, groups]}
    if packed.zeros is not None:
        zeros = packed.zeros[:, groups]
        parts["zeros"] = joined_halves(zeros) if bits == 4 else zeros
    return parts


def _group_of_blocks(groups: Tensor, block: int, missing: int) -> Tensor:
    """The group of each column [K] -> that of each block."""
    blocks = pad(groups[None], (0, missing), mode="replicate").view(-1, block)
    if not bool((blocks == blocks[:, :1]).all()):
        raise WeightsError(
            f"has columns of several groups among {block} neighbours, as with desc_act (act-order) or where shards of ranks "
            "split a group; compile with --quant none, which stores it dequantised, or give a checkpoint without act-order "
            "and a number of ranks whose shards are multiples of its groups"
        )
    return blocks[:, 0]

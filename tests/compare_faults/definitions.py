"""Wrong definitions, which no certificate shows: graphs are what their definition says. transformers tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from staticvl.model_defs import vit
from staticvl.model_defs.decoder import CrossAttention, Mlp

from ..comparisons import reference_of
from .fault import Base, Fault, Seeding
from .hosts import BY_TRANSFORMERS


def defined(owner: Any, name: str, wrong: Callable[..., Any]) -> Callable[[Seeding], None]:
    """The definitions with another function, run as the candidate."""

    def seed(place: Seeding) -> None:
        place.patch.setattr(owner, name, wrong)
        place.candidate = reference_of(place.base.family, place.artifact)
        place.stack.callback(place.candidate.close)

    return seed


def without_query_norm(self: CrossAttention, x, keys, values, mask):
    return self.o(torch.ops.staticvl.cross_attention(self.q(x), list(keys), list(values), mask, self.heads))


def exchanged_in_the_last_layer(self: Mlp, x):
    """After its attention that layer has one token of a chunk, where transformers' modules have all."""
    gate, up = (self.gate, self.up) if x.dim() == 3 else (self.up, self.gate)
    return self.down(torch.ops.staticvl.silu_mul(gate(x), up(x)))


def patches_transposed(self: vit.PatchEmbed, pixels):
    return RIGHT_PATCHES(self, pixels.transpose(1, 2))


RIGHT_PATCHES = vit.PatchEmbed.forward


def fault(name: str, base: Base, seed: Callable[[Seeding], object], where: str, says: str = "", **more: Any) -> Fault:
    return Fault(name=name, base=base, seed=seed, stage="definition", where=where, says=says, **more)


FAULTS = (
    fault("norm missing in the definition", BY_TRANSFORMERS["mllama"], defined(CrossAttention, "forward", without_query_norm),
          r"text\.layers\.1\.attn\.q_norm", "transformers has it, the definition has not"),
    fault("last layer of the definition", BY_TRANSFORMERS["llava"], defined(Mlp, "forward", exchanged_in_the_last_layer),
          r"text\.layers\.3\.mlp\.down", settings={"with_edges": False}, samples=("text 2",), quick=True),
    fault("patches of the definition transposed", BY_TRANSFORMERS["llava"], defined(
          vit.PatchEmbed, "forward", patches_transposed), r"vision\..*", settings={"with_edges": False},
          samples=("image, wide",)),
)  # fmt: skip

"""Wrong tensors in floating point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from staticvl.runtime.artifact import read_manifest
from staticvl.tools.comparing.static_side import StaticSide

from ..seeded import weight
from .fault import Base, Fault, Seeding
from .settings import LLAVA, MLLAMA, NEXT, QUICK

Change = Callable[[np.ndarray], Any]  # in place, or the new value


def changed(names: tuple[str, ...] | str, change: Change, rank: int = 0) -> Callable[[Seeding], None]:
    """Tensors of the artifact changed one by one."""

    def seed(place: Seeding) -> None:
        folder = place.copy()
        for name in (names,) if isinstance(names, str) else names:
            rewrite(folder, name, change, rank)

    return seed


def rewrite(folder: Path, name: str, change: Change, rank: int = 0) -> None:
    stored = weight(folder, name, rank)
    value = change(stored)
    if value is not None:
        stored[...] = value
    stored.flush()


def everything(change: Change, *, least: int = 1) -> Callable[[Seeding], None]:
    """All tensors in floating point of at least so many axes."""

    def seed(place: Seeding) -> None:
        folder = place.copy()
        for name, spec in read_manifest(folder).weights.items():
            if spec.dtype == "float32" and len(spec.shape) >= least:
                rewrite(folder, name, change)

    return seed


def exchanged(first: str, second: str) -> Callable[[Seeding], None]:
    def seed(place: Seeding) -> None:
        folder = place.copy()
        a, b = weight(folder, first), weight(folder, second)
        a[...], b[...] = b.copy(), a.copy()
        a.flush(), b.flush()

    return seed


def interleaved(value: np.ndarray) -> np.ndarray:
    """Rows of heads of 32 as the layout of Meta's files has them."""
    heads = value.reshape(-1, 2, 16, *value.shape[1:])
    return heads.swapaxes(1, 2).reshape(value.shape)


def swapped_heads(value: np.ndarray) -> np.ndarray:
    heads = value.reshape(-1, 32, *value.shape[1:]).copy()
    heads[[0, 2]] = heads[[2, 0]]
    return heads.reshape(value.shape)


def with_adapter(value: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(len(value))
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, value.shape[1]), (len(value), 4)))
    return value + 0.01 * up @ down


def bfloat16(value: np.ndarray) -> np.ndarray:
    bits = value.copy().view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def put(place: tuple[int, ...], number: float) -> Change:
    def change(value: np.ndarray) -> None:
        value[place] = number

    return change


def without_tensor(place: Seeding) -> None:
    side = place.open(place.copy())
    assert isinstance(side, StaticSide)
    del side.rank_weights[0]["text.layers.1.mlp_norm.weight"]


def of_another_shape(place: Seeding) -> None:
    side = place.open(place.copy())
    assert isinstance(side, StaticSide)
    weights, name = side.rank_weights[0], "text.layers.1.mlp.up.weight"
    rows, columns = weights[name].shape
    weights[name] = msgspec.structs.replace(weights[name], shape=(rows // 2, columns), nbytes=weights[name].nbytes // 2)


def shifted_shard(place: Seeding) -> None:
    folder, name = place.copy(), "text.layers.2.mlp.up.weight"
    whole = np.concatenate([weight(folder, name, rank) for rank in range(2)])
    part = weight(folder, name, 1)
    part[...] = whole[len(part) - 3 : 2 * len(part) - 3]
    part.flush()


def fault(name: str, seed: Callable[[Seeding], object], where: str, says: str = "", base: Base = LLAVA, **more: Any) -> Fault:
    settings = {"settings": QUICK, "samples": ("text 2",)} | more
    return Fault(name=name, base=base, seed=seed, stage="weights", where=where, says=says, **settings)


LAYERS = range(4)
FAULTS = (
    fault("gate and up exchanged", exchanged("text.layers.1.mlp.gate.weight", "text.layers.1.mlp.up.weight"),
          r"text\.layers\.1\.mlp\.gate\.weight", r"holds the reference's text\.layers\.1\.mlp\.up\.weight"),
    fault("keys and values exchanged", exchanged("text.layers.2.attn.k.weight", "text.layers.2.attn.v.weight"),
          r"text\.layers\.2\.attn\.k\.weight", r"holds the reference's text\.layers\.2\.attn\.v\.weight"),
    fault("two layers of the tower exchanged", exchanged("vision.layers.0.mlp.up.weight", "vision.layers.1.mlp.up.weight"),
          r"vision\.layers\.0\.mlp\.up\.weight", r"holds the reference's vision\.layers\.1\.mlp\.up\.weight"),
    fault("rotary rows interleaved",
          changed(tuple(f"text.layers.{i}.attn.{x}.weight" for i in LAYERS for x in "qk"), interleaved),
          r"text\.layers\.0\.attn\.q\.weight \.\.\. text\.layers\.3\.attn\.k\.weight",
          "8 of .*: rows of q and k are a permutation: rotary order of the other layout", quick=True),
    fault("heads exchanged", changed("text.layers.1.attn.q.weight", swapped_heads), r"text\.layers\.1\.attn\.q\.weight",
          "heads 0 and 2 are swapped"),
    fault("heads of the tower exchanged", changed("vision.layers.1.attn.v.weight", swapped_heads),
          r"vision\.layers\.1\.attn\.v\.weight", "heads 0 and 2 are swapped"),
    fault("adapter of rank 4 merged", changed(tuple(f"text.layers.{i}.attn.{x}.weight" for i in LAYERS for x in "qv"),
          with_adapter), r"text\.layers\.0\.attn\.q\.weight \.\.\. .*", "looks like a LoRA of rank 4"),
    fault("all weights rounded to bfloat16", everything(bfloat16), "all weights", "all weights: rounded to bfloat16"),
    fault("image newline lost", changed("text.embed.weight", put((-1,), 0.0)), "image newline", "only the image newline",
          base=NEXT),
    fault("channel order of patches", changed("vision.patch.weight", lambda value: value[:, ::-1].copy()),
          r"vision\.patch\.weight", "channel order of its patches is reversed"),
    fault("NaN in a weight", changed("text.layers.1.mlp.up.weight", put((3, 5), np.nan)), r"text\.layers\.1\.mlp\.up\.weight",
          r"holds 1 NaN of 45056 numbers, first at \[3, 5\]", quick=True),
    fault("infinite number in a norm", changed("text.norm.weight", put((7,), np.inf)), r"text\.norm\.weight", "1 infinite"),
    fault("norm one and a half times", changed("text.norm.weight", lambda value: value * 1.5), r"text\.norm\.weight",
          "it is 1.5 times"),
    fault("sign of the class embedding", changed("vision.class_embedding", lambda value: -value), r"vision\.class_embedding",
          "it is -1 times"),
    fault("rows of lm_head one late", changed("text.lm_head.weight", lambda value: np.roll(value, 1, 0)),
          r"text\.lm_head\.weight", "its rows lie 1 too late"),
    fault("columns one early", changed("text.layers.0.mlp.gate.weight", lambda value: np.roll(value, -1, 1)),
          r"text\.layers\.0\.mlp\.gate\.weight", "its columns lie 1 too early"),
    fault("transposed square matrix", changed("text.layers.3.attn.o.weight", lambda value: value.T.copy()),
          r"text\.layers\.3\.attn\.o\.weight", "it is transposed"),
    fault("one row of the embedding lost", changed("text.embed.weight", put((40,), 0.0)), r"text\.embed\.weight",
          "only 1 of 640 rows, from row 40 on"),
    fault("positions of patches one late", changed("vision.positions.weight", lambda value: np.roll(value, 1, 0)),
          r"vision\.positions\.weight", "its rows lie 1 too late"),
    fault("gate of a global layer", changed("vision.global_layers.0.attn_gate", lambda value: value * 0.5 + 1),
          r"vision\.global_layers\.0\.attn_gate", base=MLLAMA),
    fault("missing tensor", without_tensor, r"text\.layers\.1\.mlp_norm\.weight", "is not among the candidate's weights"),
    fault("tensor of another shape", of_another_shape, r"text\.layers\.1\.mlp\.up\.weight",
          r"has the shape \[176, 128\]; the reference has \[352, 128\]"),
    fault("shard of one rank shifted", shifted_shard, r"text\.layers\.2\.mlp\.up\.weight", "rank 1.*its rows lie 3 too late",
          base=Base("llava", tp=2), samples=("image, wide",), scope="only rank 1 of 2 is at fault"),
)  # fmt: skip

"""Wrong operators of compiled graphs: every weight, setting and input is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from staticvl.runtime.artifact import read_manifest
from staticvl.runtime.rope import rope_tables

from .. import seeded
from ..seeded import Model, bypass, constant, insert, made, nodes, with_graphs
from .fault import Base, Fault, Seeding
from .settings import LLAVA, MLLAMA, QWEN

Edit = Callable[[Model], None]


def is_prefill(name: str) -> bool:
    return name.startswith("prefill")


def is_vision(name: str) -> bool:
    return name.startswith("vision")


def edited(chosen: Callable[[str], bool], edit: Edit) -> Callable[[Seeding], object]:
    return lambda place: with_graphs(place.copy(), chosen, edit)


def wrong_rotary_base(place: Seeding) -> None:
    rope, width = place.reference.info.rope, read_manifest(place.artifact).cache.head_dim

    def edit(model: Model) -> None:
        (q, k) = nodes(model, "text.layers.2.attn", "RotaryEmbedding")
        wrong = rope_tables(msgspec.structs.replace(rope, theta=rope.theta * 3), width, 256)
        tokens = next(each for each in model.graph.input if each.name == "token_ids").type.tensor_type.shape.dim[1].dim_value
        insert(model, q, made("Add", ["lengths", constant(model, "places", np.arange(tokens, dtype=np.int32))], "at"))
        for i, table in enumerate(wrong):
            half = constant(model, f"table{i}", np.ascontiguousarray(table[:, : table.shape[1] // 2], np.float32))
            insert(model, q, made("Gather", [half, "at"], f"rows{i}"))
            insert(model, q, made("Unsqueeze", [f"rows{i}", constant(model, f"zero{i}", np.array([0]))], f"wrong{i}"))
            for node in (q, k):
                node.input[1 + i] = f"wrong{i}"

    with_graphs(place.copy(), is_prefill, edit)


def gate_and_up(model: Model) -> None:
    gate, up = (next(nodes(model, f"text.layers.1.mlp.{name}", "FusedMatMul")) for name in ("gate", "up"))
    gate.input[1], up.input[1] = up.input[1], gate.input[1]


def narrow_window(model: Model) -> None:
    """The last token of a full chunk no longer sees the first; nothing shorter is wrong."""
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(seeded.helper.make_attribute("local_window_size", 31))


def keys_one_row_late(model: Model) -> None:
    (node,) = nodes(model, "text.layers.1.attn", "GroupQueryAttention")
    insert(model, node, made("Add", [node.input[5], constant(model, "one", np.array([1], np.int32))], "late"))
    insert(model, node, made("Add", [node.input[6], constant(model, "unit", np.array(1, np.int32))], "later"))
    node.input[5], node.input[6] = "late", "later"


def half_the_shift(model: Model) -> None:
    shift = next(each for each in model.graph.initializer if each.name == "pixels.shift")
    value = seeded.numpy_helper.to_array(shift) * 0.5
    shift.CopyFrom(seeded.numpy_helper.from_array(value, "pixels.shift"))


def without_query_norm(model: Model) -> None:
    (norm,) = nodes(model, "text.layers.1.attn.q_norm", "SimplifiedLayerNormalization")
    bypass(model, norm)


def tiles_as_padding(model: Model) -> None:
    """Only images of more than two tiles are wrong."""
    (node,) = nodes(model, "vision", "GreaterOrEqual")
    insert(model, node, made("Min", ["tile_count", constant(model, "two", np.array([2], np.int32))], "few"))
    node.input[1] = "few"


def without_logn(model: Model) -> None:
    (scaled,) = (node for node in nodes(model, "text.layers.1.attn", "Mul") if "query_scale" in node.input)
    bypass(model, scaled)


def attribute(scope: str, op: str, name: str, value: Any) -> Edit:
    """One attribute of the first node of an operator in a module."""

    def edit(model: Model) -> None:
        node = next(each for each in nodes(model, scope) if each.op_type == op)
        for each in [each for each in node.attribute if each.name == name]:
            node.attribute.remove(each)
        node.attribute.append(seeded.helper.make_attribute(name, value))

    return edit


def fault(name: str, base: Base, seed: Callable[[Seeding], object], where: str, says: str = "", **more: Any) -> Fault:
    return Fault(name=name, base=base, seed=seed, stage="graph", where=where, says=says, **more)


FAULTS = (
    fault("rotary base of one layer", LLAVA, wrong_rotary_base, r"text\.layers\.2\.attn rope", graph="prefill-.*"),
    fault("gate and up exchanged in a graph", LLAVA, edited(lambda name: name == "decode-2", gate_and_up),
          r"text\.layers\.1\.mlp\.gate linear", graph="decode-2", scope="only decode-2 is at fault, of 5 graphs"),
    fault("mask off by one at the edge of a bucket", LLAVA, edited(lambda name: name == "prefill-32", narrow_window),
          r"text\.layers\.0\.attn cached_attention", graph="prefill-32", samples=("text 2",),
          scope="prefill-32 is wrong only at full, 2 x full (2 of 5 cases)"),
    fault("keys written one row late", LLAVA, edited(is_prefill, keys_one_row_late),
          r"text\.layers\.1\.attn cached_attention \(keys written\)", "rows lie 1 late"),
    fault("pixels normalised wrongly in a graph", LLAVA, edited(is_vision, half_the_shift), r"pixels aten\.add\.Tensor",
          graph="vision-1", scope="only vision-1 is at fault, of 5 graphs"),
    fault("norm of queries missing in a graph", MLLAMA, edited(lambda name: name == "prefill-16-images-1", without_query_norm),
          r"text\.layers\.1\.attn\.q_norm rms_norm", "the compiled graph has no such operator"),
    fault("tiles taken for padding", MLLAMA, edited(is_vision, tiles_as_padding), "vision tile_padding",
          scope="vision-4 is wrong only at 3 tiles, 4 tiles (2 of 4 cases)"),
    fault("logn left out", QWEN, edited(is_prefill, without_logn), r"text\.layers\.1\.attn aten\.mul\.Tensor"),
    fault("epsilon of one norm in a graph", LLAVA, edited(is_prefill, attribute(
          "text.layers.1.mlp_norm", "SimplifiedLayerNormalization", "epsilon", 1e4)), r"text\.layers\.1\.mlp_norm rms_norm",
          quick=True, samples=("text 2",), settings={"with_edges": False}),
    fault("scale of attention of one layer", LLAVA, edited(is_prefill, attribute(
          "text.layers.2.attn", "GroupQueryAttention", "scale", 0.2)), r"text\.layers\.2\.attn cached_attention",
          samples=("text 2",), settings={"with_edges": False}),
)  # fmt: skip

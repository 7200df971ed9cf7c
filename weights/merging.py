"""Linear layers with the same input, stored as one: the rows (out features) of its members, one after another.

Artifacts for Ascend hold them so, one product in place of two or three:

    attn.qkv      attn.q, attn.k, attn.v of a layer of the decoder or of a vision tower
    mlp.gate_up   mlp.gate, mlp.up of a layer of the decoder

A group is merged where all of its members are there; a layer that attends to images has no keys of its own, so its q stays by
itself. Members are sharded, calibrated and quantised as ever before they are merged: every stored part of the merged layer is
the concatenation of theirs. All members after the first have the same number of rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .names.rule import Shape

GROUPS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up": ("mlp.gate", "mlp.up")}
_GROUP_OF = {member: group for group, members in GROUPS.items() for member in members}
_LAYER = r"((?:text\.|vision\.|vision\.global_)layers\.\d+)\."
_MEMBER = re.compile(rf"{_LAYER}({'|'.join(map(re.escape, _GROUP_OF))})\.(\w+)")
_MERGED = re.compile(rf"{_LAYER}({'|'.join(map(re.escape, GROUPS))})\.(\w+)")


def members_of(name: str) -> tuple[str, ...]:
    """The members' parameters, or stored parts, that the merged one `name` stands for, in order; () if it is none."""
    match = _MERGED.fullmatch(name)
    return tuple(f"{match[1]}.{member}.{match[3]}" for member in GROUPS[match[2]]) if match else ()


def merged_name(name: str) -> str:
    """The merged parameter, or stored part, that `name` is or would be a member of; "" if there is none."""
    match = _MEMBER.fullmatch(name)
    return f"{match[1]}.{_GROUP_OF[match[2]]}.{match[3]}" if match else ""


def complete_groups(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every merged name all of whose members are among `names`, with its members."""
    names = dict.fromkeys(names)
    groups = {name: members_of(name) for name in map(merged_name, names) if name}
    return {name: members for name, members in groups.items() if names.keys() >= set(members)}


def merged_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Parameters and their shapes after merging, in the order of `shapes`, a merged one in the place of its first member."""
    groups = complete_groups(shapes)
    taken_by = {member: name for name, members in groups.items() for member in members}
    merged: dict[str, Shape] = {}
    for name, shape in shapes.items():
        group = taken_by.get(name)
        if group is None:
            merged[name] = shape
        elif group not in merged:
            merged[group] = (sum(shapes[each][0] for each in groups[group]), *shape[1:])
    return merged

"""Checkpoint and options -> the list of graphs, the cache, and a forecast of memory. Needs no torch and reads no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..model_defs.config import ModelConfig
from ..runtime.artifact import KINDS, CacheSpec, Kind
from ..weights.rules import targets
from ..weights.stored import stored_targets

BACKENDS = ("onnx", "ascend")
QUANTS = ("none", "w8a8", "w8a16", "w4a16")
READY_BACKENDS = ("onnx",)
READY_QUANTS = ("none", "w8a16")
DEFAULT_CONTEXT = 2048
DEFAULT_SLOTS = 4
DEFAULT_PREFILL = (16, 64, 256)
MAX_BUCKET = 1 << 16


class PlanError(ValueError):
    """Options that cannot be compiled; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Bucket sizes by graph kind, and the cache's size; the keys of buckets.yaml. None: derived from the model."""

    prefill: tuple[int, ...] | None = None
    decode: tuple[int, ...] | None = None
    vision: tuple[int, ...] | None = None
    context: int | None = None
    slots: int | None = None

    def __post_init__(self) -> None:
        for name in KINDS:
            sizes = getattr(self, name)
            if sizes is not None and not (
                sizes and all(isinstance(s, int) and not isinstance(s, bool) and 1 <= s <= MAX_BUCKET for s in sizes)
            ):
                raise PlanError(f"buckets: {name} is {list(sizes)}; expected a list of integers from 1 to {MAX_BUCKET}")
            if sizes is not None and len(set(sizes)) < len(sizes):
                raise PlanError(f"buckets: {name} names a size twice: {list(sizes)}")
        for name in ("context", "slots"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise PlanError(f"buckets: {name} is {value!r}; expected a positive integer")

    def merged(self, other: Buckets) -> Buckets:
        """These buckets, with every setting of `other` that is given."""
        given = {f.name: getattr(other, f.name) for f in fields(other) if getattr(other, f.name) is not None}
        return Buckets(**{f.name: given.get(f.name, getattr(self, f.name)) for f in fields(self)})


def parse_buckets(data: Any, where: str) -> Buckets:
    """buckets.yaml's content -> Buckets; raises PlanError for anything but its keys and integers."""
    if not isinstance(data, Mapping):
        raise PlanError(
            f"{where} holds {type(data).__name__}; expected a mapping with the keys prefill, decode, vision, context, slots"
        )
    known = {f.name for f in fields(Buckets)}
    unknown = sorted(str(key) for key in set(data) - known)
    if unknown:
        raise PlanError(f"{where}: unknown keys {', '.join(unknown)}; expected {', '.join(sorted(known))}")
    for name in KINDS:
        if name in data and not isinstance(data[name], list):
            raise PlanError(f"{where}: {name} is {data[name]!r}; expected a list of integers")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Buckets(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `staticvl compile` was asked for."""

    checkpoint: Path
    out: Path
    backend: str = "onnx"
    quant: str = "none"
    tp: int = 1
    buckets: Buckets = field(default_factory=Buckets)
    vision_tower: Path | None = None
    lora: Path | None = None
    ignore_config_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.backend not in READY_BACKENDS:
            raise PlanError(
                f"backend {self.backend!r} is not available in this release; available: {', '.join(READY_BACKENDS)}"
            )
        if self.quant not in READY_QUANTS:
            raise PlanError(
                f"quantisation {self.quant!r} is not available in this release; available: {', '.join(READY_QUANTS)}"
            )
        if self.tp != 1:
            raise PlanError(f"tensor parallelism {self.tp} is not available in this release; use --tp 1")
        if self.lora is not None:
            raise PlanError("merging a LoRA adapter is not available in this release; merge it into the checkpoint first")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that will be compiled."""

    cache: CacheSpec
    graphs: tuple[tuple[Kind, int], ...]  # largest first within a kind

    def buckets(self, kind: Kind) -> list[int]:
        return sorted(bucket for k, bucket in self.graphs if k == kind)


def make_plan(config: ModelConfig, options: Options) -> Plan:
    """Graphs and cache for a model; raises PlanError where they do not fit each other."""
    wanted = options.buckets
    text = config.text
    context = wanted.context or min(text.max_positions, DEFAULT_CONTEXT)
    if context > text.max_positions:
        raise PlanError(f"context {context} exceeds the model's {text.max_positions} positions; use at most that")
    slots = wanted.slots or (max(wanted.decode) if wanted.decode else DEFAULT_SLOTS)
    prefill = wanted.prefill or tuple(b for b in DEFAULT_PREFILL if b <= context) or (context,)
    decode = wanted.decode or tuple(sorted({1 << i for i in range(slots.bit_length())} | {slots}))
    decode = tuple(b for b in decode if b <= slots) if wanted.decode is None else decode
    if max(decode) != slots:
        raise PlanError(
            f"the largest decode bucket is {max(decode)} but there are {slots} slots; make them equal, so that all run at once"
        )
    if max(prefill) > context:
        raise PlanError(
            f"prefill bucket {max(prefill)} exceeds the context {context}; use smaller buckets or a larger --context"
        )
    cache = CacheSpec(
        layers=text.layers,
        kv_heads=text.kv_heads,
        head_dim=text.head_dim,
        slots=slots,
        context=context,
        # A last chunk writes its padding too, which the smallest bucket bounds.
        rows=context + min(prefill),
        dtype="float32",
    )
    sizes: dict[Kind, tuple[int, ...]] = {"vision": wanted.vision or (1,), "prefill": prefill, "decode": decode}
    graphs = tuple((kind, bucket) for kind in KINDS for bucket in sorted(sizes[kind], reverse=True))
    return Plan(cache=cache, graphs=graphs)  # type: ignore[arg-type]


def forecast(config: ModelConfig, plan: Plan, quant: str) -> dict[str, int]:
    """Bytes of weights and cache, and parameters, from sizes alone."""
    return {
        "parameters": sum(math.prod(shape) for shape in targets(config).values()),
        "weight_bytes": sum(tensor.nbytes for tensor in stored_targets(config, quant).values()),
        "cache_bytes": plan.cache.nbytes,
    }

"""Checkpoint and options -> the list of graphs, the cache, and a forecast of memory. Needs no torch and reads no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from msgspec import UNSET, structs

from ..model_defs.config import KV_CACHES, QUANTS, READY_MADE, ModelConfig, TiledConfig
from ..runtime.artifact import KINDS, CacheSpec, CrossSpec, GraphKey, Kind
from ..runtime.backends.ascend.torchair_host import SOCS
from ..runtime.shown import quoted, shown
from ..weights.shard import check_tp, rank_targets
from ..weights.storage import FLOAT32, TABLE, Floats, stored_targets, uniform
from ..weights.weight_map import targets
from .calibration import METHODS, Calibration

BACKENDS = ("onnx", "ascend")
READY_QUANTS = {"onnx": QUANTS, "ascend": QUANTS}
SUFFIXES = {"onnx": ".onnx", "ascend": ".torchair"}  # of graph files
EAGER_SUFFIX = ".eager.py"
DTYPES = {"onnx": ("float32", "float16", "bfloat16", "auto"), "ascend": ("float16", "bfloat16")}  # the first is the default
DEFAULT_CONTEXT = 2048
DEFAULT_SLOTS = 4
DEFAULT_PREFILL = (16, 64, 256)
DEFAULT_IMAGES = (1, 4)
# The likeliest tokens that text graphs put out: a host that would scan the logits in the memory of a device would copy them.
DEFAULT_CANDIDATES = {"onnx": 0, "ascend": 64}
MOST_CANDIDATES = 1024
MAX_BUCKET = 1 << 16
INT8_CACHE_LACKS = "Ascend310P"  # whose fused attention takes no int8 keys (torch_npu's documentation of the operator)
TEXT_BEFORE_IMAGE = ("transformers", "meta")
LISTS = (*KINDS, "images")


class PlanError(ValueError):
    """Options that cannot be compiled; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Bucket sizes by graph kind, and the cache's size; the keys of buckets.yaml. None: derived from the model.

    `verify` are the most tokens that one run can verify, those of a draft and the one before them; by default there are no such
    graphs. `images` are the numbers of images that text graphs can see by cross-attention, the largest being what a sequence
    may hold; text without images always has graphs of its own.
    """

    prefill: tuple[int, ...] | None = None
    decode: tuple[int, ...] | None = None
    vision: tuple[int, ...] | None = None
    verify: tuple[int, ...] | None = None
    images: tuple[int, ...] | None = None
    context: int | None = None
    slots: int | None = None

    def __post_init__(self) -> None:
        for name in LISTS:
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
                raise PlanError(f"buckets: {name} is {quoted(value)}; expected a positive integer")

    def merged(self, other: Buckets) -> Buckets:
        """These buckets, with every setting of `other` that is given."""
        given = {f.name: getattr(other, f.name) for f in fields(other) if getattr(other, f.name) is not None}
        return Buckets(**{f.name: given.get(f.name, getattr(self, f.name)) for f in fields(self)})


def parse_buckets(data: Any, where: str) -> Buckets:
    """buckets.yaml's content -> Buckets; raises PlanError for anything but its keys and integers."""
    if not isinstance(data, Mapping):
        raise PlanError(
            f"{where} holds {type(data).__name__}; expected a mapping with the keys prefill, decode, vision, verify, images, "
            "context, slots"
        )
    known = {f.name for f in fields(Buckets)}
    unknown = sorted(str(key) for key in set(data) - known)
    if unknown:
        raise PlanError(f"{where}: unknown keys {shown(', '.join(unknown))}; expected {', '.join(sorted(known))}")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    if "images" in given:
        given["images"] = image_buckets(given["images"], where)
    for name in LISTS:
        if name in given and not isinstance(given[name], tuple):
            raise PlanError(f"{where}: {name} is {quoted(data[name])}; expected a list of integers")
    return Buckets(**given)


def image_buckets(images: Any, where: str) -> tuple[int, ...]:
    """The most images that a sequence may hold -> buckets for one and for all of them; a list is taken as it is."""
    if isinstance(images, list | tuple):
        return tuple(images)
    if not isinstance(images, int) or isinstance(images, bool) or images < 1:
        raise PlanError(f"{where}: images is {quoted(images)}; expected a positive integer or a list of them")
    return (1,) if images == 1 else (1, images)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `staticvl compile` was asked for."""

    checkpoint: Path
    out: Path
    backend: str = "onnx"
    quant: str = ""  # of the decoder's layers; "": what the checkpoint has, see ready_made.py
    tp: int = 1
    pp: int = 1
    buckets: Buckets = field(default_factory=Buckets)
    vision_tower: Path | None = None
    lora: Path | None = None
    ignore_config_keys: tuple[str, ...] = ()
    text_before_image: Literal["transformers", "meta"] = "transformers"  # see ModelInfo
    # What floats are stored in; "": the backend's default. On Ascend the cache and arithmetic have it too, on ONNX those are
    # float32 whatever it is. "auto", ONNX: each matrix as the checkpoint has it.
    dtype: str = ""
    eager: tuple[Kind, ...] = ()  # Ascend: graph kinds that run op by op
    soc: str = SOCS[0]  # Ascend: family of chips
    candidates: int | None = None  # likeliest tokens that text graphs put out, 0: none; None: the backend's default
    calibration: Calibration | None = None  # what weights are quantised by, besides themselves, and a cache in 8 bits
    kv_cache: str = KV_CACHES[0]
    tune: bool = False  # ONNX: whether text graphs are lowered as is fastest on this machine, see kernels.py

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise PlanError(f"backend {quoted(self.backend)} is unknown; expected one of {', '.join(BACKENDS)}")
        if self.quant not in ("", *READY_QUANTS[self.backend], *READY_MADE):
            raise PlanError(
                f"quantisation {quoted(self.quant)} is not available for {self.backend}; available: "
                f"{', '.join(READY_QUANTS[self.backend])}"
            )
        if self.dtype not in ("", *DTYPES[self.backend]):
            raise PlanError(
                f"dtype {quoted(self.dtype)} is not available for {self.backend}; available: {', '.join(DTYPES[self.backend])}"
            )
        if self.soc not in SOCS:
            raise PlanError(f"soc {quoted(self.soc)} is unknown; expected one of {', '.join(SOCS)}")
        if unknown := set(self.eager) - set(KINDS):
            raise PlanError(f"eager names {shown(', '.join(sorted(unknown)))}; expected some of {', '.join(KINDS)}")
        if self.eager and self.stored_quant != "none":
            raise PlanError(f"eager graphs know no quantisation, and {self.quant} was asked for; leave out one of the two")
        if self.eager and self.backend != "ascend":
            raise PlanError(f"eager graphs were asked for, but {self.backend} has only compiled ones; leave --eager out")
        if self.candidates is not None and not _whole_number(self.candidates, MOST_CANDIDATES):
            raise PlanError(
                f"candidates is {quoted(self.candidates)}; expected a number of tokens from 1 to "
                f"{MOST_CANDIDATES}, or 0 for none"
            )
        if self.candidates and self.pp > 1:
            raise PlanError(
                f"{self.candidates} candidates and a pipeline of {self.pp} stages were asked for, but stages hand on whole "
                "logits; leave out one of the two"
            )
        self._check_calibration()
        if self.tune and (self.backend != "onnx" or self.tp * self.pp > 1):
            what = f"backend {self.backend}" if self.backend != "onnx" else f"{self.tp * self.pp} ranks"
            raise PlanError(f"tune was asked for with {what}, but it measures ONNX graphs of one process; leave --tune out")
        if self.text_before_image not in TEXT_BEFORE_IMAGE:
            raise PlanError(
                f"text before image is {quoted(self.text_before_image)}; expected one of {', '.join(TEXT_BEFORE_IMAGE)}"
            )

    def _check_calibration(self) -> None:
        """Whether what is to be calibrated can be, and what has to be is."""
        if self.kv_cache not in KV_CACHES:
            raise PlanError(f"kv cache {quoted(self.kv_cache)} is unknown; expected one of {', '.join(KV_CACHES)}")
        if self.int8_cache and self.calibration is None:
            raise PlanError(
                "a cache in 8 bits needs to know how large keys and values become; give --calibrate FILE with prompts like "
                "those that the model is for"
            )
        if self.int8_cache and self.soc == INT8_CACHE_LACKS and self.backend == "ascend":
            raise PlanError(f"{self.soc} has no attention over a cache in 8 bits; leave out --kv-cache int8")
        if self.int8_cache and self.eager:
            raise PlanError("eager graphs know no cache in 8 bits; leave out --kv-cache int8 or --eager")
        if self.calibration and self.quant not in METHODS and not self.int8_cache:
            raise PlanError(
                f"quantisation {quoted(self.quant)} has nothing to calibrate; calibrated are {', '.join(METHODS)}, and with "
                "--kv-cache int8 the cache"
            )

    @property
    def stored_quant(self) -> str:
        """The quantisation of an artifact."""
        return self.quant or "none"

    @property
    def int8_cache(self) -> bool:
        return self.kv_cache == "int8"

    def defined(self, config: ModelConfig) -> ModelConfig:
        """The config of a checkpoint, with what the options make of its definition."""
        return replace(config, text=replace(config.text, int8_cache=self.int8_cache))

    @property
    def cache_dtype(self) -> str:
        """dtype of cache and arithmetic."""
        return "float32" if self.backend == "onnx" else self.dtype or DTYPES[self.backend][0]

    def floats(self, kept: Mapping[str, str]) -> Floats:
        """What floats are stored in; `kept` are the dtypes in which parameters lose nothing (weights/weight_map.py).

        ONNX graphs widen matrices where they multiply, which costs time, and rows of a table as they are looked up, which costs
        none: so beside quantised layers the table is as the checkpoint has it. Vectors would save nothing, and scales stay in
        the only type that kernels take.
        """
        if self.backend == "ascend":
            return uniform(self.cache_dtype)
        if self.dtype == "auto":
            return replace(FLOAT32, own=kept)
        if not self.dtype and self.stored_quant != "none":
            return replace(FLOAT32, own={name: dtype for name, dtype in kept.items() if name == TABLE})
        return replace(FLOAT32, matrices=self.dtype or "float32")


def _whole_number(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that will be compiled. Of a pipeline, `cache` and `graphs` are those of its first stage."""

    cache: CacheSpec
    graphs: tuple[GraphKey, ...]  # largest first within a kind
    later: tuple[CacheSpec, ...] = ()  # caches of the stages behind the first
    candidates: int = 0  # likeliest tokens that text graphs put out

    def of_stage(self, stage: int) -> Plan:
        """The plan of one stage; images that become tokens are only seen by the first."""
        if stage == 0:
            return self
        cache = self.later[stage - 1]
        graphs = tuple(graph for graph in self.graphs if graph.kind != "vision" or cache.cross)
        return Plan(cache=cache, graphs=graphs)

    def buckets(self, kind: Kind) -> list[int]:
        return sorted({graph.bucket for graph in self.graphs if graph.kind == kind})


def make_plan(config: ModelConfig, options: Options) -> Plan:
    """Graphs and cache for a model, the cache being that of one rank.

    Raises PlanError where they do not fit each other, and WeightsError where the model cannot be cut among `options.tp` ranks.
    """
    check_tp(config, options.tp)
    wanted = options.buckets
    text = config.text
    context = wanted.context or _default_context(config)
    if context > text.max_positions:
        raise PlanError(f"context {context} exceeds the model's {text.max_positions} positions; use at most that")
    slots = wanted.slots or (max(wanted.decode) if wanted.decode else DEFAULT_SLOTS)
    prefill = wanted.prefill or tuple(b for b in DEFAULT_PREFILL if b <= context) or (context,)
    decode = wanted.decode or tuple(b for b in sorted({1 << i for i in range(slots.bit_length())} | {slots}) if b <= slots)
    if max(decode) != slots:
        raise PlanError(
            f"the largest decode bucket is {max(decode)} but there are {slots} slots; make them equal, so that all run at once"
        )
    if max(prefill) > context:
        raise PlanError(
            f"prefill bucket {max(prefill)} exceeds the context {context}; use smaller buckets"
            + (f" or --context {max(prefill)}" if max(prefill) <= text.max_positions else "")
        )
    images = _image_buckets(config, wanted)
    # A last chunk writes its padding too, which the smallest bucket bounds.
    rows = context + min(prefill)
    first, *later = (
        CacheSpec(
            layers=of_stage.text.self_layers,
            kv_heads=text.rank_kv_heads(options.tp),
            head_dim=text.head_dim,
            slots=slots,
            context=context,
            rows=rows,
            dtype=options.cache_dtype,
            cross=_cross(of_stage, max(images)),
            text_dtype="int8" if options.int8_cache else UNSET,
        )
        for of_stage in stages(config, options.pp)
    )
    sizes: dict[Kind, tuple[int, ...]] = {
        "vision": _vision_buckets(config, wanted),
        "prefill": prefill,
        "decode": decode,
        "verify": _verify_buckets(wanted, context),
    }
    graphs = tuple(
        GraphKey(kind, bucket, variant)
        for kind, buckets in sizes.items()
        for variant in sorted((0,) if kind == "vision" else images, reverse=True)
        for bucket in sorted(buckets, reverse=True)
    )
    return Plan(cache=first, graphs=graphs, later=tuple(later), candidates=_candidates(config, options))


def stages(config: ModelConfig, pp: int) -> tuple[ModelConfig, ...]:
    """The parts of a model for a pipeline of `pp` stages; raises PlanError where one would have no cache of its own."""
    if pp < 1:
        raise PlanError(f"pipeline of {pp} stages; expected a number from 1 on")
    found = tuple(config.of_stage(i, pp) for i in range(min(pp, config.text.layers)))
    if len(found) < pp or not all(each.text.self_layers for each in found):
        raise PlanError(
            f"pipeline of {pp} stages; every stage needs a layer that attends to the text, and this model has "
            f"{config.text.layers} layers: use fewer stages"
        )
    return found


def _candidates(config: ModelConfig, options: Options) -> int:
    if options.pp > 1:
        return 0
    wanted = DEFAULT_CANDIDATES[options.backend] if options.candidates is None else options.candidates
    return min(wanted, config.text.vocab_size)


def _default_context(config: ModelConfig) -> int:
    """LLaVA-1.6 cuts an image into up to 2928 tokens: there the default is all that the model was trained for."""
    return min(config.text.max_positions, 2 * DEFAULT_CONTEXT if config.image_mode == "anyres" else DEFAULT_CONTEXT)


def _vision_buckets(config: ModelConfig, wanted: Buckets) -> tuple[int, ...]:
    if isinstance(config.vision, TiledConfig):
        tiles = config.vision.tiles
        if wanted.vision not in (None, (tiles,)):
            raise PlanError(
                f"vision buckets are {list(wanted.vision or ())}, but this model always sees the {tiles} tiles of one image "
                f"together; use [{tiles}] or leave them out"
            )
        return (tiles,)
    # LLaVA-1.6: the tiles of one image, and the whole image as one more.
    return wanted.vision or tuple({1 + rows * columns for rows, columns in config.grids}) or (1,)


def _verify_buckets(wanted: Buckets, context: int) -> tuple[int, ...]:
    buckets = wanted.verify or ()
    if wrong := [bucket for bucket in buckets if not 2 <= bucket <= context]:
        raise PlanError(
            f"verify bucket {wrong[0]} does not fit; expected 2 (one drafted token behind the last) to the context, {context}"
        )
    return buckets


def _image_buckets(config: ModelConfig, wanted: Buckets) -> tuple[int, ...]:
    """Numbers of images that text graphs see by cross-attention, 0 included."""
    if config.text.cross_layers:
        return (0, *(wanted.images or DEFAULT_IMAGES))
    if wanted.images:
        raise PlanError(
            f"images buckets {list(wanted.images)} were given, but this model has no cross-attention to images; leave them out"
        )
    return (0,)


def _cross(config: ModelConfig, images: int) -> CrossSpec | None:
    if not isinstance(config.vision, TiledConfig):
        return None
    vision = config.vision
    return CrossSpec(layers=len(config.text.stage_cross), images=images, rows=vision.rows_per_image, tiles=vision.tiles)


def forecast(config: ModelConfig, plan: Plan, options: Options, floats: Floats) -> dict[str, int]:
    """Parameters, and bytes of weights and cache, from sizes alone; `rank_` is what a rank holds (the most of any).

    `rank_bfloat16_bytes` are the weights in the checkpoint's own width, as accelerators keep them, and so is a cache of floats.
    """
    quant, tp = options.stored_quant, options.tp
    parts, caches = stages(config, options.pp), (plan.cache, *plan.later)
    parameters = max(sum(map(math.prod, rank_targets(part, tp).values())) for part in parts)
    held = [stored_targets(part, quant, floats, tp).values() for part in parts]
    return {
        "parameters": sum(map(math.prod, targets(config).values())),
        "weight_bytes": sum(tensor.nbytes for tensor in stored_targets(config, quant, floats).values()),
        "cache_bytes": sum(cache.nbytes for cache in caches) // plan.cache.kv_heads * config.text.kv_heads,
        "rank_parameters": parameters,
        "rank_weight_bytes": max(sum(tensor.nbytes for tensor in tensors) for tensors in held),
        "rank_bfloat16_bytes": 2 * parameters,
        "rank_cache_bytes": max(cache.nbytes for cache in caches),
        "rank_bfloat16_cache_bytes": max(structs.replace(cache, dtype="bfloat16").nbytes for cache in caches),
    }

"""Checkpoint and options -> the list of graphs, the cache, and a forecast of memory. Needs no torch and reads no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from msgspec import UNSET, UnsetType, structs

from ..model_defs.config import ModelConfig, TiledConfig
from ..runtime.artifact import PAGE_TOKENS, CacheSpec, CrossSpec, GraphKey, Kind
from ..weights.shard import check_tp, rank_targets
from ..weights.storage import Floats, stored_targets
from ..weights.weight_map import targets
from .buckets import Buckets
from .choices import DEFAULT_CANDIDATES, DEFAULT_CONTEXT, DEFAULT_IMAGES, DEFAULT_PREFILL, DEFAULT_SLOTS, PlanError
from .options import Options

SUFFIXES = {"onnx": ".onnx", "ascend": ".torchair"}  # of graph files
EAGER_SUFFIX = ".eager.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that will be compiled. Of a pipeline, `cache` and `graphs` are those of its first stage."""

    cache: CacheSpec
    graphs: tuple[GraphKey, ...]  # largest first within a kind
    later: tuple[CacheSpec, ...] = ()  # caches of the stages after the first
    candidates: int = 0  # top-k tokens that text graphs output

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

    Raises PlanError where they do not fit each other, WeightsError where the model cannot be sharded over `options.tp` ranks.
    """
    check_tp(config, options.tp)
    buckets = options.buckets
    text = config.text
    context = buckets.context or _default_context(config)
    if context > text.max_positions:
        raise PlanError(f"context {context} exceeds the model's {text.max_positions} positions; use at most that")
    slots = buckets.slots or (max(buckets.decode) if buckets.decode else DEFAULT_SLOTS)
    prefill = buckets.prefill or tuple(b for b in DEFAULT_PREFILL if b <= context) or (context,)
    decode = buckets.decode or tuple(b for b in sorted({1 << i for i in range(slots.bit_length())} | {slots}) if b <= slots)
    if max(decode) != slots:
        raise PlanError(
            f"the largest decode bucket is {max(decode)} but there are {slots} slots; make them equal, so that all run at once"
        )
    if max(prefill) > context:
        raise PlanError(
            f"prefill bucket {max(prefill)} exceeds the context {context}; use smaller buckets"
            + (f" or --context {max(prefill)}" if max(prefill) <= text.max_positions else "")
        )
    images = _image_buckets(config, buckets)
    # A last chunk writes its padding too, which the smallest bucket bounds.
    rows = context + min(prefill)
    pages = _pages(config, options, context, slots)
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
            pages=pages,
        )
        for of_stage in stages(config, options.pp)
    )
    sizes: dict[Kind, tuple[int, ...]] = {
        "vision": _vision_buckets(config, buckets),
        "prefill": prefill,
        "decode": decode,
        "verify": _verify_buckets(buckets, context),
    }
    graphs = tuple(
        GraphKey(kind, bucket, variant)
        for kind, kind_sizes in sizes.items()
        for variant in sorted((0,) if kind == "vision" else images, reverse=True)
        for bucket in sorted(kind_sizes, reverse=True)
    )
    return Plan(cache=first, graphs=graphs, later=tuple(later), candidates=_candidates(config, options))


def _pages(config: ModelConfig, options: Options, context: int, slots: int) -> int | UnsetType:
    """Pages of the cache, the one for padding included; UNSET: it is in slots."""
    if (options.kv or _default_kv(config, options)) == "slots":
        if options.pages is not None:
            raise PlanError(f"pages is {options.pages}, but the cache is in slots; give --kv pages, or leave out --pages")
        return UNSET
    if config.text.cross_layers:
        raise PlanError(
            "kv is pages, but this model attends to images by cross-attention, and their keys are in slots; leave out --kv"
        )
    of_one = -(-context // PAGE_TOKENS)
    if options.pages is not None and options.pages <= of_one:
        raise PlanError(
            f"pages is {options.pages}, but a sequence of the whole context takes {of_one}, and one more is for padding; give "
            f"at least {1 + of_one}, or a smaller --context"
        )
    return options.pages or 1 + slots * of_one


def _default_kv(config: ModelConfig, options: Options) -> str:
    return "slots"


def stages(config: ModelConfig, pp: int) -> tuple[ModelConfig, ...]:
    """The parts of a model for a pipeline of `pp` stages; raises PlanError where one would have no cache of its own."""
    if pp < 1:
        raise PlanError(f"pipeline of {pp} stages; expected a number from 1 on")
    parts = tuple(config.of_stage(i, pp) for i in range(min(pp, config.text.layers)))
    if len(parts) < pp or not all(part.text.self_layers for part in parts):
        raise PlanError(
            f"pipeline of {pp} stages; every stage needs a layer that attends to the text, and this model has "
            f"{config.text.layers} layers: use fewer stages"
        )
    return parts


def _candidates(config: ModelConfig, options: Options) -> int:
    if options.pp > 1:
        return 0
    most = DEFAULT_CANDIDATES[options.backend] if options.candidates is None else options.candidates
    return min(most, config.text.vocab_size)


def _default_context(config: ModelConfig) -> int:
    """LLaVA-1.6 cuts an image into up to 2928 tokens: there the default is all that the model was trained for."""
    return min(config.text.max_positions, 2 * DEFAULT_CONTEXT if config.image_mode == "anyres" else DEFAULT_CONTEXT)


def _vision_buckets(config: ModelConfig, buckets: Buckets) -> tuple[int, ...]:
    if isinstance(config.vision, TiledConfig):
        tiles = config.vision.tiles
        if buckets.vision not in (None, (tiles,)):
            raise PlanError(
                f"vision buckets are {list(buckets.vision or ())}, but this model always sees the {tiles} tiles of one image "
                f"together; use [{tiles}] or leave them out"
            )
        return (tiles,)
    # LLaVA-1.6: the tiles of one image, and the whole image as one more.
    return buckets.vision or tuple({1 + rows * columns for rows, columns in config.grids}) or (1,)


def _verify_buckets(buckets: Buckets, context: int) -> tuple[int, ...]:
    sizes = buckets.verify or ()
    if wrong := [size for size in sizes if not 2 <= size <= context]:
        raise PlanError(
            f"verify bucket {wrong[0]} does not fit; expected 2 (--speculate 1: one drafted token after the last) to the "
            f"context, {context}"
        )
    return sizes


def _image_buckets(config: ModelConfig, buckets: Buckets) -> tuple[int, ...]:
    """Numbers of images that text graphs see by cross-attention, 0 included."""
    if config.text.cross_layers:
        return (0, *(buckets.images or DEFAULT_IMAGES))
    if buckets.images:
        raise PlanError(
            f"images buckets {list(buckets.images)} were given, but this model has no cross-attention to images; leave them out"
        )
    return (0,)


def _cross(config: ModelConfig, images: int) -> CrossSpec | None:
    if not isinstance(config.vision, TiledConfig):
        return None
    vision = config.vision
    return CrossSpec(layers=len(config.text.stage_cross), images=images, rows=vision.rows_per_image, tiles=vision.tiles)


def forecast(config: ModelConfig, plan: Plan, options: Options, floats: Floats) -> dict[str, int]:
    """Parameters, and bytes of weights and cache, from sizes alone; `rank_`: the most of any rank.

    `rank_bfloat16_bytes` are the weights in the checkpoint's own width, as accelerators keep them, and so is a cache of floats.
    """
    quant, tp, ascend = options.stored_quant, options.tp, options.backend == "ascend"
    parts, caches = stages(config, options.pp), (plan.cache, *plan.later)
    parameters = max(sum(map(math.prod, rank_targets(part, tp).values())) for part in parts)
    stored = [stored_targets(part, quant, floats, tp, ascend=ascend).values() for part in parts]
    return {
        "parameters": sum(map(math.prod, targets(config).values())),
        "weight_bytes": sum(tensor.nbytes for tensor in stored_targets(config, quant, floats, ascend=ascend).values()),
        "cache_bytes": sum(cache.nbytes for cache in caches) // plan.cache.kv_heads * config.text.kv_heads,
        "rank_parameters": parameters,
        "rank_weight_bytes": max(sum(tensor.nbytes for tensor in tensors) for tensors in stored),
        "rank_bfloat16_bytes": 2 * parameters,
        "rank_cache_bytes": max(cache.nbytes for cache in caches),
        "rank_bfloat16_cache_bytes": max(structs.replace(cache, dtype="bfloat16").nbytes for cache in caches),
    }

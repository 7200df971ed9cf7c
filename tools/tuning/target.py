"""The target of tuning: a model and its costs on a device, from an artifact, a checkpoint or a table of costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tqdm import tqdm

from ...runtime.artifact import GraphKey, Kind, ModelInfo, open_artifact
from ...runtime.shown import shown
from ..cards import CARDS, Card
from .costs import (
    Costs,
    Key,
    line_through,
    manifest_lines,
    manifest_points,
    measured_costs,
    remeasure,
    roofline_costs,
    this_cpu,
)

CPU = "cpu"
_SIZES: dict[Kind, tuple[int, int]] = {"vision": (1, 2), "prefill": (16, 256), "decode": (1, 8)}  # two points of each line


@dataclass(frozen=True, slots=True)
class Target:
    """A model to be compiled. `costs`: a function of the context and the slots of its cache."""

    name: str
    costs: Callable[[int, int], Costs]
    info: ModelInfo | None = None
    tiles: int | None = None  # the one vision bucket of a model whose images enter by cross-attention
    weight_bytes: int = 0
    row_bytes: int = 0  # of the cache: one token of one slot
    image_bytes: int = 0  # of the cache: one image of one slot
    max_positions: int | None = None  # None: not known, as in old artifacts; compiling checks the context against it

    @property
    def crossed(self) -> bool:
        """Whether images enter by cross-attention."""
        return self.tiles is not None

    def nbytes(self, context: int, slots: int, smallest: int, images: int) -> int:
        """Weights and cache, whose rows are those of compiler/plan.py."""
        return self.weight_bytes + slots * ((context + smallest) * self.row_bytes + images * self.image_bytes)


def from_artifact(folder: Path, card: str | None, overhead_ms: float, passes: int, threads: int | None) -> Target:
    """The model of an artifact with its measured costs (`passes` > 0: measured again), or those of a card."""
    manifest = open_artifact(folder).manifest
    cache = manifest.cache
    if card:
        device = _card(card)
        costs = roofline_costs(
            manifest_lines(manifest), device, overhead_ms, _roofline_source(folder.name, device, overhead_ms)
        )
    elif passes:
        points, past_ms = remeasure(folder, passes, threads)
        source = (
            f"graphs of {folder.name}, measured now (best of {passes}); {1e6 * past_ms:.3g} ns for a token and one before it"
        )
        costs = measured_costs(points, source, past_ms)
    else:
        costs = measured_costs(manifest_points(manifest), f"graphs of {folder.name}, measured when it was compiled")
    self_attention = msgspec.structs.replace(cache, cross=None).nbytes
    return Target(
        name=folder.name,
        costs=lambda context, slots: costs,
        info=manifest.model,
        max_positions=manifest.model.max_positions or None,
        tiles=cache.cross.tiles if cache.cross else None,
        weight_bytes=sum(weight.nbytes for weight in manifest.weights.values()) * manifest.tp,
        row_bytes=self_attention // cache.tokens,
        image_bytes=(cache.nbytes - self_attention) // (cache.slots * cache.cross.images) if cache.cross else 0,
    )


def from_checkpoint(
    checkpoint: str,
    card: str,
    overhead_ms: float,
    *,
    quant: str,
    dtype: str,
    vision_tower: Path | None,
    kv_cache: str = "float",
) -> Target:
    """A checkpoint's folder, of which only the small files are read, or a model known by name; lower bounds on a card."""
    from ...compiler.buckets import Buckets
    from ...compiler.calibration import Calibration
    from ...compiler.model_info import read_model_info
    from ...compiler.options import Options
    from ...compiler.plan import forecast, make_plan
    from ...model_defs.config import TiledConfig, read_config

    device = _card(card)
    dtype = dtype or ("float32" if card == CPU else "float16")
    with tempfile.TemporaryDirectory() as scratch:
        folder = _settings(checkpoint, Path(scratch))
        config = read_config(folder, vision_tower=vision_tower)
        info, _ = read_model_info(folder, config, vision_tower=vision_tower)
    crossed = isinstance(config.vision, TiledConfig)
    options = Options(
        checkpoint=folder,
        out=folder,
        backend="onnx" if dtype == "float32" else "ascend",
        dtype=dtype,
        quant=quant,
        kv_cache=kv_cache,
        calibration=Calibration((), "") if kv_cache == "int8" else None,  # what it will be does not change a size
        buckets=Buckets(context=config.text.max_positions, slots=1, images=(1,) if crossed else None),
    )
    config = options.defined(config)
    plan = make_plan(config, options)
    self_attention = msgspec.structs.replace(plan.cache, cross=None).nbytes

    def costs(context: int, slots: int) -> Costs:
        from ...compiler.cost import graph_cost
        from ...compiler.graphs import GraphContext, define_graph

        cache = msgspec.structs.replace(plan.cache, context=context, rows=context + 16, slots=max(slots, _SIZES["decode"][1]))
        tiles = plan.cache.cross.tiles if plan.cache.cross else None
        shared = GraphContext(config=config, image=info.image, cache=cache, quant=quant)
        keys = [
            GraphKey(kind, size, images)
            for kind, sizes in _SIZES.items()
            for images in ((0,) if kind == "vision" or not tiles else (0, 1))
            for size in ((tiles,) if kind == "vision" and tiles else sizes)
        ]
        points: dict[Key, list[tuple[int, int, int]]] = {}
        for key in tqdm(keys, desc="counting operations", disable=None):
            cost = graph_cost(define_graph(shared, key), dtype)
            points.setdefault((key.kind, key.images), []).append((key.bucket, cost.flops, cost.nbytes))
        lines = {key: line_through(sorted(costs)) for key, costs in points.items()}
        return roofline_costs(lines, device, overhead_ms, _roofline_source(Path(checkpoint).name, device, overhead_ms))

    return Target(
        name=Path(checkpoint).name,
        costs=costs,
        info=info,
        tiles=config.vision.tiles if isinstance(config.vision, TiledConfig) else None,
        weight_bytes=forecast(config, plan, options, options.floats({}))["weight_bytes"],
        row_bytes=self_attention // plan.cache.rows,
        image_bytes=plan.cache.nbytes - self_attention,
        max_positions=config.text.max_positions,
    )


def _settings(checkpoint: str, scratch: Path) -> Path:
    """The folder with a checkpoint's small files; those of a model known by name are written into `scratch`."""
    from ...model_defs.config import ConfigError, read_config
    from ..known_models import MODELS, write_known_model
    from ..random_tokenizers import write_tokenizer

    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if checkpoint not in MODELS:
        raise ConfigError(
            f"{shown(checkpoint)} is not a folder; expected a checkpoint's, or one of the names {', '.join(MODELS)}"
        )
    write_known_model(checkpoint, scratch)
    write_tokenizer(read_config(scratch), scratch)
    return scratch


def _card(name: str) -> Card:
    return this_cpu() if name == CPU else CARDS[name]


def _roofline_source(model: str, card: Card, overhead_ms: float) -> str:
    more = f" and {overhead_ms:g} ms for every run" if overhead_ms else ""
    return (
        f"{model}, lower bounds on {card.name}: {card.flops / 1e12:.3g} TFLOP/s, {card.bandwidth / 1e9:.4g} GB/s{more}; "
        "a bound, not a measurement"
    )

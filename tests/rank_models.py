"""A tiny model that is cut among ranks: its graphs, its weights, and what is run to compare ranks with the whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from staticvl.compiler.check import relative_error
from staticvl.compiler.cost import graph_cost
from staticvl.compiler.emit_onnx import emit_steps
from staticvl.compiler.graphs import GraphContext, GraphDef, define_graph
from staticvl.compiler.plan import Buckets, Options, make_plan
from staticvl.model_defs.config import ModelConfig, TiledConfig
from staticvl.runtime.artifact import (
    CROSS_HIDDEN,
    CacheSpec,
    GraphKey,
    GraphSpec,
    ImageProcessorConfig,
    Kind,
    WeightSpec,
    is_cached,
)
from staticvl.runtime.backends.base import Backend
from staticvl.weights.convert import Conversion, Converted, convert
from staticvl.weights.source import open_source

from .wide_models import wide_config

CHUNK, ROWS = 5, 2
RUNS: dict[Kind, int] = {"vision": ROWS, "prefill": 3, "decode": 1}  # of each graph, by `steps`


@dataclass(frozen=True)
class Model:
    config: ModelConfig
    folder: Path  # of the checkpoint
    out: Path  # of what is converted
    keys: tuple[GraphKey, ...]
    quant: str = "none"
    backend: str = "onnx"  # whose default dtype the model is stored in

    def cache(self, tp: int) -> CacheSpec:
        return make_plan(self.config, self.options(tp)).cache

    def options(self, tp: int) -> Options:
        images = (1,) if self.config.text.cross_layers else None
        buckets = Buckets(prefill=(CHUNK,), decode=(ROWS,), images=images, context=16, slots=ROWS)
        return Options(checkpoint=self.folder, out=self.out, tp=tp, buckets=buckets, backend=self.backend)

    def define(self, tp: int) -> dict[Kind, GraphDef]:
        return self._define(tp, self.cache(tp))

    def traced_once(self, tp: int) -> dict[Kind, GraphDef]:
        """The same for all models of these settings: to be emitted, not run."""
        return _definitions(replace(self, folder=Path(), out=Path()), tp, self.cache(tp))

    def _define(self, tp: int, cache: CacheSpec) -> dict[Kind, GraphDef]:
        vision = self.config.vision
        third = (0.3, 0.4, 0.5)
        image = ImageProcessorConfig(mode="stretch", size=vision.image_size, rows=vision.rows_per_tile, mean=third, std=third)
        context = GraphContext(config=self.config, image=image, cache=cache, quant=self.quant, ranks=tp)
        return {key.kind: define_graph(context, key) for key in self.keys}

    def converted(self, tp: int, rank: int) -> Converted:
        source, floats = open_source(self.folder), self.options(tp).floats({})
        merged = self.backend == "ascend"
        conversion = Conversion(quant=self.quant, prefix=f"tp{tp}", ascend=merged, floats=floats, tp=tp, rank=rank)
        return convert(source, self.config, self.out, conversion)


@functools.cache
def _definitions(model: Model, tp: int, cache: CacheSpec) -> dict[Kind, GraphDef]:
    return model._define(tp, cache)


def model_of(family: str, kv_heads: int, folder: Path = Path()) -> Model:
    """Without a folder: to be looked at, not run."""
    config = wide_config(family, kv_heads)
    tiles, images = (config.vision.tiles, 1) if isinstance(config.vision, TiledConfig) else (2, 0)
    keys = GraphKey("vision", tiles), GraphKey("prefill", CHUNK, images), GraphKey("decode", ROWS, images)
    return Model(config, folder, folder, keys)


def steps(backend: Backend, specs: dict[Kind, GraphSpec], caches: Sequence[str]) -> list[np.ndarray]:
    """An image for each of two sequences, two chunks of one and one of the other, a token of both: every first output, then
    the caches."""
    rng = np.random.default_rng(1)
    found = [backend.run(specs["vision"], feed(specs["vision"], rng, [0]), slot).first.copy() for slot in range(ROWS)]
    images = np.concatenate([each.reshape(-1, each.shape[-1]) for each in found])
    for slot, past in ((0, 0), (0, CHUNK), (1, 0)):
        fed = feed(specs["prefill"], rng, [past])
        if "image_rows" in fed:
            fed["image_rows"] = images[slot * CHUNK : (slot + 1) * CHUNK].copy()
        found.append(backend.run(specs["prefill"], fed, slot).first.copy())
    found.append(backend.run(specs["decode"], feed(specs["decode"], rng, [2 * CHUNK, CHUNK])).first.copy())
    return [*found, *(backend.read_cache(name, ROWS) for name in caches)]


def write_steps(model: Model, tp: int, weights: dict[str, WeightSpec], *, exact: bool = False) -> dict[Kind, GraphSpec]:
    """One rank's graphs into the folder of what is converted; `weights` may be those of any rank."""
    specs = {}
    for kind, graph in model.traced_once(tp).items():
        file = f"{graph.name}-tp{tp}"
        emitted = emit_steps(graph, weights, file, exact=exact)
        for name, data in emitted.files.items():
            (model.out / name).parent.mkdir(exist_ok=True)
            (model.out / name).write_bytes(data)
        specs[kind] = msgspec.structs.replace(graph.spec(), file=file, steps=emitted.steps, buffers=emitted.buffers)
    return specs


def communication(graphs: dict[Kind, GraphDef], dtype: str) -> tuple[int, int]:
    """Collective calls of all `steps`, and the bytes that a rank brings to them, as counted from definitions."""
    costs = {kind: graph_cost(graph, dtype) for kind, graph in graphs.items()}
    runs = [(RUNS[kind], cost) for kind, cost in costs.items()]
    return sum(n * cost.collectives for n, cost in runs), sum(n * cost.collective_bytes for n, cost in runs)


def feed(graph: GraphSpec, rng: np.random.Generator, lengths: list[int]) -> dict[str, np.ndarray]:
    """Every input but caches; the same for every rank, since draws do not depend on what a rank holds."""
    return {spec.name: DRAWS[spec.name](rng, spec.shape, lengths) for spec in graph.inputs if not is_cached(spec.name)}


def halves(rng: np.random.Generator, shape: tuple[int, ...], _: list[int]) -> np.ndarray:
    half = rng.standard_normal((*shape[:2], shape[2] // 2), np.float32)
    return np.concatenate((half, half), axis=-1)


def every_other(_: np.random.Generator, shape: tuple[int, ...], __: list[int]) -> np.ndarray:
    """Every other token is a row of an image."""
    place = np.arange(shape[1])
    return np.where(place % 2, place, -1)[None].astype(np.int32)


DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...], list[int]], np.ndarray]] = {
    "pixels": lambda rng, shape, _: rng.integers(0, 256, shape).astype(np.uint8),
    "tile_count": lambda *_: np.array([2], np.int32),
    "aspect_id": lambda *_: np.array([2], np.int32),
    "token_ids": lambda rng, shape, _: rng.integers(0, 80, shape).astype(np.int32),
    "row_index": every_other,
    "image_rows": lambda _, shape, __: np.zeros(shape, np.float32),  # replaced by what the vision graph made
    "lengths": lambda _, __, lengths: np.array(lengths, np.int32),
    "last_index": lambda *_: np.array([CHUNK - 1], np.int32),
    "rope_cos": halves,
    "rope_sin": halves,
    "query_scale": lambda rng, shape, _: rng.uniform(1, 1.5, shape).astype(np.float32),
    "cross_mask": lambda _, shape, __: np.where(np.indices(shape)[2] < 2, 0, CROSS_HIDDEN).astype(np.float32),
    "cross_gate": lambda _, shape, __: np.ones(shape, np.float32),
}


def held(model: Model, whole: list[np.ndarray], rank: int, tp: int) -> list[np.ndarray]:
    """What a rank should find: of keys and values [., K, ., D] those of its heads."""
    kv_heads = model.config.text.kv_heads
    first = rank * kv_heads // tp
    heads = slice(first, first + max(1, kv_heads // tp))
    return [each[:, heads] if each.ndim == 4 else each for each in whole]


def worst_errors(model: Model, ranks: Sequence[list[np.ndarray]], whole: list[np.ndarray]) -> list[float]:
    """The worst error of any rank in each result."""
    worst = [0.0] * len(whole)
    for rank, found in enumerate(ranks):
        expected = held(model, whole, rank, len(ranks))
        worst = [max(e, relative_error(*pair)) for e, *pair in zip(worst, found, expected, strict=True)]
    return worst

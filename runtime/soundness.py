"""Contradictions in a manifest: paths out of the artifact, tensors that do not fit their files or the cache.

Ranges of single numbers are in the types of manifest/; this file checks fields against each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING

from .manifest.graphs import IN_FLOAT32
from .shown import shown

if TYPE_CHECKING:
    from .manifest.files import WeightSpec
    from .manifest.graphs import GraphSpec, TensorSpec
    from .manifest.manifest import Manifest

MOST_BYTES = 1 << 46  # of a cache, or of one tensor of a graph
VOCABULARY = {"tokenizers": "tokenizer.json", "sentencepiece": "tokenizer.model"}  # the files, by kind of tokenizer
TEMPLATE = "chat_template.jinja"
_PAIRS = (("row_index", "image_rows"), ("cross_mask", "cross_gate"), ("tile_count", "aspect_id"))
_CACHES = ("k_cache.", "v_cache.", "cross_k.", "cross_v.")


def faults(manifest: Manifest) -> Iterator[str]:
    """Each contradiction as a part of a sentence; a sound manifest has none."""
    yield from _paths(manifest)
    yield from _settings(manifest)
    for stage in range(manifest.pp):
        part = manifest.of_stage(stage)
        yield from _cache(part)
        yield from _weights(part, stage)
        if stage == 0:  # later stages are fed by the one before
            yield from (f"{graph.name}: {fault}" for graph in part.graphs for fault in _fed(part, graph))
        yield from (f"{graph.name}: {fault}" for graph in part.graphs for fault in _graph(part, graph))
        if len({graph.name for graph in part.graphs}) < len(part.graphs):
            yield "two graphs have one kind and bucket"


def leads_out(name: str) -> bool:
    """Whether a path is anything but a plain path within the artifact."""
    path = PurePath(name)
    return not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name


def _paths(manifest: Manifest) -> Iterator[str]:
    files = set(manifest.files)
    graphs = [graph for stage in range(manifest.pp) for graph in manifest.of_stage(stage).graphs]
    paths = [*files, manifest.tokenizer, *(graph.file for graph in graphs)]
    yield from (f"{name[:200]!r} is a path outside the artifact" for name in paths if leads_out(name))
    tokenizer = manifest.model.tokenizer
    settings = [VOCABULARY.get(tokenizer.kind) or tokenizer.file, TEMPLATE]
    needed = [*(file for graph in graphs for file in graph.files), *(f"{manifest.tokenizer}/{name}" for name in settings)]
    yield from (f"{name[:200]!r} is used but not listed under files" for name in needed if name not in files)


def _settings(manifest: Manifest) -> Iterator[str]:
    if manifest.backend == "ascend" and manifest.ascend is None:
        yield "it has graphs for Ascend, but `ascend` is missing"
    for kind in ("prefill", "decode"):
        if not any(graph.kind == kind for graph in manifest.graphs):
            yield f"there is no {kind} graph"
    image = manifest.model.image
    if any(rows * columns > manifest.model.vocab_size * 64 for rows, columns in image.grids):
        yield "a grid has more tiles than a prompt could have tokens"


def _cache(part: Manifest) -> Iterator[str]:
    cache = part.cache
    if cache.pages and cache.cross:
        yield "the cache has pages and keys of images, which need slots"
    if cache.pages == 1:
        yield "the cache has one page, which no sequence may hold"
    if cache.rows < cache.context:
        yield f"the cache has {cache.rows} rows for a context of {cache.context}"
    elif cache.layers * math.prod(cache.text_shape) > MOST_BYTES or cache.nbytes > MOST_BYTES:
        yield "the cache is larger than any machine's memory"


def _weights(part: Manifest, stage: int) -> Iterator[str]:
    ranks = range(stage * part.tp, (stage + 1) * part.tp) if part.ranks > 1 else [None]
    for name, weight in part.weights.items():
        if math.prod(weight.shape) * weight.width != weight.nbytes:
            yield f"weight {name[:200]!r} has shape {shown(list(weight.shape))}, {weight.dtype}, but {weight.nbytes} bytes"
        for rank in ranks:
            yield from _placed(part, name, weight, rank)


def _placed(part: Manifest, name: str, weight: WeightSpec, rank: int | None) -> Iterator[str]:
    """The fault of a weight's place; `rank` None: the model has one rank."""
    file = weight.file if rank is None else f"weights/rank-{rank}/{PurePath(weight.file).name}"
    spec = part.files.get(file)
    if spec is None:
        yield f"weight {name[:200]!r} lies in {file[:200]!r}, which is not listed under files"
    elif weight.offset + weight.nbytes > spec.nbytes:
        yield f"weight {name[:200]!r} ends after the end of {file[:200]!r}"


def _graph(part: Manifest, graph: GraphSpec) -> Iterator[str]:
    specs = {spec.name: spec for spec in (*graph.inputs, *(graph.buffers or ()), *graph.outputs)}
    yield from (f"{name} is too large" for name, spec in specs.items() if spec.nbytes > MOST_BYTES)
    yield from (f"{fault}" for spec in (*graph.inputs, *graph.outputs) for fault in _cached(part, spec))
    if not graph.files:
        yield "no step of it runs a file"
    if not graph.inputs or not graph.outputs:
        yield "it has no inputs or no outputs"
    used = {name for step in graph.plan for name in step.names}
    yield from (f"a step uses {name[:200]!r}, which is no tensor of the graph" for name in sorted(used - set(specs)))
    weights = (name.removesuffix(IN_FLOAT32) for name in graph.weights)
    yield from (f"weight {name[:200]!r} is unknown" for name in weights if name not in part.weights)
    for name, (dtype, shape) in _expected(part, graph).items():
        if name in specs and (specs[name].dtype, specs[name].shape) != (dtype, shape):
            yield f"{name} is {specs[name].dtype} {shown(list(specs[name].shape))}, expected {dtype} {list(shape)}"


def _fed(part: Manifest, graph: GraphSpec) -> Iterator[str]:
    """Missing inputs: those that every graph of the kind has, and those that come in pairs."""
    names = {spec.name for spec in graph.inputs}
    needed = {"pixels"} if graph.kind == "vision" else {"token_ids", "lengths", "rope_cos", "rope_sin"}
    needed |= {"last_index"} if graph.kind == "prefill" else set()
    needed |= {"block_table", "slot_mapping"} if part.cache.pages and graph.kind != "vision" else set()
    for pair in _PAIRS:
        needed |= set(pair) if names & set(pair) else set()
    yield from (f"it has no input {name}" for name in sorted(needed - names))


def _cached(part: Manifest, spec: TensorSpec) -> Iterator[str]:
    """Faults of a cache among a graph's tensors: it has to be slots of a buffer, or of vision graphs one image's entry."""
    name = spec.name.removesuffix(".out")
    if not name.startswith(_CACHES):
        return
    buffers = part.cache.buffers()
    buffer = buffers.get(name) or buffers.get(f"{name}.0")
    least = part.cache.pages or 1  # a graph sees all pages, and as many slots as it has rows
    if buffer is None:
        yield f"{spec.name[:200]!r} is no part of the cache"
    elif len(spec.shape) != 4 or spec.shape[1:] != buffer[1:] or not least <= spec.shape[0] <= buffer[0]:
        yield f"{spec.name} has shape {shown(list(spec.shape))}, the cache {list(buffer)}"
    elif spec.dtype != part.cache.dtype_of(name):
        yield f"{spec.name} is {spec.dtype}, the cache {part.cache.dtype_of(name)}"


def _expected(part: Manifest, graph: GraphSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of the tensors that the host fills and reads, as docs/artifact.md states them."""
    image, cache = part.model.image, part.cache
    if graph.kind == "vision":
        pixels = ("uint8", (graph.bucket, image.size, image.size, 3))
        return {"pixels": pixels, "tile_count": ("int32", (1,)), "aspect_id": ("int32", (1,))}
    rows, tokens = (graph.bucket, 1) if graph.kind == "decode" else (1, graph.bucket)
    rope, seen = ("float32", (rows, tokens, cache.head_dim)), graph.images * (cache.cross.tiles if cache.cross else 0)
    return {
        "token_ids": ("int32", (rows, tokens)),
        "lengths": ("int32", (rows,)),
        "block_table": ("int32", (rows, cache.table_width)),
        "slot_mapping": ("int32", (rows, tokens)),
        "row_index": ("int32", (1, tokens)),
        "image_rows": ("float32", (tokens, part.model.hidden_size)),
        "last_index": ("int32", (1,)),
        "rope_cos": rope,
        "rope_sin": rope,
        "query_scale": ("float32", (rows, tokens, 1)),
        "cross_mask": ("float32", (rows, tokens, seen)),
        "cross_gate": ("float32", (rows, tokens, 2)),
        "inverse_temperature": ("float32", (rows,)),
        "logits": ("float32", (tokens if graph.kind == "verify" else rows, part.model.vocab_size)),
    }

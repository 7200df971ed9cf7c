"""Small artifacts without files, prompts without text, and the tokens that the fake backend must choose, one at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET
from PIL import Image

from staticvl import runtime
from staticvl.compiler.graphs import GraphContext, define_graph
from staticvl.compiler.model_info import read_model_info
from staticvl.compiler.plan import Buckets, Options, make_plan
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import (
    Artifact,
    BuildInfo,
    CacheSpec,
    CrossSpec,
    GraphSpec,
    ImageProcessorConfig,
    Kind,
    Manifest,
    ModelInfo,
    RopeParameters,
    TensorSpec,
    TokenizerConfig,
    open_artifact,
)
from staticvl.runtime.engine.block_budget import block_budget
from staticvl.runtime.engine.blocks import BlockPool, tokens_in
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.options import EngineOptions
from staticvl.runtime.engine.paged_cache import PagedCache
from staticvl.runtime.engine.scheduler import Step
from staticvl.runtime.processor.images import frame_of
from staticvl.runtime.processor.prompt import CrossAttentionMask, Prompt
from staticvl.runtime.sampling.sampler import sample

from .fake_backend import IMAGE_NUMBERS, FakeBackend

VOCAB = 97  # a prime: sums spread over it evenly
USED = 90
EOS = 2
SIDE = 2  # pixels on each side of a tile
ROWS_PER_TILE = 3
HIDDEN = 4
HEAD_DIM = 4
TILES = 4  # of every image, where images enter by cross-attention
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2))
PREFILL = {4: 1.0, 16: 2.5}
VISION = {1: 1.0, 3: 2.0}

IMAGE = ImageProcessorConfig(mode="crop", size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rows=ROWS_PER_TILE)
FACTS = ModelInfo(
    family="llava",
    layout="hf",
    hidden_size=HIDDEN,
    vocab_size=VOCAB,
    rope=RopeParameters(theta=1e8),
    eos_token_ids=(EOS,),
    image=IMAGE,
    tokenizer=TokenizerConfig(kind="tokenizers", style="hf", bos_token_id=1, add_bos=True, image_token_id=None, used=USED),
)
CROSS_FACTS = msgspec.structs.replace(
    FACTS, family="mllama", image=msgspec.structs.replace(IMAGE, mode="tiles", grids=GRIDS, tiles=TILES)
)

Costs = Mapping[int, float]  # bucket -> milliseconds


def fake_artifact(
    *,
    slots: int = 4,
    context: int = 64,
    prefill: Costs = PREFILL,
    decode: Costs | None = None,
    verify: Costs | None = None,
    vision: Costs = VISION,
    images: tuple[int, ...] = (),
    rope: RopeParameters = FACTS.rope,
    candidates: int = 0,
    pages: int | None = None,
) -> Artifact:
    """An artifact in memory whose graphs only the fake backend can run; with `images`, images enter by cross-attention; with
    `pages`, the text is in pages, page 0 included."""
    decode = decode or dict.fromkeys({1, slots}, 1.0)
    info = msgspec.structs.replace(CROSS_FACTS if images else FACTS, rope=rope)
    cross = CrossSpec(layers=2, images=max(images), rows=TILES * ROWS_PER_TILE, tiles=TILES) if images else None
    spec = CacheSpec(
        layers=1,
        kv_heads=1,
        head_dim=HEAD_DIM,
        slots=slots,
        context=context,
        rows=context + min(prefill),
        dtype="float32",
        cross=cross,
        pages=pages or UNSET,
    )
    sizes: dict[Kind, Costs] = {"prefill": prefill, "decode": decode, "verify": verify or {}}
    graphs = [_vision_graph(bucket, cost, spec) for bucket, cost in ({TILES: 1.0} if images else vision).items()]
    graphs += [
        _text_graph(kind, bucket, count, cost, spec, scaled=rope.logn_positions is not None, candidates=candidates)
        for kind, costs in sizes.items()
        for bucket, cost in costs.items()
        for count in (0, *images)
    ]
    return Artifact(Path(), fake_manifest(info, spec, tuple(graphs)))


def fake_manifest(info: ModelInfo, cache: CacheSpec, graphs: tuple[GraphSpec, ...]) -> Manifest:
    return Manifest(
        backend="onnx",
        quant="none",
        tp=1,
        model=info,
        tokenizer="tokenizer",
        cache=cache,
        graphs=graphs,
        weights={},
        files={},
        build=BuildInfo(staticvl="0", torch="0", options={}, key="", source={}),
    )


def _ints(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="int32", shape=shape)


def _floats(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def _vision_graph(bucket: int, cost_ms: float, spec: CacheSpec) -> GraphSpec:
    """The inputs and outputs that runtime.artifact describes."""
    inputs = [TensorSpec(name="pixels", dtype="uint8", shape=(bucket, SIDE, SIDE, 3))]
    outputs = [_floats("image_rows", bucket, ROWS_PER_TILE, HIDDEN)]
    if cross := spec.cross:
        inputs += [_ints("tile_count", 1), _ints("aspect_id", 1)]
        outputs = [_floats(f"cross_{which}.{i}", 1, 1, cross.rows, HEAD_DIM) for i in range(cross.layers) for which in "kv"]
    return GraphSpec(
        kind="vision",
        bucket=bucket,
        file=f"vision-{bucket}",
        key="",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        cost_ms=cost_ms,
    )


def _text_graph(
    kind: Kind, bucket: int, images: int, cost_ms: float, spec: CacheSpec, *, scaled: bool, candidates: int
) -> GraphSpec:
    """The inputs and outputs that runtime.artifact describes."""
    b, t = (bucket, 1) if kind == "decode" else (1, bucket)
    inputs = [
        _ints("token_ids", b, t),
        _ints("lengths", b),
        *(_floats(f"rope_{name}", b, t, HEAD_DIM) for name in ("cos", "sin")),
    ]
    if kind == "prefill":
        inputs.append(_ints("last_index", 1))
        if not spec.cross:
            inputs += [_ints("row_index", 1, t), _floats("image_rows", t, HIDDEN)]
    if spec.pages:
        inputs += [_ints("block_table", b, spec.table_width), _ints("slot_mapping", b, t)]
    if scaled:
        inputs.append(_floats("query_scale", b, t, 1))
    if cross := (spec.cross if images else None):
        inputs += [_floats("cross_mask", b, t, images * TILES), _floats("cross_gate", b, t, 2)]
        names = [f"cross_{which}.{i}.{j}" for i in range(cross.layers) for which in "kv" for j in range(images)]
        inputs += [_floats(name, b, 1, cross.rows, HEAD_DIM) for name in names]
    rows, top_k_outputs = t if kind == "verify" else b, []
    if candidates:
        inputs.append(_floats("inverse_temperature", b))
        top_k_outputs = [_floats("top_logits", rows, candidates), _ints("top_ids", rows, candidates), _floats("mass", rows)]
    shape = spec.text_shape if spec.pages else (b, 1, spec.rows, HEAD_DIM)
    caches = [_floats(f"{which}_cache.0", *shape) for which in "kv"]
    return GraphSpec(
        kind=kind,
        bucket=bucket,
        images=images,
        file=f"{kind}-{bucket}-{images}",
        key="",
        inputs=(*inputs, *caches),
        outputs=(_floats("logits", rows, VOCAB), *top_k_outputs, *(_floats(f"{c.name}.out", *c.shape) for c in caches)),
        cost_ms=cost_ms,
    )


def fake_engine(
    *, reuse: bool = False, prefill_budget: int | None = None, speculate: int = 0, blocks: int | None = None, **sizes: Any
) -> Engine:
    """An engine over `fake_artifact`; without reuse, every step of every request is there to be counted."""
    artifact = fake_artifact(**sizes)
    cache_gb = gigabytes(artifact.manifest, blocks) if blocks else None
    options = EngineOptions(reuse=reuse, prefill_budget=prefill_budget, speculate=speculate, cache_gb=cache_gb)
    return Engine(artifact.manifest, FakeBackend(artifact.manifest), options)


class Guess:
    """Drafts of an answer that is known, as sampling.prompt_lookup.Lookup makes them: right, or wrong from some token on."""

    def __init__(self, answer: list[int], rng: np.random.Generator) -> None:
        self.answer, self.rng = answer, rng

    def draft(self, answer: list[int], most: int) -> tuple[int, ...]:
        drafted = self.answer[len(answer) : len(answer) + min(most, int(self.rng.integers(0, 9)))]
        if drafted and self.rng.random() < 0.5:
            drafted[self.rng.integers(len(drafted))] = int(self.rng.integers(VOCAB))
        return tuple(drafted)

    def expected(self, count: int) -> float:
        return float("inf")

    def verified(self, right: int, count: int) -> None:
        assert 0 <= right <= count

    def skipped(self) -> None:
        raise AssertionError("it is always worth while")


def text_prompt(*token_ids: int, ntk: float = 1.0) -> Prompt:
    """A prompt without images."""
    ids = np.array(token_ids, np.int32)
    return Prompt(
        token_ids=ids,
        rows=np.full(ids.shape, -1, np.int32),
        pixels=np.zeros((0, SIDE, SIDE, 3), np.uint8),
        frames=(),
        image_tokens=0,
        ntk=ntk,
        state=np.zeros_like(ids),
    )


def image_prompt(*parts: int | np.ndarray, ntk: float = 1.0) -> Prompt:
    """Token ids and images (uint8 [SIDE, SIDE, 3]) as they follow each other; an image takes ROWS_PER_TILE positions."""
    ids: list[int] = []
    rows: list[int] = []
    pixels: list[np.ndarray] = []
    for part in parts:
        if isinstance(part, np.ndarray):
            rows += range(len(pixels) * ROWS_PER_TILE, (len(pixels) + 1) * ROWS_PER_TILE)
            # Any id may stand at an image's positions: it must not be looked at.
            ids += [(len(rows) * 7) % VOCAB] * ROWS_PER_TILE
            pixels.append(part)
        else:
            ids.append(part)
            rows.append(-1)
    stacked = np.stack(pixels) if pixels else np.zeros((0, SIDE, SIDE, 3), np.uint8)
    return dataclasses.replace(
        text_prompt(*ids, ntk=ntk), rows=np.array(rows, np.int32), pixels=stacked, image_tokens=len(pixels) * ROWS_PER_TILE
    )


def cross_prompt(*parts: int | tuple[tuple[int, int], int], seed: int = 0) -> Prompt:
    """Token ids and images (their grid, and a seed of their pixels) as they follow each other; an image takes one position.

    What the positions see is random: any tile of any image, those that are not in use among them, with any gates.
    """
    rng = np.random.default_rng(seed)
    images = [part for part in parts if isinstance(part, tuple)]
    ids = [part if isinstance(part, int) else VOCAB - 1 for part in parts]
    pixels = np.zeros((len(images), TILES, SIDE, SIDE, 3), np.uint8)
    for place, (grid, number) in enumerate(images):
        used = grid[0] * grid[1]
        pixels[place, :used] = np.random.default_rng(number).integers(0, 256, (used, SIDE, SIDE, 3))
    cross_attention = CrossAttentionMask(
        visible=rng.random((len(ids), len(images) * TILES)) < 0.5,
        gates=rng.integers(0, 2, (len(ids), 2)).astype(np.float32),
    )
    return dataclasses.replace(
        text_prompt(*ids),
        pixels=pixels.reshape(-1, SIDE, SIDE, 3),
        frames=tuple(frame_of((9, 9), CROSS_FACTS.image) for _ in images),
        image_tokens=len(images),
        grids=np.array([grid for grid, _ in images], np.int32).reshape(-1, 2),
        cross_attention=cross_attention if images else None,
    )


def image(number: int) -> np.ndarray:
    """An image whose pixels sum to `number`, at most 12 * 254."""
    flat = np.full(SIDE * SIDE * 3, number // 12, np.uint8)
    flat[: number % 12] += 1
    return flat.reshape(SIDE, SIDE, 3)


def oracle(prompt: Prompt, params: runtime.SamplingParams, info: ModelInfo = FACTS) -> list[int]:
    """The tokens of one request on its own: the sum that the fake backend documents, in a plain loop."""
    ntk = int(prompt.ntk)
    total = sum((value + 1) * (position * ntk + 1) for position, value in enumerate(_values(prompt, info)))
    tokens: list[int] = []
    while len(tokens) < params.max_new_tokens:
        tokens.append(_choose(total % info.vocab_size, params, len(tokens), info))
        if tokens[-1] in info.eos_token_ids and not params.ignore_eos:
            break
        value = tokens[-1] + _seen(prompt, prompt.length - 1, info)
        total += (value + 1) * ((prompt.length + len(tokens) - 1) * ntk + 1)
    return tokens


def _values(prompt: Prompt, info: ModelInfo) -> list[int]:
    """What stands at each position of a prompt."""
    numbers = [(int(tile.sum()) + r) % IMAGE_NUMBERS for tile in prompt.pixels for r in range(info.image.rows)]
    values = [numbers[row] if row >= 0 else int(token) for token, row in zip(prompt.token_ids, prompt.rows, strict=True)]
    return [value + _seen(prompt, position, info) for position, value in enumerate(values)]


def _seen(prompt: Prompt, position: int, info: ModelInfo) -> int:
    """What a position gains by looking at images."""
    if prompt.cross_attention is None or prompt.grids is None:
        return 0
    total, tiles = 0, info.image.tiles
    for place in np.flatnonzero(prompt.cross_attention.visible[position]):
        image, tile = divmod(int(place), tiles)
        grid = (int(prompt.grids[image][0]), int(prompt.grids[image][1]))
        used = tile < grid[0] * grid[1]
        aspect_id = 1 + info.image.grids.index(grid)
        total += ((int(prompt.pixels[place].sum()) if used else 0) + (tile + 1) * aspect_id) % IMAGE_NUMBERS
    attention, mlp = map(int, prompt.cross_attention.gates[position])
    return attention * total + mlp


def _choose(hot: int, params: runtime.SamplingParams, position: int, info: ModelInfo) -> int:
    """Greedy takes the one; a sampled token comes from the same row of logits on its own."""
    if not params.temperature:
        return hot
    logits = np.zeros(info.vocab_size, np.float32)
    logits[hot] = 1
    return sample(logits, params.resolved(info.sampling), position, info.tokenizer.used)


def run_all(engine: Engine) -> list[Step]:
    """Step until nothing is left; the steps taken. A run that does not end fails."""
    steps: list[Step] = []
    while not engine.scheduler.idle:
        steps.append(engine.step())
        assert len(steps) < 10_000
    return steps


def check_slots(engine: Engine) -> None:
    """Every slot is free, held by one running sequence, or parked for a chat between its turns."""
    cache = engine.cache
    held = [*(sequence.slot for sequence in engine.scheduler.running), *cache.free_slots, *cache.parked.values()]
    assert sorted(held) == list(range(cache.spec.slots))  # type: ignore[type-var]


def check_blocks(engine: Engine) -> None:
    """Blocks are within the budget, none is lost, and every token that a slot contains is in one of its slot's."""
    cache, pool = engine.cache, engine.cache.blocks
    if isinstance(cache, PagedCache):
        check_pages(engine)
        return
    assert isinstance(pool, BlockPool)
    running = [sequence.held_slot for sequence in engine.scheduler.running]
    assert pool.used == sum(map(pool.held, running))
    assert pool.used + pool.cached == sum(map(pool.held, range(cache.spec.slots))) <= pool.budget
    for slot in range(cache.spec.slots):
        assert cache.lengths[slot] <= tokens_in(pool.held(slot)) <= tokens_in(pool.peaks.get(slot, 0))
    for sequence in engine.scheduler.running:
        assert sequence.room == tokens_in(pool.held(sequence.held_slot))


def check_pages(engine: Engine) -> None:
    """Pages are counted as they are held, the tree is whole, and what a sequence writes next is its own."""
    cache = engine.cache
    assert isinstance(cache, PagedCache)
    pages, running = cache.blocks, [sequence.held_slot for sequence in engine.scheduler.running]
    assert pages.holders == Counter(page for slot in running for page in cache.pages_of(slot))
    assert not pages.holders.keys() & pages.idle.keys() and len(pages.filled) == pages.used + pages.cached <= pages.budget
    assert all(pages.parents[child] == parent for parent, children in pages.children.items() for child in children)
    assert len(pages.parents) == sum(map(len, pages.children.values()))
    seen: set[int] = set()
    for page in pages.idle:  # a child is evicted before its parent
        assert not pages.children.get(page, {}).keys() - seen
        seen.add(page)
    for slot in range(cache.spec.slots):
        own, length = cache.pages_of(slot), int(cache.lengths[slot])
        assert cache.tables[slot].tolist() == own + [0] * (cache.spec.table_width - len(own))
        assert slot in running or (not own and not length)
        starts = range(0, len(own) * cache.page_tokens, cache.page_tokens)
        assert [pages.filled[page] for page in own] == [min(max(length - start, 0), cache.page_tokens) for start in starts]
        assert all(pages.alone(page) for page in own[length // cache.page_tokens :])
    for sequence in engine.scheduler.running:
        assert sequence.room == tokens_in(len(cache.pages_of(sequence.held_slot)))


def gigabytes(manifest: Manifest, blocks: int) -> float:
    """A cache_gb that allows so many blocks."""
    return (blocks + 0.5) * block_budget(manifest, None).block_bytes / 1e9


def noise(seed: int, size: tuple[int, int] = (70, 50)) -> Image.Image:
    """An image of random pixels, `size` wide and high."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@cache
def loaded(folder: Path) -> runtime.Model:
    """A compiled artifact, opened once for the whole suite; without reuse, so that a fresh prompt is computed afresh."""
    return runtime.load(folder, reuse=False)


def lent(folder: Path) -> Iterator[runtime.Model]:
    """A compiled artifact for one test, which must leave nothing behind: no slot, no request."""
    model = loaded(folder)
    yield model
    assert model.engine.cache.free == model.engine.cache.spec.slots
    assert model.engine.scheduler.idle


def loaded_with_fake(folder: Path, *, reuse: bool = False) -> runtime.Model:
    """The tokenizer, template and buckets of a compiled artifact over a fake backend: fast enough for random conversations."""
    artifact = open_artifact(folder)
    return runtime.Model(artifact, Engine(artifact.manifest, FakeBackend(artifact.manifest), EngineOptions(reuse=reuse)))


def fake_model(
    checkpoint: Path,
    folder: Path,
    buckets: Buckets,
    *,
    reuse: bool = False,
    prefill_budget: int | None = None,
    speculate: int = 0,
    blocks: int | None = None,
    pages: int | None = None,
    **changes: Any,
) -> runtime.Model:
    """A checkpoint's tokenizer, template, settings and plan over a fake backend; nothing is compiled, no weights are read.

    `changes` are fields of its ModelInfo.
    """
    config = read_config(checkpoint)
    info, settings = read_model_info(checkpoint, config, vision_tower=None)
    plan = make_plan(config, Options(checkpoint=checkpoint, out=folder, buckets=buckets))
    for name, data in settings.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    cache = msgspec.structs.replace(plan.cache, pages=pages) if pages else plan.cache
    context = GraphContext(config=config, image=info.image, cache=cache)
    definitions = [define_graph(context, key) for key in plan.graphs]
    graphs = tuple(graph.spec(graph.name, cost_ms=float(graph.bucket)) for graph in definitions)
    artifact = Artifact(folder, fake_manifest(msgspec.structs.replace(info, **changes), cache, graphs))
    cache_gb = gigabytes(artifact.manifest, blocks) if blocks else None
    options = EngineOptions(reuse=reuse, prefill_budget=prefill_budget, speculate=speculate, cache_gb=cache_gb)
    return runtime.Model(artifact, Engine(artifact.manifest, FakeBackend(artifact.manifest), options))

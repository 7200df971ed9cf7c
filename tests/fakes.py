"""Small artifacts without files, prompts without text, and the tokens that the fake backend must choose, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from staticvl import runtime
from staticvl.runtime.artifact import (
    Artifact,
    BuildFacts,
    CacheSpec,
    GraphSpec,
    ImageFacts,
    Kind,
    Manifest,
    ModelFacts,
    TensorSpec,
    TokenizerFacts,
    open_artifact,
)
from staticvl.runtime.backends.fake import PICTURE_NUMBERS, FakeBackend
from staticvl.runtime.engine import Engine
from staticvl.runtime.prompt import Prompt
from staticvl.runtime.sampler import sample
from staticvl.runtime.scheduler import Step

VOCAB = 97  # a prime: sums spread over it evenly
USED = 90
EOS = 2
SIDE = 2  # pixels on each side of a tile
ROWS_PER_TILE = 3
HIDDEN = 4
HEAD_DIM = 4
PREFILL = {4: 1.0, 16: 2.5}
VISION = {1: 1.0, 3: 2.0}

FACTS = ModelFacts(
    family="llava",
    layout="hf",
    hidden_size=HIDDEN,
    vocab_size=VOCAB,
    rope_theta=1e8,
    eos_token_ids=(EOS,),
    image=ImageFacts(mode="crop", size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rows=ROWS_PER_TILE),
    tokenizer=TokenizerFacts(kind="tokenizers", style="hf", bos_token_id=1, add_bos=True, image_token_id=None, used=USED),
)

Costs = Mapping[int, float]  # bucket -> milliseconds


def fake_artifact(
    *, slots: int = 4, context: int = 64, prefill: Costs = PREFILL, decode: Costs | None = None, vision: Costs = VISION
) -> Artifact:
    """An artifact in memory whose graphs only the fake backend can run."""
    decode = decode or dict.fromkeys({1, slots}, 1.0)
    cache_spec = CacheSpec(
        layers=1, kv_heads=1, head_dim=HEAD_DIM, slots=slots, context=context, rows=context + min(prefill), dtype="float32"
    )
    sizes: dict[Kind, Costs] = {"vision": vision, "prefill": prefill, "decode": decode}
    manifest = Manifest(
        backend="onnx",
        quant="none",
        tp=1,
        model=FACTS,
        tokenizer="tokenizer",
        cache=cache_spec,
        graphs=tuple(_graph(kind, bucket, cost, cache_spec) for kind, costs in sizes.items() for bucket, cost in costs.items()),
        weights={},
        files={},
        build=BuildFacts(staticvl="0", torch="0", options={}, key="", source={}),
    )
    return Artifact(Path(), manifest)


def _graph(kind: Kind, bucket: int, cost_ms: float, spec: CacheSpec) -> GraphSpec:
    """The inputs and outputs that runtime.artifact describes."""
    b, t = (1, bucket) if kind == "prefill" else (bucket, 1)

    def ints(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="int32", shape=shape)

    def floats(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    if kind == "vision":
        inputs = [TensorSpec(name="pixels", dtype="uint8", shape=(bucket, SIDE, SIDE, 3))]
        outputs = [floats("image_rows", bucket, ROWS_PER_TILE, HIDDEN)]
    else:
        caches = [floats(f"{which}_cache.0", b, 1, spec.rows, HEAD_DIM) for which in "kv"]
        ropes = [floats(name, b, t, HEAD_DIM) for name in ("rope_cos", "rope_sin")]
        pictures = (
            [ints("row_index", 1, t), floats("image_rows", t, HIDDEN), ints("last_index", 1)] if kind == "prefill" else []
        )
        inputs = [ints("token_ids", b, t), ints("lengths", b), *pictures, *ropes, *caches]
        outputs = [floats("logits", b, VOCAB), *(floats(f"{c.name}.out", *c.shape) for c in caches)]
    return GraphSpec(
        kind=kind, bucket=bucket, file=f"{kind}-{bucket}", key="", inputs=tuple(inputs), outputs=tuple(outputs), cost_ms=cost_ms
    )


def fake_engine(**sizes: int | Costs) -> Engine:
    """An engine over `fake_artifact`."""
    artifact = fake_artifact(**sizes)  # type: ignore[arg-type]
    return Engine(artifact, backend=FakeBackend(artifact.manifest))


def text_prompt(*token_ids: int) -> Prompt:
    """A prompt without pictures."""
    ids = np.array(token_ids, np.int32)
    return Prompt(
        token_ids=ids, rows=np.full(ids.shape, -1, np.int32), pixels=np.zeros((0, SIDE, SIDE, 3), np.uint8), frames=()
    )


def picture_prompt(*parts: int | np.ndarray) -> Prompt:
    """Token ids and pictures (uint8 [SIDE, SIDE, 3]) as they follow each other; a picture takes ROWS_PER_TILE positions."""
    ids: list[int] = []
    rows: list[int] = []
    pixels: list[np.ndarray] = []
    for part in parts:
        if isinstance(part, np.ndarray):
            rows += range(len(pixels) * ROWS_PER_TILE, (len(pixels) + 1) * ROWS_PER_TILE)
            # Any id may stand at a picture's positions: it must not be looked at.
            ids += [(len(rows) * 7) % VOCAB] * ROWS_PER_TILE
            pixels.append(part)
        else:
            ids.append(part)
            rows.append(-1)
    stacked = np.stack(pixels) if pixels else np.zeros((0, SIDE, SIDE, 3), np.uint8)
    return Prompt(token_ids=np.array(ids, np.int32), rows=np.array(rows, np.int32), pixels=stacked, frames=())


def picture(number: int) -> np.ndarray:
    """A picture whose pixels sum to `number`, at most 12 * 254."""
    flat = np.full(SIDE * SIDE * 3, number // 12, np.uint8)
    flat[: number % 12] += 1
    return flat.reshape(SIDE, SIDE, 3)


def oracle(prompt: Prompt, params: runtime.SamplingParams, facts: ModelFacts = FACTS) -> list[int]:
    """The tokens of one request on its own: the sum that the fake backend documents, in a plain loop."""
    total = sum((value + 1) * (position + 1) for position, value in enumerate(_values(prompt, facts.image.rows)))
    tokens: list[int] = []
    while len(tokens) < params.max_new_tokens:
        tokens.append(_choose(total % facts.vocab_size, params, len(tokens), facts))
        if tokens[-1] in facts.eos_token_ids and not params.ignore_eos:
            break
        total += (tokens[-1] + 1) * (prompt.length + len(tokens))
    return tokens


def _values(prompt: Prompt, rows_per_tile: int) -> list[int]:
    """What stands at each position of a prompt."""
    numbers = [(int(tile.sum()) + r) % PICTURE_NUMBERS for tile in prompt.pixels for r in range(rows_per_tile)]
    return [numbers[row] if row >= 0 else int(token) for token, row in zip(prompt.token_ids, prompt.rows, strict=True)]


def _choose(hot: int, params: runtime.SamplingParams, position: int, facts: ModelFacts) -> int:
    """Greedy takes the one; a sampled token comes from the same row of logits on its own."""
    if not params.temperature:
        return hot
    logits = np.zeros(facts.vocab_size, np.float32)
    logits[hot] = 1
    return sample(logits, params.resolved(facts.sampling), position, facts.tokenizer.used)


def run_all(engine: Engine) -> list[Step]:
    """Step until nothing is left; the steps taken. A run that does not end fails."""
    steps: list[Step] = []
    while not engine.scheduler.idle:
        steps.append(engine.step())
        assert len(steps) < 10_000
    return steps


def check_slots(engine: Engine, kept: int = 0) -> None:
    """Every slot is free, held by one running sequence, or one of the `kept` that chats hold between turns."""
    running = engine.scheduler.running
    used = [sequence.slot for sequence in running]
    assert len(used) == len(set(used))
    assert not set(used) & set(engine.cache._free)
    passing = sum(not sequence.keep_slot for sequence in running)
    assert passing + engine.cache.free + kept == engine.cache.spec.slots


def noise(seed: int, size: tuple[int, int] = (70, 50)) -> Image.Image:
    """A picture of random pixels, `size` wide and high."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@cache
def loaded(folder: Path) -> runtime.Model:
    """A compiled artifact, opened once for the whole suite."""
    return runtime.load(folder)


def lent(folder: Path) -> Iterator[runtime.Model]:
    """A compiled artifact for one test, which must leave nothing behind: no slot, no request, no text."""
    model = loaded(folder)
    yield model
    assert model.engine.cache.free == model.engine.cache.spec.slots
    assert model.engine.scheduler.idle
    assert not model.texts


def loaded_with_fake(folder: Path) -> runtime.Model:
    """The tokenizer, template and buckets of a compiled artifact over a fake backend: fast enough for random conversations."""
    artifact = open_artifact(folder)
    return runtime.Model(artifact, Engine(artifact, backend=FakeBackend(artifact.manifest)))

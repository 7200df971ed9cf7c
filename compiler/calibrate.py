"""Calibration: the model runs layer by layer over a few prompts. Weights are quantised by the inputs of their layers, the cache
by its largest values.

The definitions compute in float32, each layer over all prompts before the next is read: in memory are one layer's weights, the
second moments of its inputs, and the hidden states, 4 C bytes for each token. Keys and values of images that enter
by cross-attention lie in files meanwhile.

T tokens of a prompt, C hidden size, K kv heads, D head dim, X keys of an image, P rows of features per tile.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..model_defs import ops
from ..model_defs.config import ModelConfig, TextConfig, text_quant, tower_quant
from ..model_defs.decoder import Block, CrossBlock
from ..model_defs.layers import Linear
from ..runtime.artifact import CROSS_HIDDEN, CacheSpec, GraphKey, ModelInfo
from ..runtime.processor.processor import Processor
from ..runtime.processor.prompt import Prompt
from ..runtime.rope import query_scales, rope_tables
from ..weights.calibrated_layers import CalibratedLayers, Layer, decoder_folds, layer_of, smoothed, stored_by_ranks, tower_folds
from ..weights.convert import parameters
from ..weights.input_statistics import StatisticsCollector
from ..weights.names import is_cache_scale
from ..weights.smoothing import Fold
from ..weights.source import Source
from ..weights.storage import stored_targets
from ..weights.writer import check_space
from .calibration import METHODS, Calibration, CalibrationError
from .graphs import GraphContext, define_graph
from .progress import Progress

CHUNK = 256  # tokens that attend at once
# The largest value of a cache in 8 bits, relative to the largest of the prompts: other prompts, and quantised weights, may give
# larger ones. Steps are wider by as much; docs/quantisation.md has figures.
CACHE_MARGIN = 1.5
LEAST_SCALE = 2**-20  # of channels that are nearly zero; float16 still holds it


class Watch:
    """Collects input statistics of linear layers of a block; `weights` [tokens] are those of the next tokens."""

    def __init__(self, block: nn.Module, names: Iterable[str], *, moment: bool) -> None:
        self.weights: Tensor | None = None
        self.gathered: dict[str, StatisticsCollector] = {}
        for name in sorted(names):
            linear = block.get_submodule(name)
            assert isinstance(linear, Linear)
            self.gathered[name] = StatisticsCollector(linear.weight.shape[1], moment=moment)
            linear.register_forward_pre_hook(partial(self._note, name))

    def _note(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.gathered[name].add(args[0], self.weights)


Largest = tuple[Tensor, Tensor]  # of keys and of values


@dataclass(slots=True, eq=False)
class Passing:
    """One prompt while it passes through the model. `cross` are the files of its images' keys and values, by image."""

    prompt: Prompt
    feed: dict[str, Tensor]
    weights: Tensor  # [T], the weight of each token in second moments
    features: Tensor | None = None  # [tiles * P, C], where images are tokens
    cross: list[Path] = field(default_factory=list)
    x: Tensor = field(default_factory=lambda: torch.empty(0))  # [1, T, C]


def prompts_of(calibration: Calibration, processor: Processor, context: int) -> list[Prompt]:
    """The conversations as prompts; raises CalibrationError naming one that cannot be used, or is longer than the context."""
    prompts = []
    for conversation in calibration.conversations:
        is_open = conversation.messages[-1].role != "assistant"
        try:
            prompt = processor.prompt(conversation.messages, conversation.images, add_generation_prompt=is_open)
        except ValueError as error:
            raise CalibrationError(f"calibration, {conversation.name}: {error}") from error
        if prompt.length > context:
            more = f", or give --context {prompt.length} or more" if processor.info.can_hold(prompt.length) else ""
            raise CalibrationError(
                f"calibration, {conversation.name}: {prompt.length} tokens, but the artifact holds {context}; shorten it{more}"
            )
        prompts.append(prompt)
    return prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationContext:
    """The model whose layers are calibrated, for quantisation `quant` and sharded over `tp` ranks.

    `config` is that of the whole model and `cache` that of one rank that holds it. `store` takes the finished layers.
    """

    config: ModelConfig
    info: ModelInfo
    cache: CacheSpec
    quant: str
    tp: int
    store: CalibratedLayers


@torch.inference_mode()
def calibrate(source: Source, context: CalibrationContext, prompts: Sequence[Prompt], progress: Progress) -> None:
    """Fill the store with every layer of the decoder, whole or sharded, except layers that it has already.
    Where weights are not quantised by their inputs, it gets only the scales of a cache in 8 bits.

    Raises WeightsError as `convert`, and where disk space is short.
    """
    config, store, quant = context.config, context.store, context.quant
    layers = range(config.text.layers)
    last = f"text.layers.{layers[-1]}"
    if store.has(last):  # they are made in order, those of the tower first
        return
    images = sum(len(prompt.frames) for prompt in prompts)
    check_space(store.out, _disk_bytes(config, context.cache, images, quant))
    read = parameters(source, config)
    passing = [Passing(prompt, text_feed(config.text, context.info, prompt), token_weights(prompt)) for prompt in prompts]
    with _emptied(store.folder / "images") as work:
        with progress.stage("calibrating: images", images, "image") as advance:
            tower = _see(context, passing, read, work, advance)
        for stem, (layer, watch) in tower.items():
            _store_quantised(context, stem, layer, watch, tower_folds())
        tower.clear()
        table = read("text.embed.weight")
        for each in passing:
            each.x = embedded(table, each)
        del table
        with progress.stage("calibrating: layers", len(layers), "layer") as advance:
            for i in layers:
                _layer(context, i, passing, read)
                advance(1)


def _disk_bytes(config: ModelConfig, cache: CacheSpec, images: int, quant: str) -> int:
    """Bytes on disk until the weight files are written: finished layers, and keys and values of images."""
    stored = stored_targets(config, quant).items()
    layers = sum(part.nbytes for name, part in stored if layer_of(name, quant) and (quant in METHODS or is_cache_scale(name)))
    if not (cross := cache.cross):
        return layers
    return layers + 2 * 4 * cross.layers * images * cache.kv_heads * cross.rows * cache.head_dim


def text_feed(text: TextConfig, info: ModelInfo, prompt: Prompt) -> dict[str, Tensor]:
    """The inputs of layers besides hidden states, for all tokens of a prompt; names as in docs/artifact.md."""
    cos, sin = rope_tables(info.rope, text.head_dim, prompt.length, prompt.ntk)
    feed = {"rope_cos": cos[None], "rope_sin": sin[None]}
    if text.rope.logn_positions:
        feed["query_scale"] = query_scales(info.rope, prompt.length)[None, :, None]
    if cross_attention := prompt.cross_attention:
        feed["cross_mask"] = np.where(cross_attention.visible, 0, CROSS_HIDDEN).astype(np.float32)[None]
        feed["cross_gate"] = cross_attention.gates[None]
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feed.items()}


def token_weights(prompt: Prompt) -> Tensor:
    """The weight of each token in second moments, [T]. All tokens of images together weigh no more than the text, which is far
    shorter and decides the answers."""
    imaged = torch.from_numpy(np.array(prompt.rows)) >= 0
    text = int((~imaged).sum())
    return torch.where(imaged, min(1.0, text / max(len(imaged) - text, 1)), 1.0)


def embedded(table: Tensor, each: Passing) -> Tensor:
    """[1, T, C]: embeddings, and features where images stand."""
    ids = torch.from_numpy(each.prompt.token_ids)[None]
    x = ops.embed(ids, table).float()
    if each.features is None or not len(each.features):
        return x
    return ops.merge_rows(x, each.features, torch.from_numpy(each.prompt.rows)[None])


# ---- images


def _see(
    context: CalibrationContext,
    passing: Iterable[Passing],
    read: Callable[[str], Tensor],
    work: Path,
    advance: Callable[[int], object],
) -> dict[str, tuple[Layer, Watch]]:
    """Run the images of all prompts through the vision graph; where the tower is quantised, its layers and their inputs."""
    config, info, cache = context.config, context.info, context.cache
    seeing = [each for each in passing if len(each.prompt.pixels)]
    if not seeing:
        return {}
    tiles = info.image.tiles if cache.cross else 1
    graph = define_graph(GraphContext(config=config, image=info.image, cache=cache), GraphKey("vision", tiles))
    own = {name for name, _ in graph.module.named_parameters()} - graph.constants.keys()
    _fill(graph.module, {name: read(name) for name in own} | {k: torch.from_numpy(v) for k, v in graph.constants.items()})
    tower = _watched_tower(graph.module) if tower_quant(context.quant) != "none" else {}
    for number, each in enumerate(seeing):
        pixels = torch.from_numpy(np.array(each.prompt.pixels))
        if cache.cross is None:
            rows = [graph.module(tile[None]).flatten(0, 1) for tile in pixels]
            each.features = torch.cat(rows)
        else:
            assert each.prompt.grids is not None
            for image, grid in enumerate(each.prompt.grids):
                part = pixels[image * tiles : (image + 1) * tiles]
                count = torch.tensor([int(grid[0] * grid[1])], dtype=torch.int32)
                aspect = torch.tensor([1 + info.image.grids.index((int(grid[0]), int(grid[1])))], dtype=torch.int32)
                each.cross.append(_save_keys(work / f"{number}.{image}", graph.module(part, count, aspect)))
        advance(len(each.prompt.frames))
    return tower


def _watched_tower(module: nn.Module) -> dict[str, tuple[Layer, Watch]]:
    """The blocks of a vision graph's tower, with hooks that collect the inputs of their linear layers."""
    blocks: dict[str, tuple[Layer, Watch]] = {}
    for stem, block in module.named_modules():
        if re.fullmatch(r"vision\.(global_)?layers\.\d+", stem):
            layer = {name: value.data for name, value in block.named_parameters()}
            blocks[stem] = layer, Watch(block, tower_folds(), moment=False)
    return blocks


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A temporary folder, emptied first: an interrupted run may have left one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def _save_keys(folder: Path, keys: Sequence[Tensor]) -> Path:
    """Keys and values [1, K, X, D] of an image, layer by layer, written to a folder."""
    folder.mkdir()
    for i, value in enumerate(keys):
        np.save(folder / f"{i}.npy", value.numpy())
    return folder


def _load_keys(each: Passing, j: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of all images of a prompt for cross layer `j`."""
    keys, values = ([torch.from_numpy(np.load(folder / f"{2 * j + i}.npy")) for folder in each.cross] for i in (0, 1))
    return keys, values


# ---- layers


def _layer(context: CalibrationContext, index: int, passing: Sequence[Passing], read: Callable[[str], Tensor]) -> None:
    """Pass all prompts through one layer, and quantise it unless that is done."""
    config, store, quant = context.config, context.store, context.quant
    text, stem = replace(config.text, int8_cache=False), f"text.layers.{index}"
    crosses = index in text.cross_layers
    with torch.device("meta"):
        block = (CrossBlock if crosses else Block)(text, "none", 1)
    layer: Layer = {name: read(f"{stem}.{name}").float() for name, _ in block.named_parameters()}
    _fill(block, layer)
    takers = [each for each in passing if each.cross] if crosses else passing
    places = decoder_folds(text, index)
    missing = not store.has(stem)
    watch = Watch(block, {*places, "attn.o"}, moment=quant.startswith("w4a16")) if missing and quant in METHODS else None
    largest: list[Largest] = []
    for each in takers:
        keys = _load_keys(each, text.cross_layers.index(index)) if crosses else None
        each.x, cache = _through(text, block, each, keys, watch)
        if not crosses:
            largest.append(largest_in(*cache))
    scales = cache_scales(largest) if config.text.int8_cache and not crosses else {}
    if watch:
        _store_quantised(context, stem, layer | scales, watch, places)
    elif missing:
        store.write(stem, stored_by_ranks(config, stem, scales, {}, "none", context.tp))


def largest_in(keys: Tensor, values: Tensor) -> Largest:
    """The largest magnitude of each channel of keys and of values in a cache [1, K, T, D]: [K * D] each.

    Keys are cached after the rotary embedding, which rotates channels d and d + D / 2 into each other: at a position that no
    prompt has, either may reach the norm of the pair.
    """
    first, second = keys.chunk(2, dim=-1)
    radii = first.hypot(second).amax((0, 2))  # [K, D / 2]
    return torch.cat((radii, radii), dim=-1).flatten(), values.abs().amax((0, 2)).flatten()


def cache_scales(largest: Sequence[Largest]) -> Layer:
    """Scales of one layer's cache."""
    scales = [torch.stack(each).amax(0) * CACHE_MARGIN / 127 for each in zip(*largest, strict=True)]
    return {f"attn.{which}_scale": scale.clamp(min=LEAST_SCALE) for which, scale in zip("kv", scales, strict=True)}


def _store_quantised(context: CalibrationContext, stem: str, layer: Layer, watch: Watch, places: Mapping[str, Fold]) -> None:
    """Store a layer, quantised by the statistics of its inputs."""
    inputs = {name: collector.statistics() for name, collector in watch.gathered.items()}
    layer = {name: value.float() for name, value in layer.items()}
    layer, inputs = smoothed(layer, inputs, places, text_quant(context.quant))
    context.store.write(stem, stored_by_ranks(context.config, stem, layer, inputs, context.quant, context.tp))


def _through(
    text: TextConfig,
    block: nn.Module,
    each: Passing,
    keys: tuple[list[Tensor], list[Tensor]] | None,
    watch: Watch | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A prompt's hidden states after a layer, some tokens at a time, and its cache."""
    length = each.prompt.length
    keys_values = torch.zeros(2, 1, text.kv_heads, length, text.head_dim)
    cache = keys_values[0], keys_values[1]
    chunks = []
    for start in range(0, length, CHUNK):
        span = slice(start, start + CHUNK)
        if watch:
            watch.weights = each.weights[span]
        feed = {name: value[:, span] for name, value in each.feed.items()}
        if keys:
            chunks.append(block(each.x[:, span], feed, *keys))
        else:
            x, cache = block(each.x[:, span], feed | {"lengths": torch.tensor([start], dtype=torch.int32)}, cache)
            chunks.append(x)
    return torch.cat(chunks, dim=1), cache


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put weights into a definition; linear layers upcast theirs themselves, everything else is computed in float32."""
    narrow = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, Linear)}
    state = {name: value if name in narrow else value.float() for name, value in tensors.items()}
    module.load_state_dict(state, strict=True, assign=True)

"""A side that staticvl runs: an artifact on its device, or the definitions over a checkpoint's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from ...compiler.lockstep import LockstepBackend, with_all_heads
from ...compiler.lockstep_stages import PipelineBackend, whole_pipeline
from ...model_defs.config import ModelConfig, decode_config
from ...runtime.artifact import DEFINITION, Artifact, Manifest, ModelInfo, WeightSpec, open_artifact, rank_weights
from ...runtime.backends.ascend.weights import map_weight
from ...runtime.backends.base import Backend, Group
from ...runtime.backends.open import open_backend
from ...runtime.engine.engine import Engine
from ...runtime.engine.options import EngineOptions
from ...runtime.engine.request import SamplingParams
from ...runtime.model import Model
from ...runtime.processor.boxes import Box
from ...runtime.processor.processor import Processor
from ...runtime.processor.prompt import CrossAttentionMask, Prompt
from ...runtime.rope import query_scales, rope_tables
from ..bench import repeat_last
from .checkpoint import Checkpoint, with_heads
from .forced import ForcedAnswer
from .inputs import Resizing
from .samples import Sample
from .sides import HIDDEN_TOKEN, Generated, Prepared, Side


@dataclass(frozen=True, slots=True)
class StaticPrepared:
    """See sides.Prepared."""

    prompt: Prompt
    info: ModelInfo
    head_dim: int

    @property
    def length(self) -> int:
        return self.prompt.length

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        prompt, image = self.prompt, self.info.image
        ids = np.where(self._image_positions, HIDDEN_TOKEN, prompt.token_ids)
        inputs: dict[str, np.ndarray] = {"token_ids": ids, "row_index": prompt.rows}
        cos, sin = rope_tables(self.info.rope, self.head_dim, self.length, prompt.ntk)
        inputs |= {"rope_cos": cos, "rope_sin": sin}
        if self.info.rope.logn_positions:
            inputs["query_scale"] = query_scales(self.info.rope, self.length)
        if len(prompt.pixels):
            inputs["pixels"] = self.pixels
        if prompt.grids is not None and len(prompt.grids):
            inputs["aspect_id"] = np.array([1 + image.grids.index((int(r), int(c))) for r, c in prompt.grids])
        if prompt.cross_attention:
            inputs["tiles_seen"] = prompt.cross_attention.visible.astype(np.int64)
        return inputs

    @property
    def pixels(self) -> np.ndarray:
        """The tiles that are not padding, normalised as a vision graph does it: float32 [tiles, S, S, 3]."""
        image = self.info.image
        mean, std = np.array(image.mean), np.array(image.std)
        return ((self.prompt.pixels[self._used_tiles] * image.rescale - mean) / std).astype(np.float32)

    @property
    def _image_positions(self) -> np.ndarray:
        """A mask of the positions that are an image's, newlines between its rows included."""
        newline = self.info.image.newline_id
        return (self.prompt.rows >= 0) | (self.prompt.token_ids == (-2 if newline is None else newline))

    @property
    def _used_tiles(self) -> np.ndarray:
        """Indices of the tiles that are not padding."""
        tiles = np.arange(len(self.prompt.pixels))
        if self.prompt.grids is None or not len(self.prompt.grids):
            return tiles
        each = len(tiles) // len(self.prompt.grids)
        return tiles[tiles % each < np.repeat(self.prompt.grids.prod(axis=1), each)]

    def with_tokens(self, length: int, ids: np.ndarray) -> StaticPrepared:
        prompt, more = self.prompt, max(0, length - self.length)
        cross_attention = prompt.cross_attention
        if cross_attention:
            cross_attention = CrossAttentionMask(
                visible=repeat_last(cross_attention.visible, more)[:length],
                gates=repeat_last(cross_attention.gates, more)[:length],
            )
        extended = dataclasses.replace(
            prompt,
            token_ids=np.concatenate((prompt.token_ids, ids[:more].astype(np.int32)))[:length],
            rows=np.concatenate((prompt.rows, np.full(more, -1, np.int32)))[:length],
            state=np.zeros(length, np.int32),
            cross_attention=cross_attention,
        )
        return dataclasses.replace(self, prompt=extended)


class StaticSide:
    """See sides.Side."""

    def __init__(
        self,
        name: str,
        artifact: Artifact,
        backend: Backend,
        config: ModelConfig | None,
        *,
        compiled: bool,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """`compiled`: it runs the graphs of the artifact, not the definitions."""
        self.name, self.artifact, self.config, self.checkpoint = name, artifact, config, checkpoint
        self.info = artifact.manifest.model
        self.compiled = compiled
        self.engine = Engine(artifact.manifest, backend, EngineOptions(reuse=False))
        self.model = Model(artifact, self.engine)
        self.processor = self.model.processor

    @property
    def manifest(self) -> Manifest | None:
        return self.artifact.manifest if self.compiled else None

    def close(self) -> None:
        if self.checkpoint:
            self.checkpoint.close()

    def prepare(self, sample: Sample) -> StaticPrepared:
        prompt = self.processor.prompt(sample.messages, sample.images)
        return StaticPrepared(prompt, self.info, self.artifact.manifest.cache.head_dim)

    def run_forced(
        self,
        prompts: Sequence[Prepared],
        answers: Sequence[np.ndarray],
        *,
        route: dict[str, int] | None = None,
        caches: bool = False,
    ) -> list[Generated]:
        slots = self.artifact.manifest.cache.slots
        generated: list[Generated] = []
        with self.engine.scheduler.only(route or {}):
            batch = 1 if caches else slots  # a slot is written again as soon as its sequence has ended
            for start in range(0, len(prompts), batch):
                span = slice(start, start + batch)
                generated += self._run_batch(prompts[span], answers[span], caches)
        return generated

    def _run_batch(self, prompts: Sequence[Prepared], answers: Sequence[np.ndarray], caches: bool) -> Iterator[Generated]:
        sources = [ForcedAnswer(answer, self.engine.cache) for answer in answers]
        sequences = []
        for prompt, source in zip(prompts, sources, strict=True):
            assert isinstance(prompt, StaticPrepared)
            params = SamplingParams(max_new_tokens=len(source.tokens), temperature=0.0, ignore_eos=True)
            sequences.append(self.engine.new_sequence(prompt.prompt, params, return_logits=True, token_source=source))
        for source, prompt, out in zip(sources, prompts, self.model.run(sequences), strict=True):
            assert out.logits is not None
            positions = prompt.length + len(out.token_ids) - 1
            yield Generated(out.logits, self._caches(source, positions) if caches else {})

    def _caches(self, source: ForcedAnswer, positions: int) -> dict[str, np.ndarray]:
        names = [name for name in self.artifact.manifest.cache.buffers() if name[:2] in ("k_", "v_")]
        values = {name: self._dequantised(name, self._rows(name, source)[:, :positions]) for name in names}
        heads = self.config.text.kv_heads if self.config else 0
        # Where there are more ranks than heads, neighbours hold the same one.
        return {
            name: value[:: len(value) // heads] if heads and len(value) > heads else value for name, value in values.items()
        }

    def _rows(self, name: str, source: ForcedAnswer) -> np.ndarray:
        """The rows [K, S, D] of a cache that a sequence has written; its pages are not written again before the next one."""
        read = self.engine.backend.read_cache
        if not source.pages:
            return read(name, source.slot + 1)[source.slot]
        return np.moveaxis(np.concatenate(read(name, max(source.pages) + 1)[source.pages]), 1, 0)

    def _dequantised(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows [K, S, D] of a cache in float32, dequantised where the cache is quantised."""
        if not self.artifact.manifest.cache.text_dtype:
            return rows
        assert self.config is not None, "a cache in 8 bits is newer than definition.json"
        which, _, number = name.partition("_cache.")
        layer = [i for i in range(self.config.text.layers) if i not in self.config.text.cross_layers][int(number)]
        scales = [
            map_weight(self.artifact.folder, weights[f"text.layers.{layer}.attn.{which}_scale"])
            for weights in self.rank_weights
        ]
        scale = np.concatenate([each.float().numpy().reshape(-1, 1, rows.shape[-1]) for each in scales])
        return rows * scale

    def greedy(self, prompt: Prepared, count: int) -> np.ndarray:
        assert isinstance(prompt, StaticPrepared)
        params = SamplingParams(max_new_tokens=count, temperature=0.0)
        (out,) = self.model.run([self.engine.new_sequence(prompt.prompt, params)])
        return np.array(out.token_ids)

    def boxes(self, text: str, prompt: Prepared) -> Sequence[Box]:
        assert isinstance(prompt, StaticPrepared)
        return self.processor.boxes(text, prompt.prompt.frames)

    @cached_property
    def rank_weights(self) -> list[dict[str, WeightSpec]]:
        """The weights of each rank, of all stages."""
        manifest = self.artifact.manifest
        if manifest.ranks == 1:
            return [manifest.weights]
        stages = [(manifest.of_stage(stage).weights, stage * manifest.tp) for stage in range(manifest.pp)]
        return [
            {
                name: spec
                for weights, first in stages
                for name, spec in rank_weights(weights, manifest.ranks, first + rank).items()
            }
            for rank in range(manifest.tp)
        ]


def open_artifact_side(folder: Path, *, device: str, threads: int | None, name: str) -> StaticSide:
    """An artifact on a device, all its ranks as threads of this process; raises ArtifactError or SideError."""
    artifact = open_artifact(folder)
    manifest = artifact.manifest
    if device == "auto":
        device = "cpu" if manifest.backend == "onnx" else "sim"
    definition = artifact.path(manifest.tokenizer) / DEFINITION
    config = decode_config(definition.read_bytes(), str(definition)) if definition.is_file() else None
    if manifest.ranks == 1:
        backend = open_backend(manifest.backend, folder, manifest.cache, device=device, threads=threads, manifest=manifest)
        return StaticSide(name, artifact, backend, config, compiled=True)

    def open_rank(manifest: Manifest, group: Group) -> Backend:
        return open_backend(
            manifest.backend, folder, manifest.cache, device=device, threads=threads, manifest=manifest, group=group
        )

    if manifest.pp > 1:
        whole = Artifact(folder, whole_pipeline(manifest), artifact.hold)
        return StaticSide(name, whole, PipelineBackend(manifest, open_rank), config, compiled=True)
    backend = LockstepBackend(manifest.tp, lambda group: open_rank(manifest, group), paged=bool(manifest.cache.pages))
    return StaticSide(name, Artifact(folder, merged_manifest(manifest), artifact.hold), backend, config, compiled=True)


def merged_manifest(manifest: Manifest) -> Manifest:
    """The manifest with the cache and the graphs of all ranks as one, for LockstepBackend."""
    ranks = manifest.tp
    cache = with_heads(manifest.cache, manifest.cache.kv_heads * ranks)
    return msgspec.structs.replace(
        manifest, cache=cache, graphs=tuple(with_all_heads(graph, ranks) for graph in manifest.graphs)
    )


def open_eager_side(checkpoint: Checkpoint, *, context: int | None, images: int | None, name: str) -> StaticSide:
    """A side that runs the definitions over a checkpoint's weights."""
    artifact, backend = checkpoint.eager(context, images)
    return StaticSide(name, artifact, backend, checkpoint.config, compiled=False, checkpoint=checkpoint)


def resizing_of(side: Side, sample: Sample) -> Resizing:
    """A side's resize filter, and the normalised pixels of a sample's images under others."""

    def pixels(number: int) -> np.ndarray | None:
        info = msgspec.structs.replace(side.info, image=msgspec.structs.replace(side.info.image, resample=number))
        processor = Processor(info, side.processor.tokenizer, side.processor.template)
        try:
            prompt = processor.prompt(sample.messages, sample.images)
        except ValueError:
            return None
        return StaticPrepared(prompt, info, 0).pixels

    return Resizing(side.info.image.resample, pixels)

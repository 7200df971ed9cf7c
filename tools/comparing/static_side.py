"""A side that staticvl runs: an artifact on its device, or the definitions over a checkpoint's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
from ...runtime.engine.request import SamplingParams
from ...runtime.model import Model
from ...runtime.processor.boxes import Box
from ...runtime.processor.prompt import CrossAttentionMask, Prompt
from ...runtime.rope import query_scales, rope_tables
from ..bench import held
from .checkpoint import Checkpoint, with_heads
from .forced import ForcedEngine
from .samples import Sample
from .sides import HIDDEN_TOKEN, Generated, Prepared


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
        found = {"token_ids": np.where(self._shown, HIDDEN_TOKEN, prompt.token_ids), "row_index": prompt.rows}
        cos, sin = rope_tables(self.info.rope, self.head_dim, self.length, prompt.ntk)
        found |= {"rope_cos": cos, "rope_sin": sin}
        if self.info.rope.logn_positions:
            found["query_scale"] = query_scales(self.info.rope, self.length)
        if len(prompt.pixels):
            mean, std = np.array(image.mean), np.array(image.std)
            used = prompt.pixels[self._used]
            found["pixels"] = ((used * image.rescale - mean) / std).astype(np.float32)
        if prompt.grids is not None and len(prompt.grids):
            found["aspect_id"] = np.array([1 + image.grids.index((int(r), int(c))) for r, c in prompt.grids])
        if prompt.cross_attention:
            found["tiles_seen"] = prompt.cross_attention.visible.astype(np.int64)
        return found

    @property
    def _shown(self) -> np.ndarray:
        """Positions that are an image's, newlines between its rows included."""
        newline = self.info.image.newline_id
        return (self.prompt.rows >= 0) | (self.prompt.token_ids == (-2 if newline is None else newline))

    @property
    def _used(self) -> np.ndarray:
        """Tiles that show something."""
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
                visible=held(cross_attention.visible, more)[:length], gates=held(cross_attention.gates, more)[:length]
            )
        changed = dataclasses.replace(
            prompt,
            token_ids=np.concatenate((prompt.token_ids, ids[:more].astype(np.int32)))[:length],
            rows=np.concatenate((prompt.rows, np.full(more, -1, np.int32)))[:length],
            state=np.zeros(length, np.int32),
            cross_attention=cross_attention,
        )
        return dataclasses.replace(self, prompt=changed)


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
        """`compiled`: the graphs of the artifact are what runs, not the definitions."""
        self.name, self.artifact, self.config, self.checkpoint = name, artifact, config, checkpoint
        self.info = artifact.manifest.model
        self.compiled = compiled
        self.engine = ForcedEngine(artifact, backend)
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

    def say(
        self,
        prompts: Sequence[Prepared],
        answers: Sequence[np.ndarray],
        *,
        route: dict[str, int] | None = None,
        caches: bool = False,
    ) -> list[Generated]:
        engine, slots = self.engine, self.artifact.manifest.cache.slots
        found: list[Generated] = []
        with engine.only(route):
            together = 1 if caches else slots  # a slot is written again as soon as its sequence has ended
            for start in range(0, len(prompts), together):
                some = slice(start, start + together)
                sequences = []
                for prompt, answer in zip(prompts[some], answers[some], strict=True):
                    assert isinstance(prompt, StaticPrepared)
                    params = SamplingParams(max_new_tokens=len(answer), temperature=0.0, ignore_eos=True)
                    sequences.append(engine.new_sequence(prompt.prompt, params, return_logits=True))
                engine.forced = {each.id: answer for each, answer in zip(sequences, answers[some], strict=True)}
                try:
                    outputs = self.model.run(sequences)
                finally:
                    engine.forced = {}
                for sequence, out in zip(sequences, outputs, strict=True):
                    assert out.logits is not None
                    slot, positions = engine.slots.pop(sequence.id), sequence.prompt.length + len(out.token_ids) - 1
                    kept = self._caches(slot, positions) if caches else {}
                    found.append(Generated(out.logits, kept))
        return found

    def _caches(self, slot: int, positions: int) -> dict[str, np.ndarray]:
        names = [name for name in self.artifact.manifest.cache.buffers() if name[:2] in ("k_", "v_")]
        found = {
            name: self._unscaled(name, self.engine.backend.read_cache(name, slot + 1)[slot, :, :positions]) for name in names
        }
        heads = self.config.text.kv_heads if self.config else 0
        # Where there are more ranks than heads, neighbours hold the same one.
        return {name: value[:: len(value) // heads] if heads and len(value) > heads else value for name, value in found.items()}

    def _unscaled(self, name: str, rows: np.ndarray) -> np.ndarray:
        """What rows [K, S, D] of a cache stand for."""
        if not self.artifact.manifest.cache.text_dtype:
            return rows
        assert self.config is not None, "a cache in 8 bits is newer than definition.json"
        which, _, number = name.partition("_cache.")
        layer = [i for i in range(self.config.text.layers) if i not in self.config.text.cross_layers][int(number)]
        held = [
            map_weight(self.artifact.folder, weights[f"text.layers.{layer}.attn.{which}_scale"])
            for weights in self.rank_weights
        ]
        scale = np.concatenate([each.float().numpy().reshape(-1, 1, rows.shape[-1]) for each in held])
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
        """What each rank holds, of all stages."""
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
    stored = artifact.path(manifest.tokenizer) / DEFINITION
    config = decode_config(stored.read_bytes(), str(stored)) if stored.is_file() else None
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
    backend = LockstepBackend(manifest.tp, lambda group: open_rank(manifest, group))
    return StaticSide(name, Artifact(folder, together(manifest), artifact.hold), backend, config, compiled=True)


def together(manifest: Manifest) -> Manifest:
    """The manifest with the cache and the graphs of all ranks, as LockstepBackend takes them."""
    ranks = manifest.tp
    cache = with_heads(manifest.cache, manifest.cache.kv_heads * ranks)
    return msgspec.structs.replace(
        manifest, cache=cache, graphs=tuple(with_all_heads(graph, ranks) for graph in manifest.graphs)
    )


def open_eager_side(checkpoint: Checkpoint, *, context: int | None, images: int | None, name: str) -> StaticSide:
    """The definitions over a checkpoint's weights."""
    artifact, backend = checkpoint.eager(context, images)
    return StaticSide(name, artifact, backend, checkpoint.config, compiled=False, checkpoint=checkpoint)

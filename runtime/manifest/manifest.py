"""The whole manifest, and the records of how it was made."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .cache import CacheSpec
from .files import FileSpec, SourceFile, WeightSpec
from .graphs import GraphSpec, Kind
from .model import ModelInfo
from .record import Record

SCHEMA_VERSION = 4


class CalibrationInfo(Record, frozen=True, kw_only=True):
    """The calibration that weights or scales of the cache were made with."""

    method: str  # e.g. "GPTQ"
    sha256: str  # of the prompts and of their images
    prompts: int
    pictures: int


class BuildInfo(Record, frozen=True, kw_only=True):
    """The build of the artifact: its versions, options and sources."""

    staticvl: str
    torch: str
    options: dict[str, str]  # command-line options that compile the same again; words stand for folders
    key: str  # digest of everything that the weights and the settings were made from
    source: dict[str, SourceFile]
    # Left out of the manifest where unset, so that the digest of an artifact without them stays the same.
    calibration: CalibrationInfo | UnsetType = UNSET
    tuned_on: str | UnsetType = UNSET  # the machine that kernels were chosen on
    notes: tuple[str, ...] | UnsetType = UNSET  # sentences about settings of the checkpoint that are contradictory or not used


class AscendInfo(Record, frozen=True, kw_only=True):
    """The versions that graphs for Ascend depend on and do not check themselves."""

    python: str  # "3.11": their files hold byte code
    torch: str
    torch_npu: str
    cache_format: str  # torchair's own number
    soc: str  # family of chips that graphs were lowered for, e.g. "Ascend910B"


class StageSpec(Record, frozen=True, kw_only=True):
    """A stage of a pipeline after the first: its own cache, graphs and weights, as in Manifest."""

    cache: CacheSpec
    graphs: tuple[GraphSpec, ...]
    weights: dict[str, WeightSpec]


class Manifest(Record, frozen=True, kw_only=True):
    """The whole of manifest.json. Of a pipeline, cache, graphs and weights are those of the first stage."""

    schema_version: int = SCHEMA_VERSION
    backend: Literal["onnx", "ascend"]
    quant: str
    tp: Annotated[int, Meta(ge=1, le=1 << 12)]
    model: ModelInfo
    tokenizer: str  # folder of the tokenizer files and the chat template
    cache: CacheSpec
    graphs: tuple[GraphSpec, ...]
    weights: dict[str, WeightSpec]  # of several ranks, those of the first; see rank_weights
    stages: tuple[StageSpec, ...] = ()  # of a pipeline: those after the first
    files: dict[str, FileSpec]
    build: BuildInfo
    ascend: AscendInfo | None = None
    digest: str = ""

    @property
    def pp(self) -> int:
        """The number of pipeline stages; 1: the model is no pipeline."""
        return 1 + len(self.stages)

    @property
    def ranks(self) -> int:
        """The number of processes that run the model together."""
        return self.tp * self.pp

    def of_stage(self, stage: int) -> Manifest:
        """The manifest with the cache, graphs and weights of one stage; weights are those of its first rank."""
        if stage == 0:
            return self
        own = self.stages[stage - 1]
        return msgspec.structs.replace(self, cache=own.cache, graphs=own.graphs, weights=own.weights)

    def buckets(self, kind: Kind) -> tuple[int, ...]:
        """Bucket sizes of one graph kind, ascending."""
        return tuple(sorted({graph.bucket for graph in self.graphs if graph.kind == kind}))

    def recompilation(self, **changed: object) -> str:
        """The command that compiles this artifact with some options changed; bucket lists are those of the default."""
        options = {**self.build.options, **changed}
        return " ".join(
            [
                "staticvl compile CHECKPOINT --out ARTIFACT",
                *(f"--{k.replace('_', '-')} {v}".strip() for k, v in options.items()),
            ]
        )

    def graph(self, kind: Kind, bucket: int, images: int = 0) -> GraphSpec:
        """The graph of one key; raises StopIteration where there is none."""
        return next(graph for graph in self.graphs if graph.graph_key == (kind, bucket, images))

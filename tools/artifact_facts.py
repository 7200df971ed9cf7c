"""What `staticvl show` has to say, as plain data: it prints these records as text or as JSON.

docs/usage.md describes the JSON. Records of the manifest are parts of it; docs/artifact.md has their fields.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from ..runtime.artifact import (
    PAGE_TOKENS,
    SIGNATURE,
    AscendInfo,
    BuildInfo,
    CacheSpec,
    Certificate,
    GraphSpec,
    ImageProcessorConfig,
    Manifest,
    SamplingDefaults,
    open_artifact,
)
from ..runtime.signature import is_stale
from .capacity import Capacity, capacity, image_tokens
from .cards import CARDS, Card
from .forecast import CardBound, Forecast, Launches, decoder_layers, forecast
from .machine import machine, versions

FORMAT = 1  # raised where a key goes or changes its meaning
FORBIDDEN = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """One graph. What belongs to a certificate is None where it was not certified."""

    name: str
    kind: str
    bucket: int
    images: int
    eager: bool
    cost_ms: float
    checks: int | None
    worst_error: float | None
    tolerance: float | None
    rounding: float | None
    kernels: str | None  # None: not chosen by --tune
    flops: int
    nbytes: int
    at_best: CardBound
    launches: Launches | None  # None: no graph of Ascend's, or of an artifact that does not count them


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTraffic:
    """What one rank of a stage sends to the others in one run of a graph."""

    stage: int
    graph: str
    bucket: int
    collectives: int
    nbytes: int
    to_stages: int  # tensors sent to other stages
    to_stages_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The model."""

    family: str
    layout: str
    hidden_size: int
    vocab_size: int
    chat: str
    text_before_image: str
    image: ImageProcessorConfig
    sampling: SamplingDefaults  # without the lists of tokens
    forbidden: dict[str, int]  # how many entries each of these lists has


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFacts:
    """An artifact. Weights, cache and graphs are those of one rank of the first stage."""

    name: str
    digest: str
    schema_version: int
    signature: Literal["none", "stale", "present"]
    holds_code: bool
    backend: str
    quant: str
    tp: int
    pp: int
    model: ModelFacts
    weight_tensors: int
    weight_nbytes: int
    cache: CacheSpec
    cache_nbytes: int
    cross_nbytes: int  # of it, for images that enter by cross-attention
    build: BuildInfo
    ascend: AscendInfo | None
    card_warnings: dict[str, int]  # rules of the card lint -> findings in the graphs of all stages, most frequent first
    card: str
    capacity: Capacity
    graphs: tuple[GraphFacts, ...]
    communication: tuple[RankTraffic, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The whole document."""

    format: int = FORMAT
    versions: dict[str, str | None]
    machine: dict[str, Any]
    artifact: ArtifactFacts | None


def facts(folder: Path | None, card: str, memory: float | None = None) -> Facts:
    """What there is to say of this machine, and of the artifact in `folder` where one is given, with the least times on the
    card of that name in CARDS, and what a device with so many bytes of `memory` holds. Raises ArtifactError."""
    artifact = None if folder is None else _artifact(folder, open_artifact(folder).manifest, CARDS[card], memory)
    return Facts(versions=versions(), machine=machine(), artifact=artifact)


def _artifact(folder: Path, manifest: Manifest, card: Card, memory: float | None) -> ArtifactFacts:
    cache, weight_nbytes = manifest.cache, sum(weight.nbytes for weight in manifest.weights.values())
    image = manifest.model.image
    tokens = image_tokens(image.rows, image.grids, crossed=cache.cross is not None)
    return ArtifactFacts(
        name=folder.resolve().name,
        digest=manifest.digest,
        schema_version=manifest.schema_version,
        signature=_signature(folder, manifest),
        holds_code=manifest.ascend is not None,
        backend=manifest.backend,
        quant=manifest.quant,
        tp=manifest.tp,
        pp=manifest.pp,
        model=_model(manifest),
        weight_tensors=len(manifest.weights),
        weight_nbytes=weight_nbytes,
        cache=cache,
        cache_nbytes=cache.nbytes,
        cross_nbytes=cache.nbytes - msgspec.structs.replace(cache, cross=None).nbytes,
        build=manifest.build,
        ascend=manifest.ascend,
        card_warnings=_card_warnings(manifest),
        card=card.name,
        capacity=capacity(cache, tokens, weight_nbytes, card, memory),
        graphs=tuple(_graph(graph, forecast(graph, card, decoder_layers(manifest))) for graph in _in_order(manifest)),
        communication=_communication(manifest),
    )


def _model(manifest: Manifest) -> ModelFacts:
    model = manifest.model
    lists = {name: getattr(model.sampling, name) or () for name in FORBIDDEN}
    return ModelFacts(
        family=model.family,
        layout=model.layout,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        chat=model.chat,
        text_before_image=model.text_before_image,
        image=model.image,
        sampling=msgspec.structs.replace(model.sampling, **dict.fromkeys(FORBIDDEN, UNSET)),
        forbidden={name: len(ids) for name, ids in lists.items() if ids},
    )


def _signature(folder: Path, manifest: Manifest) -> Literal["none", "stale", "present"]:
    """Whether there is a signature of this manifest; `staticvl verify --key` checks by whom."""
    if not (folder / SIGNATURE).exists():
        return "none"
    return "stale" if is_stale(folder, manifest) else "present"


def _card_warnings(manifest: Manifest) -> dict[str, int]:
    counts = Counter[str]()
    for graph in (graph for stage in range(manifest.pp) for graph in manifest.of_stage(stage).graphs):
        counts.update(graph.card_warnings or {})
    return dict(counts.most_common())


def _in_order(manifest: Manifest) -> list[GraphSpec]:
    return sorted(manifest.graphs, key=lambda graph: (graph.kind, graph.images, graph.bucket))


def _graph(graph: GraphSpec, cost: Forecast) -> GraphFacts:
    certificate = graph.certificate
    return GraphFacts(
        name=graph.name,
        kind=graph.kind,
        bucket=graph.bucket,
        images=graph.images,
        eager=graph.eager,
        cost_ms=graph.cost_ms,
        checks=_of(certificate, lambda made: len(made.cases)),
        worst_error=_of(certificate, lambda made: made.worst),
        tolerance=_of(certificate, lambda made: made.tolerance),
        rounding=_of(certificate, lambda made: made.rounding),
        kernels=graph.kernels.described if graph.kernels else None,
        flops=cost.flops,
        nbytes=cost.nbytes,
        at_best=cost.bound,
        launches=cost.launches,
    )


def _of(certificate: Certificate | None, value: Any) -> Any:
    return None if certificate is None else value(certificate)


def _communication(manifest: Manifest) -> tuple[RankTraffic, ...]:
    """Of one rank of each stage; nothing where the model runs in one process."""
    if manifest.ranks == 1:
        return ()
    return tuple(
        RankTraffic(
            stage=stage,
            graph=graph.name,
            bucket=graph.bucket,
            collectives=graph.collectives,
            nbytes=graph.collective_bytes,
            to_stages=len(graph.sent),
            to_stages_nbytes=sum(spec.nbytes for spec in graph.sent),
        )
        for stage in range(manifest.pp)
        for graph in _in_order(manifest.of_stage(stage))
    )


def cache_form(cache: CacheSpec) -> str:
    """What a cache has room for, in words."""
    if cache.pages:
        return f"{cache.pages} pages of {PAGE_TOKENS} tokens, {cache.slots} sequences of up to {cache.context}"
    return f"{cache.slots} slots of {cache.context} tokens"

"""A checkpoint as a side: its settings, and its weights, which are converted into a temporary folder at their first use."""

from __future__ import annotations

import tempfile
from functools import cached_property, partial
from pathlib import Path

import msgspec

from ...compiler.buckets import Buckets
from ...compiler.eager import EagerBackend
from ...compiler.graphs import GraphContext, define_graph
from ...compiler.model_info import read_model_info
from ...compiler.options import Options
from ...compiler.plan import Plan, make_plan
from ...model_defs.config import ModelConfig, read_config
from ...runtime.artifact import Artifact, BuildInfo, CacheSpec, Manifest, ModelInfo, WeightSpec
from ...runtime.processor.processor import Processor
from ...weights.convert import Conversion, convert
from ...weights.packing.settings import read_packing
from ...weights.packing.source import open_packed
from ...weights.source import open_source

CHUNK = 128  # tokens of a prefill of the definitions


class Checkpoint:
    """A Hugging Face checkpoint. Files made of it are in a temporary folder in `work`, which `close` deletes."""

    def __init__(self, folder: Path, *, vision_tower: Path | None = None, work: Path | None = None) -> None:
        """Raises ConfigError for a checkpoint that cannot be read."""
        self.folder, self.vision_tower = folder, vision_tower
        self.config: ModelConfig = read_config(folder, vision_tower=vision_tower)
        self.packing = read_packing(folder)
        info, settings = read_model_info(folder, self.config, vision_tower=vision_tower)
        self.info: ModelInfo = info
        self._temporary = tempfile.TemporaryDirectory(prefix="staticvl-compare-", dir=work)
        self.out = Path(self._temporary.name)
        self.tokenizer_folder = "tokenizer"
        (self.out / self.tokenizer_folder).mkdir()
        for name, data in settings.items():
            (self.out / self.tokenizer_folder / Path(name).name).write_bytes(data)

    def close(self) -> None:
        self._temporary.cleanup()

    @cached_property
    def processor(self) -> Processor:
        return Processor.read(self.info, self.out / self.tokenizer_folder)

    @cached_property
    def weights(self) -> dict[str, WeightSpec]:
        """Every parameter in float32, converted once; quantised ones are dequantised."""
        source = open_source(self.folder, self.vision_tower)
        if self.packing:
            source = open_packed(source, self.packing, self.config)
        return convert(source, self.config, self.out, Conversion(prefix="reference")).weights

    def plan(self, context: int | None, images: int | None) -> Plan:
        """A plan of few graphs: they are not measured, and are the reference for every bucket of the other side."""
        context = min(context or self.config.text.max_positions, self.config.text.max_positions)
        buckets = Buckets(
            prefill=(min(CHUNK, context),),
            decode=(1,),
            context=context,
            slots=1,
            images=(images,) if images and self.config.text.cross_layers else None,
        )
        return make_plan(self.config, Options(checkpoint=self.folder, out=self.out, buckets=buckets))

    def eager(self, context: int | None = None, images: int | None = None) -> tuple[Artifact, EagerBackend]:
        """The definitions as an artifact and a backend, which an engine can run."""
        plan = self.plan(context, images)
        define = partial(define_graph, GraphContext(config=self.config, image=self.info.image, cache=plan.cache))
        manifest = Manifest(
            backend="onnx",
            quant="none",
            tp=1,
            model=self.info,
            tokenizer=self.tokenizer_folder,
            cache=plan.cache,
            graphs=tuple(graph.spec(graph.name, cost_ms=float(graph.bucket)) for graph in map(define, plan.graphs)),
            weights=self.weights,
            files={},
            build=BuildInfo(staticvl="", torch="", options={}, key="", source={}),
        )
        return Artifact(self.out, manifest), EagerBackend(self.out, self.weights, plan.cache, define)


def with_heads(cache: CacheSpec, heads: int) -> CacheSpec:
    """A cache with another number of heads."""
    return msgspec.structs.replace(cache, kv_heads=heads)

"""The weights of a build: reused from the artifact, or converted from the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..runtime.artifact import FileSpec, WeightSpec
from ..weights.weight_map import kept_dtypes, match
from .digests import all_intact
from .inputs import BuildInputs
from .plan import make_plan, stages

if TYPE_CHECKING:
    from ..weights.calibrated_layers import CalibratedLayers
    from ..weights.source import Source


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The weights of an artifact, the files of all ranks, and whether they were converted now."""

    of_stages: list[dict[str, WeightSpec]]  # those of each stage's first rank
    files: dict[str, FileSpec]
    converted: bool


def store_weights(inputs: BuildInputs, key: str, tokenizer: str) -> StoredWeights:
    """`key` is the digest of the sources of the weights, `tokenizer` the folder of the settings by its name."""
    return _kept(inputs, key) or _converted(inputs, key[:12], tokenizer)


def _kept(inputs: BuildInputs, key: str) -> StoredWeights | None:
    """The weights of the old artifact, where they were made from the same and are whole."""
    old = inputs.old
    if old is None or old.build.key != key:
        return None
    files = {name: spec for name, spec in old.files.items() if name.startswith("weights/")}
    if not all_intact(inputs.out, files):
        return None
    return StoredWeights([old.of_stage(stage).weights for stage in range(old.pp)], files, converted=False)


def _converted(inputs: BuildInputs, prefix: str, tokenizer: str) -> StoredWeights:
    """Files begin with `prefix`."""
    from ..weights.convert import Conversion, convert, plan_weight_files

    source, options = open_checkpoint(inputs), inputs.options
    floats, tp = options.floats(kept_dtypes(match(inputs.config, source.tensors))), options.tp
    conversion = Conversion(quant=options.stored_quant, prefix=prefix, ascend=options.backend == "ascend", floats=floats, tp=tp)
    calibrated = _calibrated(inputs, source, prefix, tokenizer)
    parts = stages(inputs.config, options.pp)
    shards = (shard for part in parts for shard in plan_weight_files(part, conversion))
    with inputs.progress.stage("converting weights", tp * sum(shard.nbytes for shard in shards), "B") as advance:
        ranks = [
            convert(source, part, inputs.out, replace(conversion, rank=rank), calibrated=calibrated, progress=advance)
            for part in parts
            for rank in range(tp)
        ]
    files = {name: spec for rank in ranks for name, spec in rank.files.items()}
    return StoredWeights([rank.weights for rank in ranks[::tp]], files, converted=True)


def open_checkpoint(inputs: BuildInputs) -> Source:
    """The checkpoint as plain weights, dequantised where it is packed, with the adapter merged."""
    from ..weights.packing.source import check_layers, open_packed
    from ..weights.source import open_source

    options, config = inputs.options, inputs.config
    source = open_source(options.checkpoint, options.vision_tower)
    if inputs.packing:
        source = open_packed(source, inputs.packing, config)
        if options.stored_quant != "none":
            check_layers(match(config, source.tensors), source, options.stored_quant)
    if options.lora:
        from ..weights.lora import open_adapter

        source = open_adapter(options.lora, config, source)
    return source


def _calibrated(inputs: BuildInputs, source: Source, prefix: str, tokenizer: str) -> CalibratedLayers | None:
    """The layers that a calibration quantises; finished ones of an interrupted build are reused."""
    options, config = inputs.options, inputs.config
    calibration = options.calibration
    if calibration is None:
        return None
    from ..runtime.processor.processor import Processor
    from ..weights.calibrated_layers import CalibratedLayers
    from .calibrate import CalibrationContext, calibrate, prompts_of

    cache = make_plan(config, replace(options, tp=1, pp=1)).cache
    prompts = prompts_of(calibration, Processor.read(inputs.info, inputs.out / tokenizer), cache.context)
    if not any(each.images for each in calibration.conversations):
        inputs.progress.say("the calibration has no images: activations of images are not calibrated")
    store = CalibratedLayers(inputs.out, prefix)
    context = CalibrationContext(
        config=config, info=inputs.info, cache=cache, quant=options.stored_quant, tp=options.tp, store=store
    )
    calibrate(source, context, prompts, inputs.progress)
    return store

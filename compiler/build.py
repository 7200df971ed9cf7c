"""Plan -> weights -> graphs -> certificates -> manifest, doing again only what has changed.

Every file that depends on content carries a digest of what it was made from in its name, so a build never overwrites a
file that the artifact already there refers to: the old manifest stays valid until the new one replaces it by a rename,
and only then are files that nothing refers to removed. What an interrupted build had finished is noted in a journal and
is not done again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

from ..model_defs.config import READY_MADE, ModelConfig, encode_config, read_config
from ..runtime.artifact import (
    DEFINITION,
    SIGNATURE,
    ArtifactError,
    AscendInfo,
    BuildInfo,
    CalibrationInfo,
    FileSpec,
    GraphKey,
    GraphSpec,
    Manifest,
    ModelInfo,
    Record,
    StageSpec,
    WeightSpec,
    read_manifest,
    write_manifest,
)
from ..runtime.backends.ascend import torchair_host
from ..runtime.backends.cores import processor_name, usable_cores
from ..runtime.files import write_atomically
from ..runtime.locks import alone
from ..weights.storage import Floats
from ..weights.tensors import WeightsError
from ..weights.weight_map import kept_dtypes, match, targets
from .calibration import CACHE_METHOD, METHODS
from .fingerprint import GraphDigests, digest, fingerprint, intact, weights_key
from .leftovers import JOURNAL, LOCK, is_ours, remove_unreferenced
from .model_info import read_model_info
from .plan import Options, Plan, forecast, make_plan, stages
from .progress import Progress
from .ready_made import resolve

if TYPE_CHECKING:
    from ..weights.calibrated_layers import CalibratedLayers
    from ..weights.packing.settings import Packing
    from ..weights.source import Source


class BuildError(RuntimeError):
    """A build that cannot go on; the message says what to do."""


@dataclass(slots=True)
class Report:
    """What a build did."""

    manifest: Manifest
    traced: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    converted: bool = False


class JournalEntry(Record, frozen=True, kw_only=True):
    """A graph that an interrupted build had finished."""

    graph: GraphSpec
    files: dict[str, FileSpec]


@dataclass(frozen=True, slots=True)
class _Job:
    """What a build knows before it does anything slow."""

    options: Options
    config: ModelConfig
    info: ModelInfo
    settings: dict[str, bytes]
    plan: Plan
    old: Manifest | None
    progress: Progress
    packing: Packing | None  # of a checkpoint that is quantised
    notes: tuple[str, ...]  # on settings of the checkpoint that are contradictory or not used

    @property
    def out(self) -> Path:
        return self.options.out


def _config(options: Options, notes: list[str]) -> ModelConfig:
    tower, ignored = options.vision_tower, options.ignore_config_keys
    return options.defined(read_config(options.checkpoint, vision_tower=tower, ignore_keys=ignored, notes=notes))


def prepare(options: Options, progress: Progress) -> _Job:
    """Read the checkpoint's settings and plan the build; raises one of the clear errors of config, facts and plan."""
    notes: list[str] = []
    config = _config(options, notes)
    options, packing = resolve(options)
    info, settings = read_model_info(
        options.checkpoint,
        config,
        vision_tower=options.vision_tower,
        text_before_image=options.text_before_image,
        notes=notes,
    )
    plan = make_plan(config, options)
    settings[DEFINITION] = encode_config(config)
    return _Job(
        options, config, info, settings, plan, _old_manifest(options.out), progress, packing, _without_folders(options, notes)
    )


def _without_folders(options: Options, notes: list[str]) -> tuple[str, ...]:
    """Notes for a manifest: folders lie elsewhere on another machine."""
    folders = [folder for folder in (options.checkpoint, options.vision_tower) if folder]
    return tuple(functools.reduce(lambda note, folder: note.replace(f"{folder}/", ""), folders, note) for note in notes)


def plan_only(options: Options, notes: list[str] | None = None) -> tuple[Plan, dict[str, int]]:
    """The plan of a build and its forecast in bytes, from the config alone; `notes` as in read_config."""
    config = _config(options, [] if notes is None else notes)
    options, _ = resolve(options)
    plan = make_plan(config, options)
    return plan, forecast(config, plan, options, _expected_floats(options, config))


def _expected_floats(options: Options, config: ModelConfig) -> Floats:
    """As the weights will be stored; where no weights are there yet, they are taken to be in 16 bits, as most are."""
    from ..weights.source import open_source

    try:
        kept = kept_dtypes(match(config, open_source(options.checkpoint, options.vision_tower).tensors))
    except WeightsError:
        kept = dict.fromkeys(targets(config), "float16")
    return options.floats(kept)


def build(options: Options, progress: Progress | None = None) -> Report:
    """Compile a checkpoint into the artifact folder `options.out`."""
    job = prepare(options, progress or Progress())
    _check_target(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    with _locked(options.out), _disk_errors(options.out):
        return _build(job)


def _build(job: _Job) -> Report:
    if job.packing or not job.old:
        # What cannot be stored is refused before all of the checkpoint is read, and what cannot be compiled before that.
        _check_compiler(job.options)
        match(job.config, _open_source(job).tensors)
    source = fingerprint(job.options, job.old.build.source if job.old else {}, job.progress)
    key = weights_key(source, job.config, job.options, job.packing)
    folder, setting_files = _settings(job)
    weights, weight_files, converted = _weights(job, key, folder)
    report = Report(manifest=job.old, converted=converted)  # type: ignore[arg-type]
    stages, graph_files = _graphs(job, key, weights, report)
    manifest = Manifest(
        backend=job.options.backend,  # type: ignore[arg-type]
        quant=job.options.stored_quant,
        tp=job.options.tp,
        model=job.info,
        tokenizer=folder,
        cache=stages[0].cache,
        graphs=stages[0].graphs,
        weights=stages[0].weights,
        stages=tuple(stages[1:]),
        files={**graph_files, **weight_files, **setting_files},
        ascend=_ascend_info(job, report) if job.options.backend == "ascend" else None,
        build=BuildInfo(
            staticvl=importlib.metadata.version("staticvl"),
            torch=importlib.metadata.version("torch"),
            options=_kept_options(job),
            key=key,
            source=source,
            calibration=_calibration_info(job),
            tuned_on=_machine() if job.options.tune else UNSET,
            notes=job.notes or UNSET,
        ),
    )
    write_manifest(job.out, manifest)
    report.manifest = read_manifest(job.out)
    _tidy(job, report.manifest)
    return report


def _check_compiler(options: Options) -> None:
    """What makes graphs is there; raises ArtifactError otherwise."""
    if options.backend == "ascend":
        torchair_host.wheel_folder()


def _ascend_info(job: _Job, report: Report) -> AscendInfo:
    """What the graphs depend on; they are keyed by it, so where none was traced it is what it was."""
    if job.old and job.old.ascend and not report.traced:
        return job.old.ascend
    from ..runtime.backends.ascend.kernel import ascend_info

    torchair_host.load()
    return ascend_info(torchair_host.VERSION, job.options.soc)


def _calibration_info(job: _Job) -> CalibrationInfo | UnsetType:
    calibration = job.options.calibration
    if calibration is None:
        return UNSET
    return CalibrationInfo(
        method=", ".join(_measured(job.options)),
        sha256=calibration.sha256,
        prompts=len(calibration.conversations),
        pictures=sum(len(each.images) for each in calibration.conversations),
    )


def _measured(options: Options) -> Iterator[str]:
    """What a calibration was for."""
    if options.quant in METHODS:
        yield METHODS[options.quant]
    if options.int8_cache:
        yield CACHE_METHOD


def _machine() -> str:
    """What kernels are chosen for."""
    return f"{processor_name()}, {usable_cores()} cores, onnxruntime {importlib.metadata.version('onnxruntime')}"


def _kept_options(job: _Job) -> dict[str, str]:
    """What a command that compiles the same again has to say; folders lie elsewhere on another machine."""
    asked, cache = job.options, job.plan.cache
    defaults = Options(checkpoint=asked.checkpoint, out=asked.out)
    names = ("backend", "quant", "dtype", "soc", "tp", "pp", "kv_cache")
    options = {name: str(getattr(asked, name)) for name in names if getattr(asked, name) != getattr(defaults, name)}
    if asked.quant in READY_MADE:
        del options["quant"]  # the checkpoint brings it
    if asked.candidates is not None:
        options["candidates"] = str(asked.candidates)
    if asked.eager:
        options["eager"] = ",".join(asked.eager)
    options |= {name: "FOLDER" for name in ("lora", "vision_tower") if getattr(asked, name)}
    if asked.calibration:
        options["calibrate"] = "FILE"
    if asked.tune:
        options["tune"] = ""
    options |= {"context": str(cache.context), "slots": str(cache.slots)}
    if verify := job.plan.buckets("verify"):
        options["speculate"] = str(max(verify) - 1)
    if cross := cache.cross:
        options |= {"images": str(cross.images), "text_before_image": asked.text_before_image}
    return options


# ---- what the build starts from


def _old_manifest(out: Path) -> Manifest | None:
    """The manifest of an earlier build, if there is a sound one; a damaged one is built anew."""
    try:
        return read_manifest(out)
    except ArtifactError:
        return None


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BuildError(f"--out {out} is a file; expected a folder, new or made by an earlier compile")
    if out.is_dir():
        foreign = [p.name for p in out.iterdir() if not is_ours(p)]
        if foreign and not (out / "manifest.json").exists():
            raise BuildError(
                f"--out {out} holds other files ({foreign[0]}, ...); give a new folder or an artifact of an earlier compile"
            )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One build at a time in one folder."""
    with alone(out / LOCK) as free:
        if not free:
            raise BuildError(f"another staticvl compile is writing {out}; wait for it or choose another --out")
        yield


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(
                f"the disk of {out} is full; free some space and run the same command again: finished parts are kept, and an "
                "artifact that was there before is unchanged"
            ) from error
        raise


# ---- weights


def _weights(job: _Job, key: str, tokenizer: str) -> tuple[list[dict[str, WeightSpec]], dict[str, FileSpec], bool]:
    """The weights of each stage's first rank, the files of all ranks, and whether they were converted now. `tokenizer` is the
    folder of the settings, by its name."""
    old = job.old
    if old and old.build.key == key:
        files = {name: spec for name, spec in old.files.items() if name.startswith("weights/")}
        if _all_intact(job.out, files):
            return [old.of_stage(stage).weights for stage in range(old.pp)], files, False
    from ..weights.convert import Conversion, convert, plan_weight_files

    source = _open_source(job)
    options, tp = job.options, job.options.tp
    floats = options.floats(kept_dtypes(match(job.config, source.tensors)))
    conversion = Conversion(quant=options.stored_quant, prefix=key[:12], floats=floats, tp=tp)
    store = _calibrated(job, source, conversion.prefix, tokenizer)
    parts = stages(job.config, options.pp)
    shards = (shard for part in parts for shard in plan_weight_files(part, conversion))
    with job.progress.stage("converting weights", tp * sum(shard.nbytes for shard in shards), "B") as advance:
        ranks = [
            convert(source, part, job.out, replace(conversion, rank=rank), calibrated=store, progress=advance)
            for part in parts
            for rank in range(tp)
        ]
    return [rank.weights for rank in ranks[::tp]], {name: spec for rank in ranks for name, spec in rank.files.items()}, True


def _open_source(job: _Job) -> Source:
    """The checkpoint as one of plain weights, whatever it is packed as, with the adapter in it."""
    from ..weights.packing.source import check_layers, open_packed
    from ..weights.source import open_source

    source = open_source(job.options.checkpoint, job.options.vision_tower)
    if job.packing:
        source = open_packed(source, job.packing, job.config)
        if job.options.stored_quant != "none":
            check_layers(match(job.config, source.tensors), source, job.options.stored_quant)
    if job.options.lora:
        from ..weights.lora import open_adapter

        source = open_adapter(job.options.lora, job.config, source)
    return source


def _calibrated(job: _Job, source: Source, key: str, tokenizer: str) -> CalibratedLayers | None:
    """The layers that a calibration quantises; what an interrupted build has left of them is not made again."""
    calibration, options = job.options.calibration, job.options
    if calibration is None:
        return None
    from ..weights.calibrated_layers import CalibratedLayers
    from .calibrate import CalibrationContext, calibrate, prompts_of

    cache = make_plan(job.config, replace(options, tp=1, pp=1)).cache
    prompts = prompts_of(calibration, job.info, job.out / tokenizer, cache.context)
    if not any(each.images for each in calibration.conversations):
        job.progress.say("the calibration has no images: what images do to activations is not seen")
    store = CalibratedLayers(job.out, key)
    context = CalibrationContext(
        config=job.config, info=job.info, cache=cache, quant=options.stored_quant, tp=options.tp, store=store
    )
    calibrate(source, context, prompts, job.progress)
    return store


# ---- graphs


def _graphs(
    job: _Job, key: str, weights: list[dict[str, WeightSpec]], report: Report
) -> tuple[list[StageSpec], dict[str, FileSpec]]:
    """Each stage with its graphs, and the files of them all."""
    parts = [replace(job, config=part, plan=job.plan.of_stage(i)) for i, part in enumerate(stages(job.config, job.options.pp))]
    keys = [_graph_digests(part, key) for part in parts]
    known = _known_graphs(job)
    found = {each: known[each] for of_part in keys for each in of_part.values() if each in known}
    found = {k: entry for k, entry in found.items() if _all_intact(job.out, entry.files) and not _disturbed(entry.graph)}
    report.reused = [entry.graph.name for entry in found.values()]
    missing = [[graph for graph, each in of_part.items() if each not in found] for of_part in keys]
    if any(missing):
        from .make import GraphMaker

        with job.progress.stage("compiling graphs", sum(map(len, missing)), "graph") as advance:
            for i, part in enumerate(parts):
                maker = GraphMaker(job.options, part.config, job.info, part.plan, weights[i]) if missing[i] else None
                for graph in missing[i]:
                    assert maker is not None
                    entry = found[keys[i][graph]] = _noted(job, *maker.make(graph, keys[i][graph]))
                    report.traced.append(entry.graph.name)
                    job.progress.say((f"stage {i}  " if len(parts) > 1 else "") + _describe(entry.graph))
                    advance(1)
    entries = [[found[of_part[graph]] for graph in part.plan.graphs] for part, of_part in zip(parts, keys, strict=True)]
    specs = [
        StageSpec(cache=part.plan.cache, graphs=tuple(entry.graph for entry in own), weights=held)
        for part, own, held in zip(parts, entries, weights, strict=True)
    ]
    return specs, {name: spec for own in entries for entry in own for name, spec in entry.files.items()}


def _graph_digests(job: _Job, key: str) -> dict[GraphKey, str]:
    digests = GraphDigests(job.options, job.config, job.info, job.plan, key)
    return {graph: digests.of(graph) for graph in job.plan.graphs}


def _noted(job: _Job, graph: GraphSpec, files: dict[str, FileSpec]) -> JournalEntry:
    """A finished graph, which a broken-off build need not make again."""
    entry = JournalEntry(graph=graph, files=files)
    with (job.out / JOURNAL).open("ab") as journal:
        journal.write(msgspec.json.encode(entry) + b"\n")
    return entry


def _all_intact(out: Path, files: Mapping[str, FileSpec]) -> bool:
    return all(intact(out / name, spec) for name, spec in files.items())


def _disturbed(graph: GraphSpec) -> bool:
    """Whether it was to be tuned and the machine was at work: perhaps it is not now."""
    return bool(graph.kernels and graph.kernels.busy)


def _describe(graph: GraphSpec) -> str:
    certificate = graph.certificate
    assert certificate is not None
    rounding = "" if certificate.rounding is None else f", rounding {certificate.rounding:.1e}"
    checks = f"{len(certificate.cases)} checks, worst error {certificate.worst:.1e}{rounding}"
    chosen = f", {graph.kernels.described}" if graph.kernels else ""
    return f"{graph.name:>20}  {checks}, {graph.cost_ms:.2f} ms{chosen}"


def _known_graphs(job: _Job) -> dict[str, JournalEntry]:
    """Graphs of the old artifact and of an interrupted build, by key."""
    known = {}
    if job.old:
        for graph in (graph for stage in range(job.old.pp) for graph in job.old.of_stage(stage).graphs):
            known[graph.key] = JournalEntry(graph=graph, files={name: job.old.files[name] for name in graph.files})
    journal = job.out / JOURNAL
    if journal.is_file():
        for line in journal.read_bytes().splitlines():
            with contextlib.suppress(msgspec.MsgspecError):  # a line cut short by a crash
                entry = msgspec.json.decode(line, type=JournalEntry)
                known[entry.graph.key] = entry
    return known


# ---- settings and the end


def _settings(job: _Job) -> tuple[str, dict[str, FileSpec]]:
    """Write the tokenizer and the chat template into a folder named after their contents."""
    digests = {Path(name).name: hashlib.sha256(data).hexdigest() for name, data in sorted(job.settings.items())}
    folder = f"tokenizer-{digest(digests)[:12]}"
    (job.out / folder).mkdir(exist_ok=True)
    files = {}
    for name, data in job.settings.items():
        file = f"{folder}/{Path(name).name}"
        files[file] = FileSpec(nbytes=len(data), sha256=digests[Path(name).name])
        if not intact(job.out / file, files[file]):
            write_atomically(job.out / file, data)
    return folder, files


def _tidy(job: _Job, manifest: Manifest) -> None:
    """Remove what the manifest does not name, and say what could not go and what has to be made again."""
    signed = (job.out / SIGNATURE).exists()
    if kept := remove_unreferenced(job.out, manifest):
        job.progress.say(
            f"the earlier artifact is in use: {kept} of its files stay until it is not, and the next build or "
            f"`staticvl verify {job.out}` removes them; restart what serves it to serve this one"
        )
    if signed and not (job.out / SIGNATURE).exists():
        job.progress.say(
            f"the signature was of the earlier artifact and was removed; sign it again: staticvl sign {job.out} ..."
        )

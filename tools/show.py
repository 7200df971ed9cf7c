"""`staticvl show`: what an artifact holds, as tables."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
from msgspec import UNSET
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..runtime.artifact import SIGNATURE, Certificate, Manifest, ModelInfo, SamplingDefaults, open_artifact
from ..runtime.signature import is_stale
from .cards import CARDS
from .forecast import forecast_table, forecasts, launch_table
from .machine import described

CODE = "Python byte code and source, which run as the user who loads it: use only what you trust (staticvl verify --key)"


def run(args: argparse.Namespace) -> int:
    manifest = open_artifact(args.artifact).manifest
    console = Console(highlight=False)
    console.print(_summary(args.artifact, manifest))
    console.print(_graphs(manifest))
    card = CARDS[args.card]
    rows = forecasts(manifest, card)
    console.print(forecast_table(rows, card))
    if launches := launch_table(rows):
        console.print(launches)
    if manifest.ranks > 1:
        console.print(_communication(manifest))
    return 0


def _summary(folder: Path, manifest: Manifest) -> Table:
    model, cache = manifest.model, manifest.cache
    weights = sum(weight.nbytes for weight in manifest.weights.values())
    rows = {
        "model": f"{model.family} ({model.layout} layout), hidden {model.hidden_size}, vocabulary {model.vocab_size}",
        "image": _image(model),
        "backend": f"{manifest.backend}, quantisation {manifest.quant}",
        **_calibration(manifest),
        **_tuning(manifest),
        **_ranks(manifest),
        "weights": f"{len(manifest.weights)} tensors, {weights / 1e6:.1f} MB" + (" on each rank" if manifest.ranks > 1 else ""),
        "cache": f"{cache.slots} slots of {cache.context} tokens, {cache.layers} layers, {cache.kv_heads} kv heads of "
        f"{cache.head_dim}, {cache.text_dtype or cache.dtype}, {cache.nbytes / 1e6:.1f} MB",
        **_cut_off(manifest),
        **_cross(manifest),
        **_ascend(manifest),
        "sampling": sampling_line(model.sampling),
        **_banned(model.sampling),
        "made by": f"staticvl {manifest.build.staticvl}, torch {manifest.build.torch}, schema {manifest.schema_version}",
        "digest": manifest.digest[:16],
        **({"this machine": described()} if manifest.backend == "onnx" else {}),
        **_signature(folder, manifest),
    }
    table = Table(show_header=False, box=None)
    for name, value in (*rows.items(), *(("note", note) for note in manifest.build.notes or ())):
        table.add_row(name, escape(value))
    return table


def sampling_line(defaults: SamplingDefaults) -> str:
    """Sampling settings of a request that names none, or that asks for sampling and names nothing else."""
    settings = [f"temperature {defaults.temperature:g}", f"top_k {defaults.top_k or 'unlimited'}", f"top_p {defaults.top_p:g}"]
    if defaults.min_p:
        settings.append(f"min_p {defaults.min_p:g}")
    penalty = f"; repetition_penalty {defaults.repetition_penalty:g}" if defaults.repetition_penalty else ""
    start = "by default" if defaults.do_sample else "greedy by default; where sampling is requested"
    return f"{start}: {', '.join(settings)}{penalty}"


def _banned(defaults: SamplingDefaults) -> dict[str, str]:
    """Tokens that the checkpoint forbids."""
    lists = {name: getattr(defaults, name) or () for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")}
    counts = ", ".join(f"{len(ids)} of {name}" for name, ids in lists.items() if ids)
    return {"forbidden": f"{counts} (generation_config.json)"} if counts else {}


def _calibration(manifest: Manifest) -> dict[str, str]:
    """The calibration that weights were quantised with."""
    info = manifest.build.calibration
    if info is UNSET:
        return {}
    return {"calibrated": f"{info.method}, with {info.prompts} prompts and {info.pictures} images ({info.sha256[:16]})"}


def _cut_off(manifest: Manifest) -> dict[str, str]:
    """Values that an int8 cache cannot hold."""
    if not manifest.cache.text_dtype:
        return {}
    return {"cut off": "keys and values beyond the largest of their channel in the calibration and a margin"}


def _tuning(manifest: Manifest) -> dict[str, str]:
    """The machine that kernels were chosen on."""
    machine = manifest.build.tuned_on
    return {"tuned on": machine} if machine else {}


def _ranks(manifest: Manifest) -> dict[str, str]:
    """The number of processes that run the model together."""
    if manifest.ranks == 1:
        return {}
    stages = f" in each of {manifest.pp} pipeline stages; below is the first" if manifest.pp > 1 else ""
    return {"ranks": f"{manifest.ranks}: {manifest.tp} that share every layer{stages}"}


def _image(model: ModelInfo) -> str:
    image = model.image
    size = f"{image.size} x {image.size}, {image.mode}"
    if not image.grids:
        return f"{size}, {image.rows} tokens"
    grids = ", ".join(f"{rows} x {columns}" for rows, columns in image.grids)
    if image.mode == "tiles":
        return f"{size}, up to {image.tiles} in the grids {grids} (rows x columns)"
    return f"{size}, {image.rows} tokens for the whole image and for each tile of the grids {grids} (rows x columns)"


def _cross(manifest: Manifest) -> dict[str, str]:
    """The part of the cache for images that enter by cross-attention."""
    cross, cache = manifest.cache.cross, manifest.cache
    if cross is None:
        return {}
    nbytes = cache.nbytes - msgspec.structs.replace(cache, cross=None).nbytes
    return {
        "images": f"{cross.images} in a slot, {cross.rows} keys each ({cross.tiles} tiles), {cross.layers} cross-attention "
        f"layers, {nbytes / 1e6:.1f} MB of the cache",
        "text before": f"the first image is treated as in {manifest.model.text_before_image}",
    }


def _ascend(manifest: Manifest) -> dict[str, str]:
    """Chips and versions that Ascend's graphs were compiled for."""
    if (info := manifest.ascend) is None:
        return {}
    return {
        "made for": f"{info.soc}, torch_npu {info.torch_npu}, Python {info.python}, torchair cache {info.cache_format}",
        "holds code": CODE,
    }


def _signature(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Whether there is a signature of this manifest; `staticvl verify --key` checks by whom."""
    if not (folder / SIGNATURE).exists():
        return {"signed": "no"}
    stale = is_stale(folder, manifest)
    return {"signed": "no: the signature is of another manifest" if stale else "yes; `staticvl verify --key` says by whom"}


def _graphs(manifest: Manifest) -> Table:
    has_images, has_kernels = manifest.cache.cross is not None, bool(manifest.build.tuned_on)
    table = Table(title="graphs")
    names = (
        "kind",
        "bucket",
        *(("images",) if has_images else ()),
        "ms when compiled",
        "checks",
        "worst error",
        "allowed",
        "rounding",
        *(("kernels",) if has_kernels else ()),
    )
    for column in names:
        table.add_column(column, justify="left" if column in ("kind", "kernels") else "right")
    for graph in sorted(manifest.graphs, key=lambda g: (g.kind, g.images, g.bucket)):
        images = ("-" if graph.kind == "vision" else str(graph.images),) if has_images else ()
        table.add_row(
            graph.kind + (" (eager)" if graph.eager else ""),
            str(graph.bucket),
            *images,
            f"{graph.cost_ms:.2f}",
            *_checks(graph.certificate),
            *((graph.kernels.described if graph.kernels else "-",) if has_kernels else ()),
        )
    return table


def _communication(manifest: Manifest) -> Table:
    """Bytes that one rank of each stage sends to the others in one run, and for each token (or tile) of it."""
    staged = manifest.pp > 1
    table = Table(title="a rank brings to the others")
    names = ("all-reduces, gathers", "KB", "KB a token")
    for column in ("graph", *(("stage",) if staged else ()), *names, *(("to stages", "KB") if staged else ())):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for stage in range(manifest.pp):
        for graph in sorted(manifest.of_stage(stage).graphs, key=lambda g: (g.kind, g.images, g.bucket)):
            nbytes, sent = graph.collective_bytes, graph.sent
            row = [str(graph.collectives), f"{nbytes / 1e3:.1f}", f"{nbytes / graph.bucket / 1e3:.1f}"]
            stage_inputs = [str(len(sent)), f"{sum(spec.nbytes for spec in sent) / 1e3:.1f}"]
            table.add_row(graph.name, *([str(stage), *row, *stage_inputs] if staged else row))
    return table


def _checks(certificate: Certificate | None) -> tuple[str, str, str, str]:
    if certificate is None:
        return "-", "-", "-", "-"
    rounding = "-" if certificate.rounding is None else f"{certificate.rounding:.1e}"
    return str(len(certificate.cases)), f"{certificate.worst:.1e}", f"{certificate.tolerance:.0e}", rounding

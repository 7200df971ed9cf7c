"""`staticvl show`: what an artifact and this machine are, as tables or as one JSON document."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import msgspec
from msgspec import UNSET
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..runtime.artifact import PAGE_TOKENS, ImageProcessorConfig, SamplingDefaults
from .artifact_facts import ArtifactFacts, Facts, GraphFacts, cache_form, facts
from .capacity import ANSWER_TOKENS, TEXT_TOKENS, USABLE, Capacity
from .cards import KERNEL_US
from .machine import described

CODE = "Python byte code and source, which run as the user who loads it: use only what you trust (staticvl verify --key)"
SIGNED = {
    "none": "no",
    "stale": "no: the signature is of another manifest",
    "present": "yes; `staticvl verify --key` says by whom",
}


def run(args: argparse.Namespace) -> int:
    shown = facts(args.artifact, args.card, args.memory_gb and 1e9 * args.memory_gb)
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(shown), indent=1).decode())
        return 0
    console = Console(highlight=False)
    for table in _tables(shown):
        console.print(table)
    return 0


def _tables(shown: Facts) -> Iterator[Table]:
    artifact, here = shown.artifact, _here(shown)
    if artifact is None:
        yield _rows(here)
        return
    yield _rows({**_summary(artifact), **here}, notes=artifact.build.notes or ())
    yield _graphs(artifact)
    yield _forecast(artifact)
    yield capacity_table(artifact.capacity)
    if any(graph.launches for graph in artifact.graphs):
        yield _launches(artifact)
    if artifact.communication:
        yield _communication(artifact)


def _rows(rows: Mapping[str, str], notes: tuple[str, ...] = ()) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in (*rows.items(), *(("note", note) for note in notes)):
        table.add_row(name, escape(value))
    return table


def _here(shown: Facts) -> dict[str, str]:
    """This machine. What its processor does to products concerns ONNX Runtime alone."""
    installed = ", ".join(f"{name} {version}" for name, version in shown.versions.items() if version)
    on_processor = shown.artifact is None or shown.artifact.backend == "onnx"
    return {"installed": installed, **({"this machine": described(shown.machine)} if on_processor else {})}


def _summary(artifact: ArtifactFacts) -> dict[str, str]:
    model, cache, build = artifact.model, artifact.cache, artifact.build
    return {
        "model": f"{model.family} ({model.layout} layout), hidden {model.hidden_size}, vocabulary {model.vocab_size}",
        "image": _image(model.image),
        "backend": f"{artifact.backend}, quantisation {artifact.quant}",
        **_calibration(artifact),
        **({"tuned on": build.tuned_on} if build.tuned_on else {}),
        **_ranks(artifact),
        "weights": f"{artifact.weight_tensors} tensors, {artifact.weight_nbytes / 1e6:.1f} MB"
        + (" on each rank" if artifact.communication else ""),
        "cache": f"{cache_form(cache)}, {cache.layers} layers, {cache.kv_heads} kv heads of "
        f"{cache.head_dim}, {cache.text_dtype or cache.dtype}, {artifact.cache_nbytes / 1e6:.1f} MB",
        **_cut_off(artifact),
        **_cross(artifact),
        **_ascend(artifact),
        "sampling": sampling_line(model.sampling),
        **_banned(model.forbidden),
        "made by": f"staticvl {build.staticvl}, torch {build.torch}, schema {artifact.schema_version}",
        "digest": artifact.digest[:16],
        "signed": SIGNED[artifact.signature],
    }


def sampling_line(defaults: SamplingDefaults) -> str:
    """Sampling settings of a request that names none, or that asks for sampling and names nothing else."""
    settings = [f"temperature {defaults.temperature:g}", f"top_k {defaults.top_k or 'unlimited'}", f"top_p {defaults.top_p:g}"]
    if defaults.min_p:
        settings.append(f"min_p {defaults.min_p:g}")
    penalty = f"; repetition_penalty {defaults.repetition_penalty:g}" if defaults.repetition_penalty else ""
    start = "by default" if defaults.do_sample else "greedy by default; where sampling is requested"
    return f"{start}: {', '.join(settings)}{penalty}"


def _banned(forbidden: Mapping[str, int]) -> dict[str, str]:
    """Tokens that the checkpoint forbids."""
    counts = ", ".join(f"{count} of {name}" for name, count in forbidden.items())
    return {"forbidden": f"{counts} (generation_config.json)"} if counts else {}


def _calibration(artifact: ArtifactFacts) -> dict[str, str]:
    """The calibration that weights were quantised with."""
    info = artifact.build.calibration
    if info is UNSET:
        return {}
    return {"calibrated": f"{info.method}, with {info.prompts} prompts and {info.pictures} images ({info.sha256[:16]})"}


def _cut_off(artifact: ArtifactFacts) -> dict[str, str]:
    """Values that an int8 cache cannot hold."""
    if not artifact.cache.text_dtype:
        return {}
    return {"cut off": "keys and values beyond the largest of their channel in the calibration and a margin"}


def _ranks(artifact: ArtifactFacts) -> dict[str, str]:
    """The number of processes that run the model together."""
    if not artifact.communication:
        return {}
    stages = f" in each of {artifact.pp} pipeline stages; below is the first" if artifact.pp > 1 else ""
    return {"ranks": f"{artifact.tp * artifact.pp}: {artifact.tp} that share every layer{stages}"}


def _image(image: ImageProcessorConfig) -> str:
    size = f"{image.size} x {image.size}, {image.mode}"
    if not image.grids:
        return f"{size}, {image.rows} tokens"
    grids = ", ".join(f"{rows} x {columns}" for rows, columns in image.grids)
    if image.mode == "tiles":
        return f"{size}, up to {image.tiles} in the grids {grids} (rows x columns)"
    return f"{size}, {image.rows} tokens for the whole image and for each tile of the grids {grids} (rows x columns)"


def _cross(artifact: ArtifactFacts) -> dict[str, str]:
    """The part of the cache for images that enter by cross-attention."""
    cross = artifact.cache.cross
    if cross is None:
        return {}
    return {
        "images": f"{cross.images} in a slot, {cross.rows} keys each ({cross.tiles} tiles), {cross.layers} cross-attention "
        f"layers, {artifact.cross_nbytes / 1e6:.1f} MB of the cache",
        "text before": f"the first image is treated as in {artifact.model.text_before_image}",
    }


def _ascend(artifact: ArtifactFacts) -> dict[str, str]:
    """Chips and versions that Ascend's graphs were compiled for."""
    if (info := artifact.ascend) is None:
        return {}
    return {
        "made for": f"{info.soc}, torch_npu {info.torch_npu}, Python {info.python}, torchair cache {info.cache_format}",
        **_card_warnings(artifact),
        "holds code": CODE,
    }


def _card_warnings(artifact: ArtifactFacts) -> dict[str, str]:
    """Forms that are slow on a card or that known faults touch; `staticvl lint` names the nodes."""
    rules = ", ".join(f"{rule} {count}" for rule, count in artifact.card_warnings.items())
    return {"card warnings": f"{rules} (staticvl lint)"} if rules else {}


def _graphs(artifact: ArtifactFacts) -> Table:
    has_images, has_kernels = artifact.cache.cross is not None, bool(artifact.build.tuned_on)
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
    for graph in artifact.graphs:
        images = ("-" if graph.kind == "vision" else str(graph.images),) if has_images else ()
        table.add_row(
            graph.kind + (" (eager)" if graph.eager else ""),
            str(graph.bucket),
            *images,
            f"{graph.cost_ms:.2f}",
            *_checks(graph),
            *((graph.kernels or "-",) if has_kernels else ()),
        )
    return table


def _checks(graph: GraphFacts) -> tuple[str, str, str, str]:
    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}e}"

    checks = "-" if graph.checks is None else str(graph.checks)
    return checks, cell(graph.worst_error, 1), cell(graph.tolerance, 0), cell(graph.rounding, 1)


def _forecast(artifact: ArtifactFacts) -> Table:
    """Operations and bytes of each graph, and the least time that a card needs for it."""
    table = Table(title=f"lower bounds on {artifact.card}")
    for column in ("graph", "GFLOP", "MB", "ms", "bound by", "tokens/s"):
        table.add_column(column, justify="left" if column in ("graph", "bound by") else "right")
    for graph in artifact.graphs:
        best = graph.at_best
        rate = "-" if best.tokens_per_s is None else f"{best.tokens_per_s:.0f}"
        sizes = f"{graph.flops / 1e9:.3g}", f"{graph.nbytes / 1e6:.4g}"
        table.add_row(graph.name, *sizes, f"{best.ms:.3g}", best.bound_by, rate)
    return table


def capacity_table(capacity: Capacity) -> Table:
    """Sequences at once on one device."""
    tokens, images = f"{capacity.token_bytes / 1e3:.4g} KB a token", f", {capacity.image_bytes / 1e6:.4g} MB an image"
    table = Table(title=f"held in {capacity.memory / 1e9:g} GB: {tokens}{images if capacity.image_bytes else ''}")
    table.caption = (
        f"{capacity.cache / 1e9:.3g} GB for keys and values after weights and {1 - USABLE:.0%} for other uses; "
        f"a typical request has {capacity.request_tokens} tokens: an image, {TEXT_TOKENS} of text, {ANSWER_TOKENS} answered"
    )
    for column in ("cache", "GB a request", "requests at once", "tokens", "tokens/s at most"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    rows = (("slots", capacity.slots, "-"), (f"pages of {PAGE_TOKENS}", capacity.pages, str(capacity.tokens)))
    for name, held, count in rows:
        table.add_row(name, f"{held.request_bytes / 1e9:.3g}", str(held.requests), count, f"{held.tokens_per_s:.0f}")
    return table


def _launches(artifact: ArtifactFacts) -> Table:
    """Kernels of lowered graphs, and the time of a run with the cost of each."""
    table = Table(title=f"with {KERNEL_US:g} us for each kernel, an assumption")
    lowered = [(graph, graph.launches) for graph in artifact.graphs if graph.launches]
    if unsized := sum(launches.unsized for _, launches in lowered):
        table.caption = f"{unsized} tensors of unknown size are counted as no bytes"
    for column in ("graph", "kernels", "a layer", "ms without", "ms", "tokens/s"):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for graph, launches in lowered:
        layer = "-" if launches.layer_kernels is None else f"{launches.layer_kernels:.1f}"
        rate = "-" if launches.tokens_per_s is None else f"{launches.tokens_per_s:.0f}"
        table.add_row(graph.name, str(launches.kernels), layer, f"{graph.at_best.ms:.3g}", f"{launches.ms:.3g}", rate)
    return table


def _communication(artifact: ArtifactFacts) -> Table:
    """Bytes that one rank of each stage sends to the others in one run, and for each token (or tile) of it."""
    staged = artifact.pp > 1
    table = Table(title="sent by one rank to the others")
    names = ("all-reduces, gathers", "KB", "KB a token")
    for column in ("graph", *(("stage",) if staged else ()), *names, *(("to stages", "KB") if staged else ())):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for each in artifact.communication:
        row = [str(each.collectives), f"{each.nbytes / 1e3:.1f}", f"{each.nbytes / each.bucket / 1e3:.1f}"]
        stage_inputs = [str(each.to_stages), f"{each.to_stages_nbytes / 1e3:.1f}"]
        table.add_row(each.graph, *([str(each.stage), *row, *stage_inputs] if staged else row))
    return table

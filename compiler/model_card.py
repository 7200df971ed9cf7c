"""The model card of an artifact: README.md, for people and for model hubs.

The manifest does not list it, so that it may be edited. Its last line has a digest of all others: a card that was edited
stays. What differs each time, such as times that were measured, and so the manifest's own digest, is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..runtime.artifact import KINDS, GraphSpec, Manifest
from ..runtime.files import read_regular, write_atomically
from .licence import Licence, read_licence
from .options import Options
from .progress import Progress

CARD = "README.md"
FAMILIES = {"llava": "LLaVA-1.5", "llava_next": "LLaVA-1.6", "mllama": "Llama-3.2-Vision", "qwen_vl": "Qwen-VL"}
_TARGETS = {"onnx": "ONNX Runtime on a CPU", "ascend": "Ascend"}
_MARK = "<!-- Written by staticvl compile; once edited it is kept. SHA-256 of all above: "
_MARKED = re.compile(rf"(.*\n){re.escape(_MARK)}([0-9a-f]{{64}}) -->\n", re.DOTALL)
_HUB_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # of the cache of a hub's client, which has ORGANISATION/NAME so
_MOST = 1 << 24  # bytes of a card


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model came from, besides what the manifest has."""

    folder: str  # name of the checkpoint's folder
    base_model: str  # as a model hub calls it; "": not known
    licence: Licence


def origin(options: Options) -> Origin:
    checkpoint = options.checkpoint.resolve()
    return Origin(checkpoint.name, _base_model(checkpoint), read_licence(checkpoint))


def _base_model(checkpoint: Path) -> str:
    """The model that a hub's client downloaded into its cache: models--ORGANISATION--NAME/snapshots/REVISION."""
    if checkpoint.parent.name != "snapshots":
        return ""
    match = _HUB_FOLDER.fullmatch(checkpoint.parent.parent.name)
    return f"{match[1]}/{match[2]}" if match else ""


def store_card(options: Options, manifest: Manifest, old: Manifest | None, progress: Progress) -> None:
    """Write the card of `options.out`, unless the one that is there was edited; `old` is the manifest before."""
    path, card = options.out / CARD, model_card(manifest, origin(options), options.out.resolve().name)
    there = _read(path)
    if path.exists() and not _is_unchanged(there):
        if old is None or old.digest != manifest.digest:
            progress.say(f"{path} was edited and stays, though the artifact is another one; remove it for a new one")
    elif there != card:
        write_atomically(path, card.encode("utf-8"))


def is_card(path: Path) -> bool:
    """Whether `staticvl compile` wrote this file, whatever was edited since."""
    return path.name == CARD and _MARK in _read(path)


def _read(path: Path) -> str:
    """The text of a card; "" where there is none, or something else."""
    try:
        return read_regular(path, _MOST).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _is_unchanged(card: str) -> bool:
    match = _MARKED.fullmatch(card)
    return match is not None and hashlib.sha256(match[1].encode()).hexdigest() == match[2]


def model_card(manifest: Manifest, origin: Origin, name: str) -> str:
    """The text of the card of an artifact in a folder of this name."""
    title = "".join(c for c in name if c.isprintable())
    text = "\n".join(
        [
            *_front_matter(origin),
            f"# {title}",
            "",
            f"{_family(manifest)}, compiled by staticvl to {len(_all_graphs(manifest))} graphs of fixed shapes for "
            f"{_TARGETS[manifest.backend]}.",
            "",
            *_facts(manifest, origin),
            "## Run it",
            "",
            *_commands(manifest, shlex.quote(title)),
            *_python(manifest, title),
            "## Certificates",
            "",
            *_certificates(manifest),
            "## Licence",
            "",
            f"Of the weights: {origin.licence.sentence}",
            "",
            "## Files that it was made from",
            "",
            *_table(("file", "SHA-256"), ((f"`{file}`", spec.sha256) for file, spec in manifest.build.source.items())),
            "",
        ]
    )
    return f"{text}{_MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _front_matter(origin: Origin) -> Iterator[str]:
    """As model hubs read it; JSON texts are YAML."""
    fields = {
        "library_name": "staticvl",
        "pipeline_tag": "image-text-to-text",
        "license": origin.licence.name,
        **({"base_model": origin.base_model} if origin.base_model else {}),
    }
    yield "---"
    yield from (f"{key}: {json.dumps(value)}" for key, value in fields.items())
    yield "---"
    yield ""


def _family(manifest: Manifest) -> str:
    return FAMILIES.get(manifest.model.family, manifest.model.family)


def _facts(manifest: Manifest, origin: Origin) -> Iterator[str]:
    model, cache, build = manifest.model, manifest.cache, manifest.build
    weights = sum(spec.nbytes for name, spec in manifest.files.items() if name.startswith("weights/"))
    cross = f", {cache.cross.images} images of {cache.cross.rows} keys in each" if cache.cross else ""
    stages = f", in {manifest.pp} stages" if manifest.pp > 1 else ""
    rows = {
        "model": f"{_family(manifest)} ({model.layout} layout), hidden size {model.hidden_size}, vocabulary {model.vocab_size}",
        "checkpoint": (f"{origin.base_model}, " if origin.base_model else "")
        + f"the folder `{origin.folder.replace('`', '')}`",
        "digest of checkpoint and settings": f"`{build.key}`",
        "quantisation": manifest.quant,
        "weights": f"{len(manifest.weights)} tensors, {weights / 1e6:.1f} MB",
        "image": f"{model.image.size} x {model.image.size} pixels ({model.image.mode})",
        "context": f"{cache.context} tokens, {cache.slots} at once{cross}",
        "cache": f"{cache.text_dtype or cache.dtype}, {cache.nbytes / 1e6:.1f} MB",
        "processes": f"{manifest.ranks}{stages}",
        "made by": f"staticvl {build.staticvl}, torch {build.torch}, format {manifest.schema_version}",
    }
    if info := manifest.ascend:
        rows["made for"] = f"{info.soc}, torch_npu {info.torch_npu}, Python {info.python}"
    yield from _table(("", ""), rows.items())


def _commands(manifest: Manifest, name: str) -> Iterator[str]:
    device = " --device npu" if manifest.backend == "ascend" else ""
    yield "```sh"
    yield f"staticvl verify {name}"
    yield f'staticvl generate {name}{device} --image cat.jpg --prompt "What is in the picture?"'
    yield f"staticvl serve {name}{device}"
    yield "```"
    yield ""


def _python(manifest: Manifest, name: str) -> Iterator[str]:
    device = ', device="npu"' if manifest.backend == "ascend" else ""
    yield "```python"
    yield "from staticvl import runtime"
    yield ""
    yield f"with runtime.load({json.dumps(name, ensure_ascii=False)}{device}) as model:"
    yield '    print(model.generate("What is in the picture?", images=["cat.jpg"]).text)'
    yield "```"
    yield ""
    yield "Compiled with these options, and the buckets below:"
    yield ""
    yield "```sh"
    yield manifest.recompilation()
    yield "```"
    yield ""


def _certificates(manifest: Manifest) -> Iterator[str]:
    """The largest error of each kind of graph."""
    yield "Each graph was compared with its definition at the edges of its bucket. An error is the largest absolute"
    yield "difference, divided by the largest magnitude of the reference."
    yield ""
    graphs = _all_graphs(manifest)
    kinds = (kind for kind in KINDS if any(graph.kind == kind for graph in graphs))
    yield from _table(
        ("graphs", "buckets", "worst error", "allowed", "rounding"),
        (_certified(kind, [graph for graph in graphs if graph.kind == kind]) for kind in kinds),
    )


def _all_graphs(manifest: Manifest) -> list[GraphSpec]:
    """Of all stages."""
    return [graph for stage in range(manifest.pp) for graph in manifest.of_stage(stage).graphs]


def _certified(kind: str, graphs: list[GraphSpec]) -> tuple[str, ...]:
    certificates = [graph.certificate for graph in graphs if graph.certificate]
    rounding = [certificate.rounding for certificate in certificates if certificate.rounding is not None]
    buckets = ", ".join(map(str, sorted({graph.bucket for graph in graphs})))
    if len(certificates) < len(graphs):
        return kind, buckets, "not certified", "-", "-"
    worst = max(certificate.worst for certificate in certificates)
    allowed = max(certificate.tolerance for certificate in certificates)
    return kind, buckets, f"{worst:.1e}", f"{allowed:.0e}", f"{max(rounding):.1e}" if rounding else "-"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield _row(head)
    yield _row(("---",) * len(head))
    yield from map(_row, rows)
    yield ""


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |"

"""The fingerprint of a build: digests of the checkpoint's files, of our own code, and of settings.

Two builds with the same key give the same files, so files that have the key already are not made again.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from ..model_defs.config import ModelConfig
from ..runtime.artifact import GraphKey, ModelInfo, SourceFile
from ..runtime.backends.ascend import torchair_host
from ..runtime.backends.cores import processor_name, usable_cores
from ..runtime.files import sha256_file
from ..weights.packing.settings import Packing
from .digests import digest
from .option_table import entering
from .options import Options
from .plan import Plan
from .progress import Progress
from .source_files import code_digests

# Modules that only the graphs of the other backend need.
OTHER_BACKENDS = {
    "onnx": (
        "compiler.card_check",
        "compiler.emit_ascend",
        "compiler.emit_eager",
        "compiler.ge_cost",
        "compiler.ge_sizes",
        "runtime.backends.ascend.backend",
        "runtime.backends.ge_simulator",
    ),
    "ascend": ("compiler.emit_onnx", "compiler.kernels", "runtime.backends.ort"),
}
_PACKAGES = {"onnx": ("torch", "onnx", "onnxruntime"), "ascend": ("torch",)}
WEIGHT_FILES = (".safetensors", ".bin", ".index.json")
ADAPTER = "lora/"  # an adapter's files among the others; its config counts too
_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".jinja", ".tiktoken")


def fingerprint(options: Options, earlier: Mapping[str, SourceFile], progress: Progress) -> dict[str, SourceFile]:
    """Digest of every file of the checkpoint that an artifact depends on, by name.

    A file with the size and modification time of its entry in `earlier` is not read again.
    """
    files = dict(_source_files(options))
    fresh: dict[str, SourceFile] = {}
    changed = []
    for name, path in files.items():
        stat, old = path.stat(), earlier.get(name)
        if old and (old.nbytes, old.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            fresh[name] = old
        else:
            changed.append(name)
    total = sum(files[name].stat().st_size for name in changed)
    with progress.stage("reading the checkpoint", total, "B") as advance:
        for name in changed:
            stat = files[name].stat()
            sha256 = sha256_file(files[name], advance)
            fresh[name] = SourceFile(nbytes=stat.st_size, sha256=sha256, mtime_ns=stat.st_mtime_ns)
    return dict(sorted(fresh.items()))


def _source_files(options: Options) -> Iterator[tuple[str, Path]]:
    for prefix, folder in (("", options.checkpoint), ("vision_tower/", options.vision_tower), (ADAPTER, options.lora)):
        if folder is not None:
            for path in sorted(folder.iterdir()):
                if path.is_file() and path.suffix in _SUFFIXES:
                    yield prefix + path.name, path


def weights_key(source: Mapping[str, SourceFile], config: ModelConfig, options: Options, packing: Packing | None) -> str:
    """Digest of everything that the weight files are made from."""
    packed = asdict(packing) if packing else None
    contents = {name: file.sha256 for name, file in source.items() if name.startswith(ADAPTER) or name.endswith(WEIGHT_FILES)}
    made_by = [asdict(config), packed, entering(options, "weights"), code_digests("weights.convert")]
    if calibration := options.calibration:
        # Files beside the weights say how prompts are written and images cut.
        settings = {name: file.sha256 for name, file in source.items() if name not in contents}
        made_by += [calibration.sha256, settings, entering(options, "calibration"), code_digests("compiler.calibrate")]
    return digest(contents, *made_by)


class GraphDigests:
    """Digests of everything that a graph and its certificate are made from."""

    def __init__(self, options: Options, config: ModelConfig, info: ModelInfo, plan: Plan, weights: str) -> None:
        self.image, self.cache = msgspec.to_builtins(info.image), msgspec.to_builtins(plan.cache)
        self.cache["candidates"] = plan.candidates
        backend = options.backend
        versions = [importlib.metadata.version(name) for name in _PACKAGES[backend]]
        if backend == "ascend":
            versions += ["fused all-reduce"] * options.fuse_all_reduce
            versions += [torchair_host.VERSION, options.soc, *platform.python_version_tuple()[:2]]
        code = code_digests("compiler.make", without=OTHER_BACKENDS[backend])
        self.eager = options.eager
        # The fastest kernels are measured again on another machine.
        self.tuned = (processor_name(), usable_cores()) if options.tune else None
        self.common = (weights, asdict(config), options.stored_quant, options.tp, backend, versions, code)

    def of(self, key: GraphKey) -> str:
        settings: dict[str, Any] = dict(self.image if key.kind == "vision" else self.cache)
        if key.kind in ("prefill", "verify"):
            settings.pop("slots")  # slots only matter to graphs whose rows are slots
        if settings.get("cross"):
            # A graph reads as many images as its key says, however many more a sequence may hold.
            settings["cross"] = {name: value for name, value in settings["cross"].items() if name != "images"}
        tuned = self.tuned if key.kind != "vision" else None
        return digest(*key, settings, key.kind in self.eager, tuned, *self.common)

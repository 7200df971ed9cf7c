"""Prepacked weights: weights in the layout of this machine's kernels, packed once and shared by the sessions of all buckets.

onnxruntime packs weights into the layout of its kernels. By default every session packs a copy of its own: memory times
the number of buckets, and seconds at every start. Without packing, some kernels are slow (8-bit ones by two orders of
magnitude). onnxruntime can write a model together with its prepacked weights, and maps them when it opens such a model. So
here one graph of each set of weights is packed and written, and copies of all graphs are made that refer to the prepacked
weights by the same initializer names: all sessions then map the same pages. A graph in steps is packed and copied segment by
segment. Where the processor needs it, signed bytes are made unsigned before (see unsigned_weights.py).

The layout depends on the processor and on onnxruntime, so this is a cache beside the artifact and not part of it: the
folder .host/KEY, where KEY covers both and the files that were packed, so that a file which was damaged when it was
packed and then repaired is packed again. Each rank of a sharded model has its own, .host/rank-R/KEY, independent of the
others': ranks pack at the same time, on machines that may hold no other rank's weights. The folder can be deleted at any
time. Its files are listed with sizes and digests, so that a damaged file is noticed and all of it made again. A process
that uses a cache holds it (runtime/locks.py), and others do not remove it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import msgspec
import onnxruntime as ort

from ..artifact import WEIGHTS, FileSpec, GraphSpec, WeightSpec
from ..files import fsync, fsync_folder, open_regular, read_regular, sha256_file
from ..locks import READERS, Hold, alone, hold
from ..soundness import leads_out
from . import unsigned_weights
from .packed_file import Entry, is_packed, lay_out

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

# onnxruntime aligns tensors of this size and more in the file that it writes. Kernels fault on packed weights that are not
# aligned, so a file with smaller ones is laid out again.
ALIGNED_FROM = 1 << 20
SHARED_FROM = 1 << 14  # bytes of a tensor; below, sharing saves nothing

# Upcast in every run, so that no kernel ever packs them.
NEVER_PACKED = ("float16", "bfloat16")

FOLDER = ".host"
FILES = "files.json"  # sizes and digests of all other files of one cache
MAX_FILES_BYTES = 1 << 26  # bytes of FILES
SAVE_PREPACKED = "session.save_external_prepacked_constant_initializers"
FILE_NAME = "session.optimized_model_external_initializers_file_name"
MIN_SIZE = "session.optimized_model_external_initializers_min_size_in_bytes"


def host_key(files: Iterable[Path]) -> str:
    """The key of a cache: a digest of the machine, onnxruntime, and the artifact's files with their sizes and times."""
    stats = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    parts = (ort.__version__, platform.machine(), _cpu(), *map(str, stats))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Model and features of the processor, as Linux lists them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        fields = ("model name", "flags", "Features", "CPU part", "CPU implementer")
        return "\n".join(line for line in lines if line.startswith(fields))
    return platform.processor()


class HostCache:
    """Copies of an artifact's graphs with prepacked weights. `folder`: the artifact; `weights`: those of `rank` of all
    `ranks`."""

    def __init__(
        self, folder: Path, graphs: Iterable[GraphSpec], weights: Iterable[WeightSpec], *, ranks: int = 1, rank: int = 0
    ) -> None:
        self.artifact, self.graphs, self.ranks = folder, tuple(graphs), ranks
        weights = tuple(weights)
        self.nbytes = sum(weight.nbytes for weight in weights if weight.dtype not in NEVER_PACKED)
        self.signed = any(weight.dtype == "int8" for weight in weights)
        self.weight_files = sorted({weight.file for weight in weights})
        self.graph_files = [file for graph in self.graphs for file in graph.files]
        self.home = folder / FOLDER if ranks == 1 else folder / FOLDER / _rank_name(rank)
        self.hold = Hold(None)
        self.folder = self.home / host_key(folder / name for name in (*self.weight_files, *self.graph_files))

    @property
    def _needs_unsigned(self) -> bool:
        return self.signed and unsigned_weights.saturates()

    def path(self, file: str) -> Path | None:
        """The prepacked copy of a graph's or a segment's file; None where there is none."""
        path = self.folder / _copy_name(file)
        return path if path.is_file() else None

    def _complete(self, *, verify: bool) -> bool:
        """Whether the cache is complete; it is then held, so that no other process removes it."""
        if not self.folder.is_dir():
            return False
        new_hold = hold(self.folder)
        if _fault(self.folder, self.artifact, verify=verify, graphs=map(_copy_name, self.graph_files)):
            new_hold.close()
            return False
        self.hold = new_hold
        return True

    def acquire(self) -> None:
        """Hold the cache again, if it was released."""
        if not self.hold.held and self.folder.is_dir():
            self.hold = hold(self.folder)

    def release(self) -> None:
        """Release the cache, so that others may remove it."""
        self.hold.close()

    def ensure(self, options: Callable[[], ort.SessionOptions], *, verify: bool = False) -> bool:
        """Make the cache where it is missing or damaged; False, with a logged reason, where that is not possible. `options`:
        for packing.

        Sizes are checked, and digests of graphs; with `verify`, those of weights too.
        """
        if self._complete(verify=verify):
            return True
        if reason := self._obstacle():
            log.warning("weights are not packed for this machine: %s", reason)
            return False
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with alone(self.home / "lock", wait=True):  # one process packs, others wait
                if not self._complete(verify=verify):  # no other process has made it meanwhile
                    self._make(options)
        except OSError as error:  # a full disk, a file system without hard links: the artifact runs without
            log.warning("weights are not packed for this machine: %s", error)
            return False
        return True

    def _obstacle(self) -> str | None:
        try:
            import onnx  # noqa: F401
        except ImportError:
            return "the package onnx is not installed"
        if not os.access(self.artifact, os.W_OK):
            return f"{self.artifact} is not writable"
        free = shutil.disk_usage(self.artifact).free
        needed = (3.2 if self._needs_unsigned else 2.2) * self.nbytes
        if free < needed:
            return f"{needed / 1e9:.1f} GB are needed beside {self.artifact}, {free / 1e9:.1f} GB are free"
        return None

    def _make(self, options: Callable[[], ort.SessionOptions]) -> None:
        log.info("packing weights for this machine into %s", self.folder)
        self._remove_old()
        work = Path(tempfile.mkdtemp(prefix="making-", dir=self.home))
        try:
            self._link_weights(work)
            self._write_unsigned(work)
            packed: dict[str, Entry] = {}
            for graph in self._one_of_each():
                for number, file in enumerate(graph.files):
                    name = f"{graph.kind}.{number:03d}" if graph.steps else graph.kind
                    packed |= self._pack(work, file, name, options())
            used_files = {
                name for file in self.graph_files for name in _refer(self._read(file), work / _copy_name(file), packed)
            }
            for name in self._weight_names():
                if name + unsigned_weights.SUFFIX not in used_files:  # all of its weights are prepacked
                    (work / (name + unsigned_weights.SUFFIX)).unlink(missing_ok=True)
            _seal(work)
            self.hold = hold(work)  # the lock goes along with the folder
            if self.folder.exists():  # damaged, and perhaps in use
                self.folder.rename(tempfile.mkdtemp(prefix="damaged-", dir=self.home))
            work.replace(self.folder)
            fsync_folder(self.home)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _remove_old(self) -> None:
        """Remove caches of another onnxruntime, processor or build that no process uses, but not those of other ranks of this
        build."""
        ranks = {_rank_name(rank) for rank in range(self.ranks)} if self.ranks > 1 else set()
        for old in {*(self.artifact / FOLDER).iterdir(), *self.home.iterdir()}:
            if old.is_dir() and not old.is_symlink() and old.name not in ranks:
                _remove_unused(old)

    def _link_weights(self, work: Path) -> None:
        """Link the weight files under the names in the graphs, since onnxruntime follows no path out of a model's folder."""
        for file, name in zip(self.weight_files, self._weight_names(), strict=True):
            (work / name).parent.mkdir(exist_ok=True)
            os.link(self.artifact / file, work / name)

    def _weight_names(self) -> list[str]:
        """The names of the weight files in the graphs."""
        return [name if self.ranks == 1 else PurePath(name).name for name in self.weight_files]

    def _write_unsigned(self, work: Path) -> None:
        """Write the files of unsigned weights that this processor needs, beside the links."""
        ranges: dict[str, set[tuple[int, int]]] = {}
        for file in self.graph_files if self._needs_unsigned else ():
            for name, parts in unsigned_weights.make_unsigned(_plain(self.artifact / file)).items():
                ranges.setdefault(name, set()).update(parts)
        unsigned_weights.write(work, ranges)

    def _one_of_each(self) -> list[GraphSpec]:
        """The fewest graphs that together have all weights: decode graphs have those of prefill, and those for images all
        layers. A stage after the first of a pipeline may have no vision graph."""
        smallest = {graph.kind: graph for graph in sorted(self.graphs, key=lambda g: (g.images, -g.bucket))}
        return [smallest[kind] for kind in ("vision", "prefill") if kind in smallest]

    def _read(self, file: str) -> onnx.ModelProto:
        """A graph in the form that this processor can run."""
        model = _plain(self.artifact / file)
        if self._needs_unsigned:
            unsigned_weights.make_unsigned(model)
        return model

    def _pack(self, work: Path, file: str, name: str, options: ort.SessionOptions) -> dict[str, Entry]:
        """Let onnxruntime write one graph or segment with prepacked weights, these into NAME.bin; the entry of each
        initializer that it packed."""
        source, target = work / f"{name}.plain.onnx", work / f"{name}.packed.onnx"
        model = self._read(file)
        source.write_bytes(_without_unpacked(model).SerializeToString())  # beside the links to this rank's weights
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # initializers keep their names
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry(SAVE_PREPACKED, "1")
        options.add_session_config_entry(FILE_NAME, f"{name}.bin")
        options.add_session_config_entry(MIN_SIZE, str(SHARED_FROM))
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        model = _plain(target)
        source.unlink()
        target.unlink()
        entries = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
        packed = {name: entry for name, entry in entries.items() if is_packed(entry)}
        if not packed:  # only copies of tensors that are never packed, such as a table
            (work / f"{name}.bin").unlink(missing_ok=True)
        small = any(int(entry["length"]) < ALIGNED_FROM for entry in packed.values())
        return lay_out(work / f"{name}.bin", packed) if small else packed


def _rank_name(rank: int) -> str:
    return f"rank-{rank}"


def _copy_name(file: str) -> str:
    """The name of a graph's copy, which is beside the weights that it refers to."""
    return file.replace("/", ".")


def _plain(file: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(file, load_external_data=False)


def _refer(model: onnx.ModelProto, target: Path, packed: dict[str, Entry]) -> set[str]:
    """Write a graph that refers to prepacked weights where there are some; the names of the files that it reads."""
    for tensor in model.graph.initializer:
        if tensor.name in packed:
            del tensor.external_data[:]
            for key, value in packed[tensor.name].items():
                tensor.external_data.add(key=key, value=value)
    target.write_bytes(model.SerializeToString())
    return {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}


def _without_unpacked(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with tensors that are never packed as inputs: onnxruntime would write them beside the prepacked weights."""
    from onnx import TensorProto, helper

    codes = {TensorProto.DataType.Value(name.upper()) for name in NEVER_PACKED}
    graph = model.graph
    unpacked = [tensor for tensor in graph.initializer if tensor.data_type in codes]
    graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in unpacked)
    others = [tensor for tensor in graph.initializer if tensor.data_type not in codes]
    del graph.initializer[:]
    graph.initializer.extend(others)
    return model


def _remove_unused(folder: Path) -> None:
    """Remove a cache, or those of a rank of another build, unless some process holds it. Another may be removing it too."""
    if folder.name.startswith("rank-"):
        for each in folder.iterdir():
            if each.is_dir() and not each.is_symlink():
                _remove_unused(each)
        if any(each.is_dir() for each in folder.iterdir()):
            return
    with contextlib.suppress(OSError), alone(folder / READERS) as free:
        if free:
            shutil.rmtree(folder, ignore_errors=True)


def _seal(work: Path) -> None:
    """Write FILES, the list of a cache's files, and flush all of them to the disk. Weight files are those of the artifact,
    which has their digests, and are not read again."""
    specs = {}
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        own = path.stat().st_nlink == 1
        specs[str(path.relative_to(work))] = FileSpec(nbytes=path.stat().st_size, sha256=sha256_file(path) if own else "")
        if own:
            fsync(path)
    (work / FILES).write_bytes(msgspec.json.encode(specs))
    fsync(work / FILES)
    for folder in (work, *(path for path in work.iterdir() if path.is_dir())):
        fsync(folder)


def _fault(folder: Path, artifact: Path, *, verify: bool, graphs: Iterable[str] = ()) -> str | None:
    """The fault of a cache; None for a sound one. `graphs`: files that it must hold. Digests of graphs are checked, and with
    `verify` those of weights."""
    weight_inodes = {path.stat().st_ino for path in (artifact / WEIGHTS).rglob("*") if path.is_file()} if verify else set()
    try:
        specs = msgspec.json.decode(read_regular(folder / FILES, MAX_FILES_BYTES), type=dict[str, FileSpec])
        for name in {*specs, *graphs}:
            spec, path = specs[name], folder / name
            with open_regular(path) as file:
                nbytes, inode = file.seek(0, 2), os.fstat(file.fileno()).st_ino
            if nbytes != spec.nbytes or leads_out(name):
                return f"{path} has {nbytes} bytes, expected {spec.nbytes}"
            if spec.sha256 and (verify or name.endswith(".onnx")) and sha256_file(path) != spec.sha256:
                return f"{path} does not match its sha256 in {FILES}"
            if verify and not spec.sha256 and inode not in weight_inodes:
                return f"{path} is no weight file of the artifact"
    except (OSError, msgspec.MsgspecError, KeyError, RecursionError) as error:
        return f"{folder} is not complete ({error})"
    return None


def remove_damaged(artifact: Path) -> list[str]:
    """Check all prepacked weights beside an artifact, and remove damaged caches, which are made again at the next start.

    A sentence about the fault of each; one that is in use stays.
    """
    faults = []
    for files in sorted((artifact / FOLDER).rglob(FILES)):
        if fault := _fault(files.parent, artifact, verify=True):
            _remove_unused(files.parent)
            outcome = "it is in use, so end what uses it" if files.exists() else "removed, to be made again at the next start"
            faults.append(f"{fault}: {outcome}")
    return faults

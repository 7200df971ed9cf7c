"""The backend for ONNX Runtime on CPU. Caches are numpy arrays bound by pointer as input and output of the same run, so they
are updated in place; feeds are bound by pointer once and then refilled.

A graph in steps, one rank's of several, is run segment by segment; buffers between them are arrays bound by pointer too, and
the backend's group works on the same arrays.

Memory: the sessions of all buckets share one copy of the weights (see host_cache) and one arena for intermediate values.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore[reportAttributeAccessIssue]

from ..artifact import ArtifactError, CacheSpec, Collective, GraphSpec, Manifest, Segment, Transfer, rank_weights
from ..heap import release_freed
from ..opening import RunError, reading, remedy
from ..sampling.candidates import candidates_of
from ..shown import quoted
from . import unsigned_weights
from .base import Group, Result, cache_name, check_group, checked, copy_rows, is_text, weights_folder, world_rank
from .cores import usable_cores
from .host_cache import HostCache
from .mapped_pages import release_pages
from .unused_pages import give_back, use_small_pages

log = logging.getLogger(__name__)
SPIN_US = "STATICVL_SPIN_US"
# None of them is a RuntimeError.
RUN_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.RuntimeException,
    ort_errors.EPFail,
    ort_errors.NotImplemented,
    ort_errors.NoSuchFile,
)
_PROVIDERS = ["CPUExecutionProvider"]
# The first would keep a float32 copy of every weight in 16 bits in every session. Where weights are made unsigned, the second
# would change tensors that are not multiplied too, and fails where scales are those of channels.
_DISABLED_OPTIMIZERS = ["ConstantFolding", "QDQS8ToU8Transformer"]
BETWEEN = "@"  # in the name of an output that is a cache after a piece of a chunk (see docs/artifact.md)
# onnxruntime follows no path out of a model's folder, but for a model given as bytes it takes the folder of the weights, so the
# segment files are there once, whichever ranks run here, and neither copies nor links of them are needed.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@functools.cache
def _register_arena() -> None:
    """Register one arena for all sessions of the process, so that a bucket that is not running holds no memory for
    intermediate values."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(memory, None)
    except RuntimeError as error:  # other code in this process has registered one: use that
        log.debug("using the allocator that is there: %s", error)


# Bytes below which prepacked weights are not worth their place on disk: the kernels are as fast without.
WORTH_PACKING = 64 << 20
# Bytes below which one core is done with a product before a second one is awake, and every session may pack its own
# weights: on the embedded tiny model, steps of one row are 1.4 times as fast on one core, and those of 8 rows 1.6 times as fast
# packed.
SMALL = 16 << 20


def _options(*, pack: bool, threads: int | None, shared: bool = True) -> ort.SessionOptions:
    """Options of a session. `shared`: intermediate values are in the arena of all sessions, else in one that is freed with the
    session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    # Workers that wait in a loop take the cores from everything else: where one core of two is busy, steps take 1.3 times as
    # long with 20 us of it. On a machine of its own they take 0.9 times as long. A pool shared by all sessions always
    # spins, and would be forced upon every other session of the process.
    spin = _spin_us()
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin > 0)))
    if spin:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin))
        options.add_session_config_entry("session.force_spinning_stop", "1")  # when a run ends
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1" if shared else "0")
    options.add_session_config_entry("session.disable_prepacking", "0" if pack else "1")
    for key, value in unsigned_weights.entries().items():
        options.add_session_config_entry(key, value)
    return options


def _spin_us() -> int:
    """Microseconds that a core waits in a loop for the next operator of a run before it sleeps."""
    value = os.environ.get(SPIN_US, "0")
    if not value.isdecimal():
        raise ArtifactError(
            f"{SPIN_US} is {quoted(value)}; expected microseconds, such as 20, or 0 for cores that sleep at once"
        )
    return int(value)


class _BoundGraph:
    """A graph with all inputs and outputs bound for one slot. `calls`: its segments and collectives, in order."""

    def __init__(
        self, feed: Mapping[str, np.ndarray], arrays: dict[str, np.ndarray], calls: list[Callable[[], object]]
    ) -> None:
        self.feed, self.fed_arrays, self.calls = feed, dict(feed), calls
        self.arrays = arrays  # the calls have pointers to them

    def matches(self, feed: Mapping[str, np.ndarray]) -> bool:
        """Whether it was bound to the arrays of this feed."""
        return self.feed is feed or all(self.fed_arrays.get(name) is array for name, array in feed.items())

    def run(self) -> None:
        for call in self.calls:
            call()


def _segment(
    session: ort.InferenceSession, segment: Segment, arrays: Mapping[str, np.ndarray], free: dict[str, np.ndarray]
) -> Callable[[], object]:
    """A call that runs one segment, whose inputs and outputs are bound by pointer; every run puts outputs without an array
    into `free`."""
    binding = session.io_binding()
    for bind, names in ((binding.bind_input, segment.inputs), (binding.bind_output, segment.outputs)):
        for name in names:
            if name in arrays:
                array = arrays[name]
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            else:
                binding.bind_output(name, "cpu")
    for name in (value.name for value in session.get_outputs() if BETWEEN in value.name):
        array = arrays[name.partition(BETWEEN)[0]]
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    run = partial(session.run_with_iobinding, binding)
    if all(name in arrays for name in segment.outputs):
        return run

    def run_and_keep() -> None:
        run()
        values = zip(segment.outputs, binding.get_outputs(), strict=False)  # after them are caches between pieces of a chunk
        free.update({name: value.numpy() for name, value in values if name not in arrays})

    return run_and_keep


def _collective(group: Group, item: Collective | Transfer, arrays: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """A call that runs one collective, or one transfer between stages."""
    if isinstance(item, Transfer):
        return partial(group.send if item.op == "send" else group.receive, arrays[item.name], item.stage)
    source, target = arrays[item.reads], arrays[item.writes]
    if item.op == "all_gather":
        return partial(group.all_gather, source, target)
    if item.reads == item.writes:
        return partial(group.all_reduce, target)

    def copy_and_sum() -> None:  # the source is read again later
        np.copyto(target, source)
        group.all_reduce(target)

    return copy_and_sum


class OrtBackend:
    """See backends.base.Backend."""

    def __init__(
        self,
        folder: Path,
        cache: CacheSpec,
        *,
        threads: int | None = None,
        few_cores: int | None = None,
        host: HostCache | None = None,
        pack: bool = True,
        shared: bool = True,
        group: Group | None = None,
        models: Mapping[str, bytes] | None = None,
        verify: bool = False,
    ) -> None:
        """`group`: where the graphs are those of one rank of several; `cache` is then this rank's.

        `threads`: cores that a run is shared among, whatever its graph was tuned to; `few_cores`: of graphs that were not.

        `models`: contents to open in place of those files of the folder. They may have more outputs than the graph, which
        `free` holds after a run.

        `host`: the cache of prepacked weights; `verify`: whether they are read and checked first. Without `host`, `pack` says
        whether each session packs a copy of its own.

        `shared`: one arena for all graphs; without it, unloading a graph frees the memory of its intermediate values.
        """
        _register_arena()
        self.folder, self.threads, self.group, self.models = folder, threads, group, models or {}
        self.host = host if host and host.ensure(lambda: _options(pack=True, threads=threads), verify=verify) else None
        self.pack, self.shared, self.few_cores = pack, shared, few_cores
        # Zeroed pages are only backed by memory once they are written.
        self.caches = {name: np.zeros(shape, cache.dtype_of(name)) for name, shape in cache.buffers().items()}
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.outputs: dict[str, dict[str, np.ndarray]] = {}  # by graph: those that are no cache
        self.results: dict[str, Result] = {}  # by graph: of these outputs
        self.buffers: dict[str, dict[str, np.ndarray]] = {}  # by graph: tensors between its steps
        self.bound: dict[tuple[str, int, int], _BoundGraph] = {}
        self.free: dict[str, np.ndarray] = {}  # outputs of segments that are no graph's: see `models`

    def load(self, graph: GraphSpec) -> None:
        """Raises ArtifactError for a graph in steps without a group, or with one of another size."""
        if graph.file in self.buffers:
            return
        if graph.steps:
            # A stage of a pipeline whose ranks are alone has no collectives.
            alone = self.group.size if self.group else 1
            ranks = next((step.ranks for step in graph.plan if isinstance(step, Collective)), alone)
            check_group(graph.name, ranks, self.group)
        if self.host:
            self.host.acquire()
        for step in graph.plan:
            if isinstance(step, Segment):
                packed = self.host.path(step.file) if self.host else None
                with reading(packed or self.folder / step.file, self.folder):
                    self.sessions[step.file] = self._open(graph, step, packed)
        release_freed()  # packing weights took memory
        if self.host:  # without it sessions read the mapped weights themselves
            release_pages(self.host.folder)
        with reading(self.folder / graph.file, self.folder):
            self._allocate(graph)

    def _allocate(self, graph: GraphSpec) -> None:
        """Allocate the outputs of a graph that are no caches, and its buffers."""
        outputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.outputs if cache_name(spec.name, 0) is None}
        self.outputs[graph.file] = outputs
        if outputs:
            self.results[graph.file] = Result(outputs[graph.outputs[0].name].__getitem__, candidates_of(outputs))
        self.buffers[graph.file] = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.buffers or ()}

    def _open(self, graph: GraphSpec, segment: Segment, packed: Path | None) -> ort.InferenceSession:
        # An artifact that was tuned on a larger machine may run here.
        tuned = min(graph.kernels.cores, usable_cores()) if graph.kernels else 0
        cores = self.threads or tuned or self.few_cores
        options = _options(pack=self.pack or packed is not None, threads=cores, shared=self.shared)
        model: bytes | Path = packed or self.folder / segment.file
        ranked = self.group is not None and bool(graph.steps)
        if packed is None and (ranked or segment.file in self.models):
            weights = self.folder / weights_folder(self.group) if self.group and ranked else self.folder
            options.add_session_config_entry(WEIGHTS_FOLDER, str(weights))
            model = self.models.get(segment.file) or (self.folder / segment.file).read_bytes()
        return ort.InferenceSession(model, options, providers=_PROVIDERS, disabled_optimizers=_DISABLED_OPTIMIZERS)

    def unload(self, graph: GraphSpec) -> None:
        for key in [key for key in self.bound if key[0] == graph.file]:
            del self.bound[key]
        for step in graph.plan:
            if isinstance(step, Segment):
                self.sessions.pop(step.file, None)
        self.outputs.pop(graph.file, None)
        self.results.pop(graph.file, None)
        self.buffers.pop(graph.file, None)
        if self.host and not self.sessions:
            self.host.release()
        release_freed()

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        key = (graph.file, slot, image)
        bound = self.bound.get(key)
        if bound is None or not bound.matches(feed):
            bound = self.bound[key] = self._bind(graph, feed, slot, image)
        try:
            bound.run()
        except RUN_ERRORS as error:
            raise RunError(f"{self.folder / graph.file} failed when it ran ({error}); {remedy(self.folder)}") from error
        if graph.file in self.results:
            return self.results[graph.file]
        return Result(self._rows(f"{graph.outputs[0].name}.{image}", slot, 1).__getitem__)

    def _bind(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int, image: int) -> _BoundGraph:
        self.load(graph)
        arrays = {**self.buffers[graph.file], **self.outputs[graph.file]}
        for spec in graph.inputs:
            if spec.name in feed:
                arrays[spec.name] = checked(graph, spec, feed[spec.name])
            elif spec.name in self.caches:
                arrays[spec.name] = self._rows(spec.name, slot, spec.shape[0])
            else:
                raise ValueError(f"{graph.name}: input {spec.name} was not fed; given: {', '.join(feed)}")
        for spec in graph.outputs:
            if name := cache_name(spec.name, image):
                arrays[spec.name] = self._rows(name, slot, spec.shape[0])
        calls: list[Callable[[], object]] = []
        for step in graph.plan:
            if isinstance(step, Segment):
                with reading(self.folder / step.file, self.folder):
                    calls.append(_segment(self.sessions[step.file], step, arrays, self.free))
                continue
            assert self.group is not None, "checked by load"
            calls.append(_collective(self.group, step, arrays))
        return _BoundGraph(feed, arrays, calls)

    def _rows(self, name: str, slot: int, count: int) -> np.ndarray:
        return self.caches[name][slot : slot + count]

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        return self.caches[name][:slots].copy()

    def write_cache(self, name: str, value: np.ndarray) -> None:
        self.caches[name][: len(value)] = value

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        copy_rows(self.caches, source, target, rows, images)

    def copy_page(self, source: int, target: int) -> None:
        raise NotImplementedError("graphs for ONNX Runtime have slots, no pages")

    def give_back(self, slot: int, rows: int) -> None:
        for name, cache in self.caches.items():
            if is_text(name):
                give_back(cache[slot, :, rows:])

    def use_small_pages(self) -> None:
        for cache in self.caches.values():
            use_small_pages(cache)


def open_ort(
    folder: Path,
    cache: CacheSpec,
    *,
    threads: int | None,
    manifest: Manifest | None,
    group: Group | None = None,
    verify: bool = False,
) -> OrtBackend:
    """The backend of an artifact, whose weights are shared by all graphs; without a manifest, of single graphs, each of
    which packs its own."""
    if manifest is None:
        return OrtBackend(folder, cache, threads=threads, pack=True, shared=False, group=group)
    small = sum(weight.nbytes for weight in manifest.weights.values()) < SMALL
    host = None
    if (group.stages * group.size if group else 1) == manifest.ranks:  # else no graph can be loaded
        weights = rank_weights(manifest.weights, manifest.ranks, world_rank(group))
        host = HostCache(folder, manifest.graphs, weights.values(), ranks=manifest.ranks, rank=world_rank(group))
    if host and host.nbytes < WORTH_PACKING:
        host = None
    # Where prepacked weights cannot be shared, float kernels do without; 8-bit kernels need them always.
    pack = small or manifest.quant != "none"
    few = 1 if small else None
    return OrtBackend(folder, cache, threads=threads, few_cores=few, host=host, pack=pack, group=group, verify=verify)

"""ONNX Runtime on CPU. Caches are numpy arrays bound by pointer as input and output of the same run, so they are updated in
place; feeds are bound by pointer once and then only refilled.

Memory: every session maps the artifact's weight files instead of packing a copy of its own, all sessions share one
thread pool and one arena for intermediate values.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..artifact import CacheSpec, GraphSpec

log = logging.getLogger(__name__)
_PROVIDERS = ["CPUExecutionProvider"]


class _Shared:
    """What onnxruntime keeps once per process: the thread pool and the arena."""

    threads: int | None = None

    @classmethod
    def prepare(cls, threads: int | None) -> None:
        wanted = threads or os.cpu_count() or 1
        if cls.threads is None:
            ort.set_global_thread_pool_sizes(wanted, 1)
            memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            ort.create_and_register_allocator(memory, None)
            cls.threads = wanted
        elif threads is not None and threads != cls.threads:
            raise ValueError(f"threads={threads} was asked for, but this process already runs with {cls.threads}; use one number")


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


class _Bound:
    """One session with everything bound for one slot: running it takes no further argument."""

    def __init__(self, session: ort.InferenceSession, graph: GraphSpec, feed: Mapping[str, np.ndarray], output: np.ndarray) -> None:
        self.feed = feed
        self.arrays = dict(feed)
        self.binding = session.io_binding()
        for spec in graph.inputs:
            if spec.name in feed:
                array = feed[spec.name]
                if array.shape != spec.shape or array.dtype.name != spec.dtype or not array.flags.c_contiguous:
                    raise ValueError(
                        f"{graph.name}: {spec.name} is {array.dtype.name} {array.shape}; expected contiguous {spec.dtype} {spec.shape}"
                    )
                self.binding.bind_input(spec.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        first = graph.outputs[0]
        self.binding.bind_output(first.name, "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)

    def bind_cache(self, name: str, rows: np.ndarray) -> None:
        where = ("cpu", 0, rows.dtype.type, rows.shape, rows.ctypes.data)
        self.binding.bind_input(name, *where)
        self.binding.bind_output(f"{name}.out", *where)

    def holds(self, feed: Mapping[str, np.ndarray]) -> bool:
        """Whether the very arrays that are bound are passed again."""
        return self.feed is feed or all(self.arrays.get(name) is array for name, array in feed.items())


class OrtBackend:
    """See backends.base.Backend."""

    def __init__(self, folder: Path, cache: CacheSpec, *, threads: int | None = None) -> None:
        _Shared.prepare(threads)
        self.folder = folder
        shape = (cache.slots, cache.kv_heads, cache.rows, cache.head_dim)
        # Zeroed pages are only backed by memory once they are written.
        self.caches = {f"{which}_cache.{i}": np.zeros(shape, cache.dtype) for i in range(cache.layers) for which in "kv"}
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.outputs: dict[str, np.ndarray] = {}
        self.bound: dict[tuple[str, int], _Bound] = {}

    def load(self, graph: GraphSpec) -> None:
        if graph.file not in self.sessions:
            self.sessions[graph.file] = ort.InferenceSession(self.folder / graph.file, _options(), providers=_PROVIDERS)
            first = graph.outputs[0]
            self.outputs[graph.file] = np.zeros(first.shape, first.dtype)

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0) -> np.ndarray:
        bound = self.bound.get((graph.file, slot))
        if bound is None or not bound.holds(feed):
            bound = self.bound[graph.file, slot] = self._bind(graph, feed, slot)
        self.sessions[graph.file].run_with_iobinding(bound.binding)
        return self.outputs[graph.file]

    def _bind(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int) -> _Bound:
        self.load(graph)
        bound = _Bound(self.sessions[graph.file], graph, feed, self.outputs[graph.file])
        for spec in graph.inputs:
            if spec.name in self.caches:
                bound.bind_cache(spec.name, self.caches[spec.name][slot : slot + spec.shape[0]])
            elif spec.name not in feed:
                raise ValueError(f"{graph.name}: input {spec.name} was not fed; given: {', '.join(feed)}")
        return bound

    def read_cache(self, name: str) -> np.ndarray:
        return self.caches[name].copy()

    def write_cache(self, name: str, value: np.ndarray) -> None:
        self.caches[name][...] = value

"""The eager backend: torch runs the definitions of the graphs, the numerical reference, with the interface of a device.

Everything is computed in float32, whatever dtype the weights are stored in. They are mapped from the artifact's files, and
linear layers upcast or dequantise theirs piece by piece, so that a model in 8 or 16 bits is checked in little more memory than
it takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..model_defs.layers import Linear
from ..runtime.artifact import CacheSpec, GraphKey, GraphSpec, WeightSpec
from ..runtime.backends.base import Result, cache_name, copy_rows, copy_text_page, in_pages
from ..runtime.sampling.candidates import candidates_of
from .graphs import GraphDef
from .weight_views import map_parameter


@contextlib.contextmanager
def computing_with(count: int | None) -> Iterator[None]:
    """Compute with `count` threads (None: as torch is set), and set torch back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class EagerBackend:
    """See runtime.backends.base.Backend."""

    def __init__(
        self,
        folder: Path,
        weights: Mapping[str, WeightSpec],
        cache: CacheSpec,
        define: Callable[[GraphKey], GraphDef],
        *,
        threads: int | None = None,
        text_threads: int | None = None,
    ) -> None:
        """`threads` to compute with, and where it differs, those of text graphs (None: as torch is set)."""
        self.threads, self.text_threads = threads, text_threads or threads
        self.folder, self.weights, self.define, self.cache = folder, weights, define, cache
        # Like numpy's zeros, memory is only taken once it is written.
        self.caches = {name: torch.from_numpy(np.zeros(shape, np.float32)) for name, shape in cache.buffers().items()}
        self.modules: dict[str, nn.Module] = {}

    def load(self, graph: GraphSpec) -> None:
        if graph.name not in self.modules:
            definition = self.define(graph.graph_key)
            narrow = {f"{name}.weight" for name, module in definition.module.named_modules() if isinstance(module, Linear)}
            state = {
                name: self._weight(definition, name, parameter, keep=name in narrow)
                for name, parameter in definition.module.named_parameters()
                if name not in definition.constants
            }
            state |= {name: torch.from_numpy(value) for name, value in definition.constants.items()}
            definition.module.load_state_dict(state, strict=True, assign=True)
            self.modules[graph.name] = definition.module

    def unload(self, graph: GraphSpec) -> None:
        self.modules.pop(graph.name, None)

    def _weight(self, definition: GraphDef, name: str, parameter: Tensor, *, keep: bool) -> Tensor:
        """A weight, upcast unless its layer does so by itself."""
        weight = map_parameter(self.folder, self.weights, name, parameter.shape, definition.heads.get(name, 0))
        return weight if keep or not weight.is_floating_point() else weight.float()

    @torch.inference_mode()
    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        self.load(graph)
        inputs = [
            torch.from_numpy(feed[spec.name]) if spec.name in feed else self._rows(spec.name, slot, spec.shape[0])
            for spec in graph.inputs
        ]
        with computing_with(self.threads if graph.kind == "vision" else self.text_threads):
            result = self.modules[graph.name](*inputs)
        results = result if isinstance(result, tuple) else (result,)
        others: dict[str, np.ndarray] = {}
        for spec, value in zip(graph.outputs, results, strict=True):
            if name := cache_name(spec.name, image):
                self._rows(name, slot, spec.shape[0]).copy_(value)
            else:
                others[spec.name] = value.numpy()
        return Result(results[0].numpy().__getitem__, candidates_of(others))

    def _rows(self, name: str, slot: int, rows: int) -> Tensor:
        return self.caches[name] if in_pages(self.cache, name) else self.caches[name][slot : slot + rows]

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        return self.caches[name][:slots].numpy().copy()

    def write_cache(self, name: str, value: np.ndarray) -> None:
        self.caches[name][: len(value)].copy_(torch.from_numpy(value))

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        copy_rows(self.caches, source, target, rows, images)

    def copy_page(self, source: int, target: int) -> None:
        copy_text_page(self.cache, self.caches, source, target)

    def give_back(self, slot: int, rows: int) -> None:
        """The cache is reserved as a whole."""

    def use_small_pages(self) -> None:
        """The cache is reserved as a whole."""

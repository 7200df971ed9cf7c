"""Values inside a simulated Ascend graph. torchair numbers operators in its own way, so values are matched by contents."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node as TracedNode

from ...runtime.artifact import CacheSpec, GraphSpec
from ...runtime.backends.ascend import torchair_host
from ...runtime.backends.ascend.backend import AscendBackend, Device
from ...runtime.backends.base import Feed, Group
from ...runtime.backends.ge_simulator.ge_graph import Node
from ...runtime.backends.ge_simulator.simulator import Simulator
from .operator_errors import ValueFinder
from .static_side import StaticSide

ALIKE = 2e-5  # relative to the largest magnitude: covers float32 sums in another order, never another operator


class GeGraph:
    """One rank's graph on a simulator that records, and the values of its last run."""

    def __init__(self, side: StaticSide, graph: GraphSpec, cache: CacheSpec, rank: int, group: Group | None) -> None:
        """`graph` and `cache` are the rank's own, not those of all together."""
        self.graph, self.values = graph, []
        host = torchair_host.load()
        simulator = functools.partial(Simulator, wide=True, group=group, on_outputs=self._keep)
        device = Device("cpu", lambda _group: host.running_on(simulator), wide=True)
        artifact = side.artifact
        self.backend = AscendBackend(
            artifact.folder, cache, side.rank_weights[rank], artifact.manifest.files, device, group=group
        )

    def run(self, feed: Feed, caches: Mapping[str, np.ndarray], image: int) -> np.ndarray:
        """Runs in float32; the first output."""
        for name, value in caches.items():
            self.backend.write_cache(name, value)
        self.values.clear()
        return self.backend.run(self.graph, feed, 0, image).first

    def _keep(self, _node: Node, outputs: Sequence[Tensor]) -> None:
        self.values += [output.clone() for output in outputs]  # operators that write in place come later

    @property
    def find(self) -> ValueFinder:
        """Finds values of the last run by their contents."""
        return Contents(self.values).find


class Contents:
    """Values by their contents, whatever their layout."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        self.by_size: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # as it lies, and sorted
        for value in values:
            flat = value.detach().float().numpy().ravel()
            self.by_size.setdefault(flat.size, []).append((flat, np.sort(flat)))

    def find(self, node: TracedNode, expected: Tensor) -> Tensor | None:
        """The value that holds the same numbers in the same order, or else in another."""
        flat = expected.detach().float().numpy().ravel()
        scale = max(float(np.abs(flat).max(initial=0.0)), 1e-30)
        ordered = np.sort(flat)
        for exact, by_size in self.by_size.get(flat.size, ()):
            if np.abs(by_size - ordered).max(initial=0.0) > ALIKE * scale:
                continue
            if np.abs(exact - flat).max(initial=0.0) <= ALIKE * scale:
                return torch.from_numpy(exact.reshape(expected.shape)).to(expected.dtype)
            return expected
        return None

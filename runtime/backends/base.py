"""The interface between the engine and a device: graphs of the artifact run over caches that the backend allocates once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..artifact import ArtifactError, CacheSpec, GraphSpec, TensorSpec, is_cached, rank_folder
from ..sampling.candidates import Candidates

Feed = dict[str, np.ndarray]


def new_feed(graph: GraphSpec) -> Feed:
    """Zeroed arrays for every input of a graph but its caches."""
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.inputs if not is_cached(spec.name)}


@dataclass(frozen=True, slots=True)
class Result:
    """The outputs of one run of a graph. They belong to the backend and hold until the next run of the same graph.

    `fetch` gives the rows of the first output that a slice names, in host memory. `on_host`: whether they are there already, so
    that `fetch` copies nothing from a device.
    """

    fetch: Callable[[slice], np.ndarray]
    candidates: Candidates | None = None
    on_host: bool = True

    @property
    def first(self) -> np.ndarray:
        """The first output, whole."""
        return self.fetch(slice(None))

    def row(self, row: int) -> np.ndarray:
        """One row of the first output."""
        return self.fetch(slice(row, row + 1))[0]


class Backend(Protocol):
    """A device that runs graphs. It owns the cache: the buffers that CacheSpec.buffers names."""

    def load(self, graph: GraphSpec) -> None:
        """Make a graph ready to run."""
        ...

    def unload(self, graph: GraphSpec) -> None:
        """Free what `load` or `run` allocated for a graph."""
        ...

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        """Run one graph; returns its first output, and top-k candidates where it has them. Cache outputs go into the cache.

        `feed` holds every input but the caches, in the shapes and dtypes of `graph.inputs`. Arrays are bound by pointer once
        for a caller that passes the same mapping and arrays again. Cache rows of slots slot .. slot + B - 1, or the pages
        that the feed names, are read and written in place; `image` says which image's entries a vision graph with cross keys
        writes.
        """
        ...

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        """A copy of the first slots of one cache buffer, [slots, K, S, D], or of so many pages, [slots, P, K, D]."""
        ...

    def write_cache(self, name: str, value: np.ndarray) -> None:
        """Overwrite the first slots of one cache buffer with a value [slots, K, S, D], or its first pages."""
        ...

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        """Copy the first `rows` rows of one slot to another, and the keys of its first `images` images."""
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of the text's keys and values in all layers; of a cache in pages only."""
        ...

    def give_back(self, slot: int, rows: int) -> None:
        """Give back what memory can be of a slot's keys and values of text after the first `rows` rows, whose contents are
        lost. Without effect where a cache is reserved as a whole."""
        ...

    def use_small_pages(self) -> None:
        """Let the cache get its memory page by page; called before anything is in it."""
        ...


class Group(Protocol):
    """Collectives of one rank with the others. All ranks make the same calls in the same order with arrays of one shape and
    dtype."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, array: np.ndarray) -> None:
        """Replace `array` by the sum of all ranks' arrays, the same bits on every rank."""
        ...

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        """Write array [..., C] of all ranks, joined along the last axis with rank 0 first, into out [..., size * C]."""
        ...

    # Pipelines: the number of this stage and of all stages, and transfers to the rank in the same place of another stage.

    @property
    def stage(self) -> int: ...

    @property
    def stages(self) -> int: ...

    def send(self, array: np.ndarray, stage: int) -> None:
        """Send an array to this rank's counterpart in another stage."""
        ...

    def receive(self, array: np.ndarray, stage: int) -> None:
        """Fill an array with what this rank's counterpart in another stage sends."""
        ...


def world_rank(group: Group | None) -> int:
    """The number of a rank among all that run the model; 0 without a group."""
    return group.stage * group.size + group.rank if group else 0


def weights_folder(group: Group) -> str:
    """The folder of this rank's weights within the artifact."""
    return rank_folder(group.stages * group.size, world_rank(group))


def checked(graph: GraphSpec, spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """The array fed for an input, if it can be bound as it is; raises ValueError otherwise."""
    if array.shape != spec.shape or array.dtype.name != spec.dtype or not array.flags.c_contiguous:
        actual = f"{array.dtype.name} {array.shape}"
        raise ValueError(f"{graph.name}: {spec.name} is {actual}; expected contiguous {spec.dtype} {spec.shape}")
    return array


def check_group(what: str, ranks: int, group: Group | None) -> Group | None:
    """The group, if it has the `ranks` that a graph was sharded for; raises ArtifactError otherwise."""
    size = group.size if group else 1
    if size != ranks:
        raise ArtifactError(f"{what} is for one of {ranks} ranks, but its group has {size}; open all {ranks} ranks together")
    return group


def cache_name(output: str, image: int) -> str | None:
    """The name of the cache buffer that a graph output is written to; None for other outputs."""
    if output.startswith(("cross_k.", "cross_v.")):
        return f"{output}.{image}"
    return output.removesuffix(".out") if output.endswith(".out") else None


def is_text(name: str) -> bool:
    """Whether a cache buffer has rows for the tokens of the text; others have the keys of images."""
    return not name.startswith("cross_")


def in_pages(cache: CacheSpec, name: str) -> bool:
    """Whether a cache buffer is in pages, which belong to no slot."""
    return bool(cache.pages) and is_text(name)


def copy_rows(buffers: Mapping[str, Any], source: int, target: int, rows: int, images: int) -> None:
    """Backend.copy_slot over cache buffers, arrays of numpy or torch."""
    for name, buffer in buffers.items():
        count = _rows_to_copy(name, rows, images)
        buffer[target, :, :count] = buffer[source, :, :count]


def copy_text_page(cache: CacheSpec, buffers: Mapping[str, Any], source: int, target: int) -> None:
    """Backend.copy_page over cache buffers."""
    for name, buffer in buffers.items():
        if in_pages(cache, name):
            buffer[target] = buffer[source]


def _rows_to_copy(name: str, rows: int, images: int) -> int | None:
    """The number of rows of a cache buffer that are copied from slot to slot; None: all."""
    if not name.startswith("cross_"):
        return rows
    return None if int(name.rsplit(".", 1)[1]) < images else 0

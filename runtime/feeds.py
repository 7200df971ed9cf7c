"""A step -> the named, padded arrays that its graph takes. Arrays are allocated once per graph and refilled, so that a
backend binds them once.

B rows, T tokens, D head dim, C hidden size.
"""

from __future__ import annotations

import numpy as np

from .artifact import GraphSpec, Manifest
from .cache import SlotCache
from .scheduler import Step

Feed = dict[str, np.ndarray]


def rope_tables(theta: float, head_dim: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position times frequency, float32 [rows, D], both halves equal.

    Frequency i is theta^(-2i/D) (Su et al. 2021), in float32 like the reference implementations. The power alone is taken in
    float64 and rounded: numpy's float32 power is off in the last bit, which at position 4096 is an angle off by 1e-4.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1.0) / np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    angles = np.arange(rows, dtype=np.float32)[:, None] * inverse
    angles = np.concatenate((angles, angles), axis=1)
    return np.cos(angles), np.sin(angles)


class Feeds:
    """Fills the arrays of a step."""

    def __init__(self, manifest: Manifest) -> None:
        cache = manifest.cache
        self.cos, self.sin = rope_tables(manifest.model.rope_theta, cache.head_dim, cache.rows)
        self.graphs = {(graph.kind, graph.bucket): graph for graph in manifest.graphs}
        self.buffers: dict[tuple[str, int], Feed] = {}
        self.fill = {"vision": self._vision, "prefill": self._prefill, "decode": self._decode}

    def __call__(self, step: Step, cache: SlotCache) -> Feed:
        key = (step.kind, step.bucket)
        if key not in self.buffers:
            self.buffers[key] = new_feed(self.graphs[key])
        feed = self.buffers[key]
        self.fill[step.kind](feed, step, cache)
        return feed

    def _vision(self, feed: Feed, step: Step, cache: SlotCache) -> None:
        sequence = step.sequences[0]
        start = sequence.tiles_done
        feed["pixels"][: step.count] = sequence.prompt.pixels[start : start + step.count]
        feed["pixels"][step.count :] = 0

    def _prefill(self, feed: Feed, step: Step, cache: SlotCache) -> None:
        sequence, count = step.sequences[0], step.count
        start, end = sequence.computed, sequence.computed + count
        feed["token_ids"][0, :count] = sequence.prompt.token_ids[start:end]
        feed["token_ids"][0, count:] = 0
        rows = sequence.prompt.rows[start:end]
        here = np.flatnonzero(rows >= 0)
        feed["row_index"][...] = -1
        feed["row_index"][0, here] = np.arange(len(here), dtype=np.int32)
        feed["image_rows"][: len(here)] = sequence.features[rows[here]]
        feed["lengths"][0] = start
        feed["last_index"][0] = count - 1
        feed["rope_cos"][0] = self.cos[start : start + step.bucket]
        feed["rope_sin"][0] = self.sin[start : start + step.bucket]

    def _decode(self, feed: Feed, step: Step, cache: SlotCache) -> None:
        lengths = cache.lengths[: step.bucket]
        # A slot that does not take part writes one row past its valid tokens, where nothing is read before it is overwritten.
        feed["token_ids"][...] = 0
        for sequence in step.sequences:
            feed["token_ids"][sequence.slot, 0] = sequence.generated[-1]
        feed["lengths"][...] = lengths
        feed["rope_cos"][:, 0] = self.cos[lengths]
        feed["rope_sin"][:, 0] = self.sin[lengths]


def new_feed(graph: GraphSpec) -> Feed:
    """Zeroed arrays for every input of a graph but its caches."""
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.inputs if "_cache." not in spec.name}

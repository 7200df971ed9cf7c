"""Gain of joining operators that are emitted apart, or of splitting an attention, each against the way in use.

    python -m benchmarks.studies.joined_operators [--runs 30] [--threads 2] [--only TEXT ...]

Graphs hold as many copies as a 1.1B decoder has layers, or four copies of a chunk's attention. Each copy has its own weights or
caches, so they come from memory and not from the processor's cache. Both ways take turns. Figures are medians of a copy's
microseconds, and of the ratio of two runs that followed each other (below 1: the other way is faster). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper
from tqdm import tqdm

from staticvl.runtime.backends.cores import usable_cores

from ..onnx_session import CONTRIB, bound, opened

COPIES = 22
HIDDEN, MLP, HEADS, KV_HEADS, WIDTH, CAPACITY = 2048, 5632, 32, 4, 64, 1024
KV = KV_HEADS * WIDTH
ROWS = (1, 8, 256)
PAST = (16, 64, 600)
BLOCK = 128


@dataclass
class Graph:
    """Collects the nodes of one way, and the arrays that it runs on."""

    copies: int = COPIES
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list = field(default_factory=list)
    constants: dict = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)  # output: the array that it is written to

    def node(
        self, op: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", names: Sequence[str] = (), **attributes: Any
    ) -> list[str]:
        results = [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        results[len(results) - len(names) :] = names
        self.nodes.append(helper.make_node(op, list(inputs), results, domain=domain, **attributes))
        return results

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        array = np.asarray(value, dtype)
        name = f"constant_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def array(self, name: str, value: np.ndarray) -> str:
        self.arrays[name] = value
        self.inputs.append(name)
        return name

    def normal(self, name: str, *shape: int) -> str:
        return self.array(name, self.random.standard_normal(shape, np.float32))

    def keep(self, value: str, shape: Sequence[int]) -> None:
        """Make `value` an output."""
        self.arrays[f"{value}.kept"] = np.zeros(shape, np.float32)
        self.written[value] = f"{value}.kept"

    def session(self, threads: int) -> Callable[[], object]:
        def info(name: str, array: np.ndarray):
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

        inputs = [info(name, self.arrays[name]) for name in self.inputs]
        outputs = [info(name, self.arrays[array]) for name, array in self.written.items()]
        opening = partial(opened, self.nodes, inputs, outputs, self.constants.values())
        session = opening(threads=threads, spin_us=20, optimised=False)
        written = {name: self.arrays[array] for name, array in self.written.items()}
        return bound(session, {name: self.arrays[name] for name in self.inputs}, written)


@dataclass(frozen=True)
class Storage:
    """How a weight of N rows is stored; `draw` gives numbers and scales, whose axes of N are `axes`."""

    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    axes: tuple[int, int]
    bits: int = 0  # of blocks; 0: whole rows in int8, times activations in uint8

    def product(self, g: Graph, x: str, q: np.ndarray, scales: np.ndarray) -> str:
        stored = [g.constant(each, each.dtype) for each in (q, scales)]
        if self.bits:
            attributes: dict[str, Any] = {"K": HIDDEN, "N": len(q), "bits": self.bits, "block_size": BLOCK, "accuracy_level": 4}
            return g.node("MatMulNBits", [x, *stored], domain=CONTRIB, **attributes)[0]
        inputs = [x, stored[0], g.constant(1, np.float32), stored[1], g.constant(128, np.uint8)]
        return g.node("MatMulIntegerToFloat", inputs, domain=CONTRIB)[0]


def grouped(bits: int) -> Storage:
    def draw(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = HIDDEN // BLOCK
        q = random.integers(0, 256, (n, blocks, BLOCK * bits // 8), np.uint8)
        return q, random.random((n, blocks), np.float32) / np.float32(1e4)

    return Storage(draw, (0, 0), bits)


def _whole(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    return random.integers(-127, 128, (HIDDEN, n), np.int8), random.random(n, np.float32) / np.float32(1e4)


STORAGES = {"4 bits": grouped(4), "8 bits": grouped(8), "w8a8": Storage(_whole, (1, 0))}


def products(storage: Storage, sizes: Sequence[int], rows: int, joined: bool) -> Graph:
    """Several of the same rows; those of w8a8 were quantised before, as they are once for all of them."""
    g = Graph()
    shape = (1, rows, HIDDEN)
    x = g.normal("x", *shape) if storage.bits else g.array("x", g.random.integers(0, 256, shape, np.uint8))
    for _ in range(COPIES):
        weights = [storage.draw(g.random, size) for size in sizes]
        if joined:
            one = [np.concatenate(parts, axis) for parts, axis in zip(zip(*weights, strict=True), storage.axes, strict=True)]
            outputs = g.node("Split", [storage.product(g, x, *one), g.constant(sizes)], len(sizes), axis=-1)
        else:
            outputs = [storage.product(g, x, *each) for each in weights]
        for value, size in zip(outputs, sizes, strict=True):
            g.keep(value, (1, rows, size))
    return g


def norms(rows: int, fused: bool) -> Graph:
    """What is added to a residual, and the norm after it."""
    g = Graph()
    x, weight = g.normal("x", 1, rows, HIDDEN), g.normal("weight", HIDDEN)
    added = g.normal("added", 1, rows, HIDDEN)
    for _ in range(COPIES):
        if fused:
            added, _, _, x = g.node("SkipSimplifiedLayerNormalization", [x, added, weight], 4, CONTRIB, epsilon=1e-5)
        else:
            (x,) = g.node("Add", [x, added])
            (added,) = g.node("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=1e-5)
    for value in (x, added):
        g.keep(value, (1, rows, HIDDEN))
    return g


def attentions(past: int, heads_as_tokens: bool) -> Graph:
    """One row."""
    g = Graph()
    q, k, v = g.normal("q", 1, 1, HEADS * WIDTH), g.normal("k", 1, 1, KV), g.normal("v", 1, 1, KV)
    lengths = [g.array("last", np.array([past], np.int32)), g.array("total", np.array(past + 1, np.int32))]
    way = HeadsAsTokens(g, g.array("at", np.array([past], np.int64))) if heads_as_tokens else all_heads
    for i in range(COPIES):
        q = way(g, [q, k, v], [g.normal(f"{which}.{i}", 1, KV_HEADS, CAPACITY, WIDTH) for which in "kv"], lengths)
    g.keep(q, (1, 1, HEADS * WIDTH))
    return g


def in_place(g: Graph, caches: Sequence[str], suffix: str) -> list[str]:
    """Names of outputs that are written to the memory of caches."""
    names = [f"{cache}{suffix}" for cache in caches]
    g.written |= dict(zip(names, caches, strict=True))
    return names


def all_heads(g: Graph, rows: Sequence[str], caches: Sequence[str], lengths: Sequence[str]) -> str:
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    outs = in_place(g, caches, ".out")
    return g.node("GroupQueryAttention", [*rows, *caches, *lengths], 3, CONTRIB, outs, **attributes)[0]


class HeadsAsTokens:
    """Puts keys and values into the caches first, `at` that place, and then lets the heads that share a key-value head look at
    them as tokens of one head; the operator refuses it where there are fewer keys than such tokens."""

    GROUP = HEADS // KV_HEADS

    def __init__(self, g: Graph, at: str) -> None:
        self.at, self.empty = at, g.constant(np.zeros((1, 0, KV)), np.float32)

    def __call__(self, g: Graph, rows: Sequence[str], caches: Sequence[str], lengths: Sequence[str]) -> str:
        q, *new = rows
        outs = in_place(g, caches, ".out")
        for row, cache, out in zip(new, caches, outs, strict=True):
            g.node("TensorScatter", [cache, self._as(g, row, KV_HEADS, 1, WIDTH), self.at], names=[out], axis=2)
        tokens = self._swapped(g, q, (KV_HEADS, self.GROUP, WIDTH), (self.GROUP, KV))
        attributes: dict[str, Any] = {"num_heads": KV_HEADS, "kv_num_heads": KV_HEADS, "causal": 0}
        inputs = [tokens, self.empty, self.empty, *outs, *lengths]
        y, *_ = g.node("GroupQueryAttention", inputs, 3, CONTRIB, in_place(g, caches, ".seen"), **attributes)
        return self._swapped(g, y, (self.GROUP, KV_HEADS, WIDTH), (1, HEADS * WIDTH))

    def _as(self, g: Graph, x: str, *shape: int) -> str:
        return g.node("Reshape", [x, g.constant((1, *shape))])[0]

    def _swapped(self, g: Graph, x: str, three: Sequence[int], shape: Sequence[int]) -> str:
        """Swap two axes of a row in `three` parts."""
        return self._as(g, g.node("Transpose", [self._as(g, x, *three)], perm=[0, 2, 1, 3])[0], *shape)


@dataclass(frozen=True)
class Chunk:
    """Heads, those of keys and values, how wide they are, and the tokens of a chunk."""

    heads: int
    kv_heads: int
    width: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.heads} heads over {self.kv_heads} of {self.width}"


CHUNKS = (Chunk(HEADS, KV_HEADS, WIDTH, 256), Chunk(32, 32, 128, 256), Chunk(32, 8, 128, 256), Chunk(32, 32, 128, 1024))
PIECE = 128  # tokens


def chunks(chunk: Chunk, past: int, in_pieces: bool) -> Graph:
    """Attention of a chunk, all of it at once or some of its tokens at a time."""
    g = Graph(copies=4)
    size = PIECE if in_pieces else chunk.tokens
    edges = range(0, chunk.tokens, size)
    kv = chunk.kv_heads * chunk.width
    rows = [g.normal("q", 1, chunk.tokens, chunk.heads * chunk.width), *(g.normal(x, 1, chunk.tokens, kv) for x in "kv")]
    sizes = g.constant([size] * len(edges))
    pieces = [g.node("Split", [x, sizes], len(edges), axis=1) if in_pieces else [x] for x in rows]
    last = [g.array(f"last.{edge}", np.array([past + edge + size - 1], np.int32)) for edge in edges]
    total = [g.array(f"total.{edge}", np.array(past + edge + size, np.int32)) for edge in edges]
    for i in range(g.copies):
        caches = [g.normal(f"{x}.{i}", 1, chunk.kv_heads, past + chunk.tokens, chunk.width) for x in "kv"]
        names, out = caches, []
        for j, each in enumerate(zip(*pieces, strict=True)):
            inputs = [*each, *names, last[j], total[j]]
            names = in_place(g, caches, f".out{j}")
            attributes: dict[str, Any] = {"num_heads": chunk.heads, "kv_num_heads": chunk.kv_heads}
            out += g.node("GroupQueryAttention", inputs, 3, CONTRIB, names, **attributes)[:1]
        if in_pieces:
            out = g.node("Concat", out, axis=1)
        g.keep(out[0], (1, chunk.tokens, chunk.heads * chunk.width))
    return g


def comparisons() -> dict[str, Callable[[bool], Graph]]:
    """By what is compared and what the other way is: both ways."""
    makers: dict[str, Callable[[bool], Graph]] = {}
    for rows in ROWS:
        for name, sizes in {"q, k, v": (HIDDEN, KV, KV), "gate, up": (MLP, MLP)}.items():
            for name_of_storage, storage in STORAGES.items():
                makers[f"one product: {name} in {name_of_storage}, rows: {rows}"] = partial(products, storage, sizes, rows)
        makers[f"SkipSimplifiedLayerNormalization, rows: {rows}"] = partial(norms, rows)
    for past in PAST:
        makers[f"heads as tokens: attention of one row after {past}"] = partial(attentions, past)
    for chunk in CHUNKS:
        for past in (0, 512, 2048):
            makers[f"{PIECE} tokens at a time: {chunk}, after {past}"] = partial(chunks, chunk, past)
    return makers


def compare(make: Callable[[bool], Graph], runs: int, threads: int) -> dict[str, float]:
    """Times of both ways, and the largest distance of the last output as a part of its largest number."""
    ways = [make(other) for other in (False, True)]
    sessions = [way.session(threads) for way in ways]
    times: list[list[float]] = []
    for _ in range(runs + 1):
        times.append([])
        for run in sessions:
            start = time.perf_counter()
            run()
            times[-1].append(1e6 * (time.perf_counter() - start) / ways[0].copies)
    del times[0]  # binds and allocates
    us, other = (statistics.median(turn[i] for turn in times) for i in (0, 1))
    a, b = (way.arrays[[*way.written.values()][-1]] for way in ways)
    return {
        "us": round(us, 1),
        "other_us": round(other, 1),
        "ratio": round(statistics.median(turn[1] / turn[0] for turn in times), 3),
        "distance": float(f"{np.abs(a - b).max() / np.abs(a).max():.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="turns of each way; default: 30")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of the CPU; default: every usable core")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="parts of the names of comparisons; default: all"
    )
    args = parser.parse_args()
    makers = {name: make for name, make in comparisons().items() if any(part in name for part in args.only)}
    results = {}
    for name, make in tqdm(makers.items(), disable=None):
        results[name] = compare(make, args.runs, args.threads)
        tqdm.write("{}: {other_us} us instead of {us}, ratio {ratio}".format(name, **results[name]))
    print(json.dumps(results))


if __name__ == "__main__":
    main()

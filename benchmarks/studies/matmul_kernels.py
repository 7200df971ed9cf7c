"""Speed of onnxruntime's matrix products, by how weights are stored.

    python -m benchmarks.studies.matmul_kernels [--k 2048] [--n 5632] [--rows 1,8,64,512] [--runs 15] [--only NAME,...]

Each graph holds several products, so weights come from memory and not from the cache. Each product quantises its own input.
Kernels take turns. Figures are medians: Gop/s (2 M N K a product), and in brackets GB/s of weights. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ..onnx_session import CONTRIB, opened

WEIGHT_BYTES = 90e6  # of all products of a graph together, more than a cache holds


class Graph:
    """Collects nodes and weights of one benchmark graph."""

    def __init__(self, k: int, n: int, m: int) -> None:
        self.k, self.n, self.m = k, n, m
        self.random = np.random.default_rng(0)
        self.nodes: list = []
        self.weights: list = []
        self.nbytes = 0

    def node(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes) -> str:
        names = [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names[0]

    def weight(self, array: np.ndarray) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        self.nbytes += array.nbytes
        return name

    def whole(self, dtype: type, *shape: int) -> str:
        low, high = (-127, 128) if dtype == np.int8 else (1, 256)
        return self.weight(self.random.integers(low, high, shape, dtype))

    def scales(self, *shape: int) -> str:
        return self.weight(self.random.random(shape, np.float32) / 1e4)


def fp32(g: Graph, x: str) -> str:
    weight = g.weight(g.random.standard_normal((g.n, g.k), np.float32))
    return g.node("FusedMatMul", x, weight, domain=CONTRIB, transB=1)


def nbits(bits: int, block: int, level: int = 4) -> Callable[[Graph, str], str]:
    def make(g: Graph, x: str) -> str:
        q = g.whole(np.uint8, g.n, g.k // block, block * bits // 8)
        attributes = {"K": g.k, "N": g.n, "bits": bits, "block_size": block, "accuracy_level": level}
        return g.node("MatMulNBits", x, q, g.scales(g.n, g.k // block), domain=CONTRIB, **attributes)

    return make


def row_scale(g: Graph, x: str) -> str:
    largest = g.node("ReduceMax", g.node("Abs", x), g.weight(np.array([-1])), keepdims=1)
    return g.node("Mul", largest, g.weight(np.array(1 / 127, np.float32)))


def rounded(g: Graph, x: str, scale: str) -> str:
    """int8 by Div, Round and Cast."""
    return g.node("Cast", g.node("Round", g.node("Div", x, scale)), to=TensorProto.INT8)


def quantised(zero: np.ndarray) -> Callable[[Graph, str, str], str]:
    """One QuantizeLinear with a scale for each row."""

    def make(g: Graph, x: str, scale: str) -> str:
        flat = g.node("Reshape", scale, g.weight(np.array([g.m])))
        return g.node("QuantizeLinear", x, flat, g.weight(zero.repeat(g.m)), axis=0)

    return make


def unsigned(g: Graph, x: str, scale: str) -> str:
    """uint8 around 128."""
    shifted = g.node("Add", g.node("Round", g.node("Div", x, scale)), g.weight(np.array(128, np.float32)))
    return g.node("Cast", shifted, to=TensorProto.UINT8)


def w8a8(quantise: Callable[[Graph, str, str], str], zero: list[np.ndarray], weight: type, *, fused: bool):
    """`fused`: MatMulIntegerToFloat multiplies with the scales of the columns itself."""

    def make(g: Graph, x: str) -> str:
        scale = row_scale(g, x)
        q, w, columns = quantise(g, x, scale), g.whole(weight, g.k, g.n), g.scales(g.n)
        zeros = [g.weight(each) for each in zero] if zero else []
        if weight == np.uint8:
            zeros = [*(zeros or [g.weight(np.array(0, np.int8))]), g.weight(np.array(128, np.uint8))]
        if fused:
            y = g.node("MatMulIntegerToFloat", q, w, g.weight(np.array(1, np.float32)), columns, *zeros, domain=CONTRIB)
        else:
            y = g.node("Mul", g.node("Cast", g.node("MatMulInteger", q, w, *zeros), to=TensorProto.FLOAT), columns)
        return g.node("Mul", y, scale)

    return make


def dynamic(g: Graph, x: str) -> str:
    return g.node("DynamicQuantizeMatMul", x, g.whole(np.int8, g.k, g.n), g.scales(g.n), domain=CONTRIB)


U8 = [np.array(128, np.uint8)]
KERNELS: dict[str, Callable[[Graph, str], str]] = {
    "fp32 FusedMatMul": fp32,
    "8 bit, block 128": nbits(8, 128),
    "4 bit, block 32": nbits(4, 32),
    "4 bit, block 128": nbits(4, 128),
    "DynamicQuantizeMatMul (a scale for all rows)": dynamic,
    "W8A8, Div Round Cast, MatMulInteger": w8a8(rounded, [], np.int8, fused=False),
    "W8A8, Div Round Cast, MatMulIntegerToFloat": w8a8(rounded, [], np.int8, fused=True),
    "W8A8, QuantizeLinear by row, MatMulIntegerToFloat": w8a8(quantised(np.array([0], np.int8)), [], np.int8, fused=True),
    "W8A8, uint8 activations by Add Cast": w8a8(unsigned, U8, np.int8, fused=True),
    "W8A8, uint8 activations by QuantizeLinear": w8a8(quantised(np.array([128], np.uint8)), U8, np.int8, fused=True),
    "W8A8, uint8 both": w8a8(quantised(np.array([128], np.uint8)), U8, np.uint8, fused=True),
}


def build(make: Callable[[Graph, str], str], k: int, n: int, m: int) -> tuple[ort.InferenceSession, int, int]:
    """A session, its products, and the bytes of their weights."""
    g = Graph(k, n, m)
    outputs: list[str] = []
    while g.nbytes < WEIGHT_BYTES:
        outputs.append(make(g, f"x{len(outputs)}"))
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [m, k]) for i in range(len(outputs))]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [m, n]) for name in outputs]
    session = opened(g.nodes, inputs, values, g.weights, threads=2)
    return session, len(outputs), g.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=2048, help="columns of a weight; default: 2048")
    parser.add_argument("--n", type=int, default=5632, help="rows of a weight; default: 5632")
    parser.add_argument("--rows", default="1,8,64,512", help="rows M of the input, separated by commas; default: 1,8,64,512")
    parser.add_argument("--runs", type=int, default=15, help="turns of each kernel; default: 15")
    parser.add_argument("--only", default="", help="parts of the names of kernels, separated by commas; default: all")
    args = parser.parse_args()
    kernels = {name: make for name, make in KERNELS.items() if any(part in name for part in args.only.split(","))}
    rows = [int(m) for m in args.rows.split(",")]
    table: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in kernels}
    for m in rows:
        sessions = {name: build(make, args.k, args.n, m) for name, make in kernels.items()}
        x = np.random.default_rng(1).standard_normal((m, args.k), np.float32)
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(args.runs):
            for name, (session, products, _) in sessions.items():
                feed = {f"x{i}": x for i in range(products)}
                start = time.perf_counter()
                session.run(None, feed)
                seconds[name].append(time.perf_counter() - start)
        for name, (_, products, nbytes) in sessions.items():
            median = statistics.median(seconds[name][1:] or seconds[name])
            table[name][m] = 2 * m * args.n * args.k * products / median / 1e9, nbytes / median / 1e9
    print(f"{'K=' + str(args.k) + ' N=' + str(args.n):52}", *(f"{'M=' + str(m):>14}" for m in rows))
    for name, figures in table.items():
        print(f"{name:52}", *(f"{gops:7.0f} ({rate:4.1f})" for gops, rate in figures.values()))
    print(json.dumps({name: {m: round(gops, 1) for m, (gops, _) in figures.items()} for name, figures in table.items()}))


if __name__ == "__main__":
    main()

"""onnxruntime's GroupQueryAttention over an 8-bit cache against a float32 cache: time and results.

    python -m benchmarks.studies.cache_kernels [--runs 15] [--threads 2] [--heads 32] [--kv-heads 4]
        [--width 64] [--capacity 1024]

Keys and values are normal random numbers. Scales end at four standard deviations: one for all, or one for each channel. Both
sides update their cache in place and take turns. `error` compares with attention in numpy over the contents of the cache after
the run; `rounding` is the distance of that from attention over the original keys and values. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from ..onnx_session import CONTRIB, bound, opened

LARGEST = 4.0  # what the largest stored number stands for
STEPS = (
    (1, 1, 64),
    (1, 1, 900),
    (4, 1, 900),
    (1, 64, 0),
    (1, 64, 800),
    (1, 5, 800),
    (1, 256, 0),
)  # rows, tokens, tokens before


@dataclass(frozen=True)
class Sizes:
    rows: int
    tokens: int
    past: int
    heads: int
    kv_heads: int
    width: int
    capacity: int

    @property
    def cache(self) -> tuple[int, int, int, int]:
        return self.rows, self.kv_heads, self.capacity, self.width


def session(sizes: Sizes, quantised: str, threads: int) -> ort.InferenceSession:
    """One operator; `quantised` is "", PER_TENSOR or PER_CHANNEL."""
    number, cache = TensorProto.FLOAT, TensorProto.INT8 if quantised else TensorProto.FLOAT
    q, kv = ((sizes.rows, sizes.tokens, heads * sizes.width) for heads in (sizes.heads, sizes.kv_heads))
    scales = [1] if quantised == "PER_TENSOR" else [sizes.kv_heads, 1, sizes.width]
    inputs = {"q": (number, q), "k": (number, kv), "v": (number, kv), "k_cache": (cache, sizes.cache)}
    inputs |= {"v_cache": (cache, sizes.cache), "last": (TensorProto.INT32, [sizes.rows]), "total": (TensorProto.INT32, [])}
    names, attributes = list(inputs), {"num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads}
    if quantised:
        inputs |= {"k_scale": (number, scales), "v_scale": (number, scales)}
        names += ["", "", "", "", "", "k_scale", "v_scale"]
        attributes |= {"k_quant_type": quantised, "v_quant_type": quantised, "kv_cache_bit_width": 8}
    outputs = {"y": (number, q), "k_out": (cache, sizes.cache), "v_out": (cache, sizes.cache)}
    node = helper.make_node("GroupQueryAttention", names, list(outputs), domain=CONTRIB, **attributes)
    infos = [[helper.make_tensor_value_info(name, *each) for name, each in part.items()] for part in (inputs, outputs)]
    return opened([node], *infos, threads=threads)


class Side:
    """One way to hold the cache, bound to arrays that are updated in place."""

    def __init__(self, sizes: Sizes, quantised: str, threads: int) -> None:
        self.sizes = sizes
        random = np.random.default_rng(0)
        self.true = [random.standard_normal(sizes.cache, np.float32) for _ in "kv"]
        kv = (sizes.rows, sizes.tokens, sizes.kv_heads * sizes.width)
        q, k, v = (
            random.standard_normal((*kv[:2], heads * sizes.width), np.float32) for heads in (sizes.heads, *[sizes.kv_heads] * 2)
        )
        new = slice(sizes.past, sizes.past + sizes.tokens)
        for cache, rows in zip(self.true, (k, v), strict=True):
            cache[:, :, new] = rows.reshape(*kv[:2], sizes.kv_heads, sizes.width).transpose(0, 2, 1, 3)
        self.scale = np.float32(LARGEST / 127) if quantised else np.float32(1)
        caches = [np.clip(np.rint(c / self.scale), -128, 127).astype(np.int8) if quantised else c.copy() for c in self.true]
        for cache in caches:
            cache[:, :, new] = 0
        total = sizes.past + sizes.tokens
        shape = [1] if quantised == "PER_TENSOR" else [sizes.kv_heads, 1, sizes.width]
        scales = {f"{which}_scale": np.full(shape, self.scale) for which in "kv"} if quantised else {}
        inputs = {"q": q, "k": k, "v": v, "k_cache": caches[0], "v_cache": caches[1], **scales}
        inputs |= {"last": np.full(sizes.rows, total - 1, np.int32), "total": np.array(total, np.int32)}
        self.q, self.caches, self.y = q, caches, np.zeros_like(q)
        outputs = {"y": self.y, "k_out": caches[0], "v_out": caches[1]}
        self.run = bound(session(sizes, quantised, threads), inputs, outputs)
        self.kept = inputs  # what the binding has pointers to

    def errors(self) -> dict[str, float]:
        stored, true = (attention(self.sizes, self.q, *each) for each in ([c * self.scale for c in self.caches], self.true))
        largest = np.abs(true).max()
        return {
            "error": float(np.abs(self.y - stored).max() / largest),
            "rounding": float(np.abs(stored - true).max() / largest),
        }


def attention(sizes: Sizes, q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """As model_defs/ops.py has it, a chunk's tokens seeing each other from left to right."""
    total, group = sizes.past + sizes.tokens, sizes.heads // sizes.kv_heads
    keys, values = (np.repeat(each[:, :, :total], group, axis=1) for each in (keys, values))
    queries = q.reshape(sizes.rows, sizes.tokens, sizes.heads, sizes.width).transpose(0, 2, 1, 3)
    scores = queries @ keys.transpose(0, 1, 3, 2) / np.sqrt(sizes.width)
    scores = np.where(np.arange(total) > sizes.past + np.arange(sizes.tokens)[:, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return ((weights / weights.sum(-1, keepdims=True)) @ values).transpose(0, 2, 1, 3).reshape(q.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"runs": 15, "threads": 2, "heads": 32, "kv-heads": 4, "width": 64, "capacity": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args()
    results = {}
    for step in STEPS:
        sizes = Sizes(*step, args.heads, args.kv_heads, args.width, args.capacity)
        sides = {name: Side(sizes, name, args.threads) for name in ("", "PER_TENSOR", "PER_CHANNEL")}
        turns: list[dict[str, float]] = []
        for _ in range(args.runs + 1):
            turns.append({})
            for name, side in sides.items():
                start = time.perf_counter()
                side.run()
                turns[-1][name] = time.perf_counter() - start
        key = "{} rows of {} tokens after {}".format(*step)
        for name, side in sides.items():
            ratio = statistics.median(turn[name] / turn[""] for turn in turns[1:])
            results[f"{key}, {name or 'float32'}"] = {"time": round(ratio, 2)} | {
                k: float(f"{v:.1e}") for k, v in side.errors().items()
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main()

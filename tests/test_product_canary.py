"""benchmarks.product_canary: what it takes out of a graph, and what it finds wrong."""

from __future__ import annotations

from pathlib import Path

from benchmarks.op_profile import profiled
from benchmarks.product_canary import faults, product_nodes, rate, times
from staticvl.runtime.artifact import read_manifest


def test_products_of_a_graph_run_alone(embedded_artifact: Path, tmp_path: Path) -> None:
    graph = next(graph for graph in read_manifest(embedded_artifact).graphs if graph.kind == "decode")
    assert len(product_nodes(embedded_artifact / graph.file)) >= 8  # seven a layer, and the head
    with profiled(tmp_path):
        found = rate(embedded_artifact, graph, 2, 1, tmp_path)
    assert all(found[name] > 0 for name in ("ms", "alone_ms", "rate"))


def test_times_are_those_of_the_named_kernels_in_each_run() -> None:
    runs = [{"cat": "Session", "name": "model_run", "ts": at, "dur": 50} for at in (0, 100)]
    kernels = [
        {"cat": "Node", "name": f"{name}_kernel_time", "ts": at, "dur": us}
        for name, at, us in (("a", 1, 5), ("b", 10, 7), ("other", 20, 11), ("a", 101, 6))
    ]
    assert times([*kernels, *runs], {"a", "b"}) == [12, 6]


def test_slow_products_and_copies_of_weights_are_faults() -> None:
    def side(rate: float, ratio: float) -> dict[str, dict]:
        return {"graphs": {"prefill-256": {"rate": rate}}, "memory": {"ratio": ratio}}

    assert faults({"w8a8": side(0.8, 1.15)}) == []
    assert faults({"w8a8": side(0.13, 2.4)}) == [
        "w8a8 prefill-256: products run at 0.13 of their rate alone; expected at least 0.8",
        "w8a8: memory is 2.4 times weights and cache; expected at most 1.15",
    ]

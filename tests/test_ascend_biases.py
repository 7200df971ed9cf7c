"""Biases of products are float32 in artifacts of bfloat16 for Ascend, where MatMul takes them so; no graph casts one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from staticvl.compiler.ascend_graph.merging import merge_products, note_biases
from staticvl.compiler.buckets import Buckets
from staticvl.compiler.build import build
from staticvl.compiler.emit_ascend import emit, make_kernel
from staticvl.compiler.options import Options
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.weights.storage import stored_targets

from .conftest import EMBEDDED
from .merged_models import FAMILIES, graphs, model_config
from .need_torchair import skip_without_torchair


def options(dtype: str, tp: int = 1) -> Options:
    return Options(checkpoint=Path(), out=Path(), backend="ascend", dtype=dtype, tp=tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_weights_are_what_kernels_take(family: str, dtype: str, tp: int) -> None:
    """Float by float. The bias of a sum over ranks, and that of a norm, has the graph's dtype."""
    floats = options(dtype, tp).floats({})
    stored = stored_targets(model_config(family), "none", floats, tp, ascend=True)
    wide = {name for name, part in stored.items() if part.dtype != dtype}
    seen: set[str] = set()
    for graph in graphs(family, ranks=tp):
        kernel = make_kernel(graph, getattr(torch, dtype), (merge_products, note_biases))
        for name, tensor in zip(kernel.weights, kernel.arguments, strict=False):
            assert str(tensor.dtype) == f"torch.{stored[name].dtype}", name
            seen |= {name} & wide
    assert seen == wide and bool(wide) == (dtype == "bfloat16")
    assert not any("norm" in name for name in wide)
    assert any(name.endswith(("o.bias", "down.bias")) for name in wide) == (dtype == "bfloat16" and tp == 1)


def test_no_bias_is_cast() -> None:
    skip_without_torchair()
    (graph,) = (each for each in graphs("llava", heads=16) if each.kind == "vision")
    parsed = ge_graph.parse(emit(graph, "bfloat16").graph)
    products = [node for node in parsed.nodes if node.type == "MatMul"]
    biased = [node.inputs[node.input_names.index("bias")] for node in products if "bias" in node.input_names]
    inputs = {node.name: node.outputs[0].dtype for node in parsed.inputs}
    dtypes = [inputs[source.producer] for source in biased if source]
    assert len(dtypes) > 8 and set(dtypes) == {"float32"}


@pytest.mark.parametrize("eager", [(), ("vision",)])
def test_graphs_with_such_biases_have_certificates(eager: tuple[str, ...], tmp_path: Path) -> None:
    skip_without_torchair()
    buckets = Buckets(prefill=(16,), decode=(1,), context=64, slots=1)
    made = build(
        Options(
            checkpoint=EMBEDDED, out=tmp_path, buckets=buckets, backend="ascend", candidates=0, dtype="bfloat16", eager=eager
        )
    )
    weights = made.manifest.weights
    assert weights["vision.layers.0.attn.qkv.bias"].dtype == "float32"
    assert weights["vision.layers.0.attn.qkv.weight"].dtype == "bfloat16"
    assert all(graph.certificate and graph.certificate.worst <= 1e-4 for graph in made.manifest.graphs)

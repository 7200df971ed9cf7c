"""Products of quantised weights: onnxruntime's kernels against their definitions, what a graph holds of them, and faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from staticvl.compiler.build import build
from staticvl.compiler.check import CertificateError
from staticvl.compiler.emit_onnx import emit
from staticvl.compiler.graphs import GraphDef
from staticvl.compiler.inputs import prepare
from staticvl.compiler.make import GraphMaker
from staticvl.compiler.onnx_graph import LOWERINGS
from staticvl.compiler.plan import Buckets, Options
from staticvl.compiler.progress import Progress
from staticvl.model_defs import ops, whole_products
from staticvl.model_defs.config import quant_parts, tower_quant
from staticvl.model_defs.layers import Linear, without_rounding
from staticvl.runtime.artifact import GraphKey, TensorSpec, read_manifest
from staticvl.runtime.backends import ort as backend
from staticvl.weights.quantize import dequantize, quantize
from staticvl.weights.tensors import StoredTensor
from staticvl.weights.writer import lay_out, write_weight_file

from .checkpoints import tiny_llava
from .rounding import check_product

QUANTS = ("w8a16", "w8a8+vision", "w4a16")


def layer(quant: str, n: int, k: int, *, bias: bool) -> tuple[Linear, Tensor]:
    """A filled layer, and the weight that it stands for."""
    random = torch.Generator().manual_seed(n * k)
    parts = quantize(quant, torch.randn(n, k, generator=random))
    module = Linear(k, n, bias=bias, quant=quant)
    module.load_state_dict(parts | ({"bias": torch.randn(n, generator=random)} if bias else {}))
    return module, dequantize(quant, parts, k)


def compiled(module: Linear, x: Tensor, folder: Path | None = None) -> Tensor:
    """What onnxruntime makes of x; with a `folder`, where weights can lie, by the twin."""
    expected = module(x)
    specs = [TensorSpec(name=name, dtype="float32", shape=tuple(each.shape)) for name, each in (("x", x), ("y", expected))]
    values = {name: each.numpy() for name, each in module.named_parameters()}
    graph = GraphDef(GraphKey("decode", 1), module, (specs[0],), (specs[1],), {} if folder else values)
    options = backend._options(pack=True, threads=1)
    model: bytes | Path = emit(graph, {}) if not folder else folder / "twin.onnx"
    if folder:
        shard = lay_out(
            "weights.safetensors", {name: StoredTensor(str(each.dtype), each.shape) for name, each in values.items()}
        )
        write_weight_file(folder, shard, lambda name: torch.from_numpy(values[name]))
        (folder / "twin.onnx").write_bytes(emit(graph, shard.tensors, exact=True))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("shape", [(3,), (1, 5), (4, 1), (2, 3)])
@pytest.mark.parametrize(("n", "k"), [(7, 96), (40, 256)])
def test_onnx_runtime_multiplies_whole_numbers_as_defined(shape: tuple[int, ...], n: int, k: int) -> None:
    """Roundings included: half a step goes to the even neighbour, whatever shape rows come in; zeros give the bias."""
    module, _ = layer("w8a8", n, k, bias=True)
    x = torch.randn(*shape, k, generator=torch.Generator().manual_seed(1))
    x *= 10 ** torch.arange(shape[0]).view(-1, *[1] * len(shape))
    rows = x.view(-1, k)
    rows[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    rows[0, 6:] /= rows[0, 6:].abs().max()
    rows[-1] = 0
    got, expected = compiled(module, x), module(x)
    assert torch.equal(expected.view(-1, n)[-1], module.bias)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("as_here", [True, False])
def test_whole_products_are_exact(as_here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this processor computes them, and as those do whose kernels cut off; the largest sums among them."""
    if not as_here:
        monkeypatch.setattr(whole_products, "torch_is_exact", lambda: False)
    x = torch.randint(-127, 128, (3, 2500), dtype=torch.int8, generator=torch.Generator().manual_seed(4))
    weight = torch.randint(-128, 128, (2500, 5), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    x[0], weight[:, 0], weight[:, 1] = 127, -128, 127
    found = whole_products.whole_product(x, weight)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), x.long() @ weight.long())


def test_a_row_is_rounded_by_its_own_scale() -> None:
    """As exact arithmetic in 64 bits has it; without rounding it is the product of the weights alone."""
    module, weight = layer("w8a8", 33, 2100, bias=False)  # the sum of a column is beyond what float32 holds exactly
    x = torch.randn(6, 2100, generator=torch.Generator().manual_seed(2)) * torch.tensor([1e-3, 1, 1, 1, 1, 1e4])[:, None]
    scale = x.abs().amax(1, keepdim=True).double() / 127
    whole = (x / scale.float()).round().double() * scale
    assert ((x - whole).abs() <= 0.5001 * scale).all()
    torch.testing.assert_close(module(x).double(), whole @ weight.double().T, rtol=1e-5, atol=1e-5)
    without_rounding(module)
    check_product(module(x), x, weight)


@pytest.mark.parametrize(("n", "k"), [(300, 256), (7, 112)])
def test_4_bits_as_defined(n: int, k: int) -> None:
    """More rows than are worked on at once, and a last block that is not full."""
    module, weight = layer("w4a16", n, k, bias=True)
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(3))
    expected = x @ weight.T + module.bias
    check_product(module(x), x, weight, module.bias)
    assert float((compiled(module, x) - expected).abs().max() / expected.abs().max()) < 0.02


@pytest.mark.parametrize(
    ("kind", "n", "k"),
    [("w4a16-g32-asym", 300, 256), ("w4a16-g32-asym", 7, 96), ("w8a16-g32-asym", 7, 112), ("w4a16-asym", 9, 384)],
)
def test_around_zero_points(kind: str, n: int, k: int, tmp_path: Path) -> None:
    """An even number of blocks and an odd one, as numbers of 4 bits are read; the least and the largest zero point."""
    random = torch.Generator().manual_seed(n + k)
    parts = {
        name: torch.empty(part.shape, dtype=getattr(torch, part.dtype or "float32"))
        for name, part in quant_parts(kind, n, k).items()
    }
    parts["qweight"].random_(generator=random)
    parts["zeros"].random_(generator=random)
    parts["scales"].uniform_(-0.1, 0.1, generator=random)
    module = Linear(k, n, bias=False, quant=kind)
    module.load_state_dict(parts)
    x = torch.randn(2, 3, k, generator=random)
    weight = dequantize(kind, parts, k)
    expected = x @ weight.T
    check_product(module(x), x, weight)
    check_product(compiled(module, x, tmp_path), x, weight)
    assert float((compiled(module, x) - expected).abs().max() / expected.abs().max()) < 0.02


# --- Whole graphs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GraphMaker]:
    """Makes graphs of a checkpoint in a quantisation, compiled once."""
    folder = tmp_path_factory.mktemp("quantised")
    tiny = tiny_llava(folder / "checkpoint")
    made: dict[str, GraphMaker] = {}

    def maker(quant: str) -> GraphMaker:
        if quant not in made:
            buckets = Buckets(prefill=(8,), decode=(2,), vision=(1,), context=32, slots=2)
            options = Options(checkpoint=tiny.folder, out=folder / quant, buckets=buckets, quant=quant)
            build(options)
            job = prepare(options, Progress())
            made[quant] = GraphMaker(options, job.config, job.info, job.plan, read_manifest(options.out).weights)
        return made[quant]

    return maker


@pytest.mark.parametrize("quant", QUANTS)
def test_everything_but_rounding_is_certified(makers: Callable[[str], GraphMaker], quant: str) -> None:
    for graph in read_manifest(makers(quant).out).graphs:
        assert graph.certificate is not None and graph.certificate.worst <= 1e-4
        rounding = graph.certificate.rounding
        if graph.kind == "vision" and tower_quant(quant) == "none":
            assert rounding is None
        else:
            assert rounding is not None and 0 < rounding < 0.2


def test_what_several_layers_take_is_quantised_once(makers: Callable[[str], GraphMaker]) -> None:
    maker = makers("w8a8+vision")
    layers = maker.config.text.layers
    (graph,) = (each for each in read_manifest(maker.out).graphs if each.kind == "decode")
    count = Counter(node.op_type for node in onnx.load(maker.out / graph.file, load_external_data=False).graph.node)
    assert (count["MatMulIntegerToFloat"], count["QuantizeLinear"]) == (7 * layers, 4 * layers)
    assert (count["FusedMatMul"], count["MatMulNBits"]) == (0, 1), "lm_head has blocks"


def columns_rolled(right: Callable[..., Any], e: Any, node: Any, x: str, q: str, scales: str, *rest: Any) -> Any:
    n = node.args[2].meta["val"].shape[0]
    return right(e, node, x, q, e.node("Gather", [scales, e.constant(np.roll(np.arange(n), 1))], axis=0), *rest)


def scales_halved(right: Callable[..., Any], e: Any, node: Any, x: str, q: str, scales: str, *rest: Any) -> Any:
    return right(e, node, x, q, e.node("Mul", [scales, e.constant(0.5, "float32")]), *rest)


def one_layer(broken: Callable[..., Any]) -> Callable[..., Any]:
    def lower(right: Callable[..., Any], e: Any, *args: Any) -> Any:
        return broken(right, e, *args) if e.scope == "text.layers.1.mlp.down" else right(e, *args)

    return lower


def nibbles_swapped(right: Callable[..., Any], e: Any, node: Any, x: str, q: str, *rest: Any) -> Any:
    """Activations in the order of numbers whose two halves are read the wrong way round."""
    k = node.args[0].meta["val"].shape[-1]
    order = np.arange(k).reshape(-1, 2)[:, ::-1].ravel()
    return right(e, node, e.node("Gather", [x, e.constant(order)], axis=-1), q, *rest)


def unsigned(right: Callable[..., Any], e: Any, *args: Any) -> Any:
    """Zero taken for 0 where it is 128."""
    before = e.constant
    e.constant = lambda value, dtype="int64": before(0 if (value, dtype) == (128, "uint8") else value, dtype)
    try:
        return right(e, *args)
    finally:
        del e.constant


def test_what_a_tower_keeps(makers: Callable[[str], GraphMaker]) -> None:
    """Its layers are whole-number products, its patches and the projector are not."""
    maker = makers("w8a8+vision")
    (graph,) = (each for each in read_manifest(maker.out).graphs if each.kind == "vision")
    count = Counter(node.op_type for node in onnx.load(maker.out / graph.file, load_external_data=False).graph.node)
    layers = maker.config.vision.used_layers
    assert (count["MatMulIntegerToFloat"], count["QuantizeLinear"], count["FusedMatMul"]) == (6 * layers, 4 * layers, 3)


def test_misread_weights_of_a_tower_are_refused(makers: Callable[[str], GraphMaker], monkeypatch: pytest.MonkeyPatch) -> None:
    right, name = LOWERINGS[f"{ops.NAMESPACE}.linear_w8a8"], f"{ops.NAMESPACE}.linear_w8a8"

    def lower(e: Any, *args: Any) -> Any:
        return (scales_halved if e.scope == "vision.layers.0.mlp.up" else lambda f, *rest: f(*rest))(right, e, *args)

    maker = makers("w8a8+vision")  # compiled before anything is broken
    monkeypatch.setitem(LOWERINGS, name, lower)
    with pytest.raises(CertificateError, match="vision-1 differs from its definition"):
        maker.make(GraphKey("vision", 1), "again")


@pytest.mark.parametrize(
    ("quant", "op", "broken"),
    [
        ("w8a8+vision", "linear_w8a8", one_layer(columns_rolled)),
        ("w8a8+vision", "linear_w8a8", one_layer(scales_halved)),
        ("w8a8+vision", "linear_w8a8", unsigned),
        ("w4a16", "linear_w4", one_layer(columns_rolled)),
        ("w4a16", "linear_w4", one_layer(scales_halved)),
        ("w4a16", "linear_w4", one_layer(nibbles_swapped)),
    ],
)
def test_misread_weights_are_refused(
    makers: Callable[[str], GraphMaker], monkeypatch: pytest.MonkeyPatch, quant: str, op: str, broken: Callable[..., Any]
) -> None:
    right = LOWERINGS[f"{ops.NAMESPACE}.{op}"]
    maker = makers(quant)  # compiled before anything is broken
    monkeypatch.setitem(LOWERINGS, f"{ops.NAMESPACE}.{op}", lambda e, *args: broken(right, e, *args))
    with pytest.raises(CertificateError, match="decode-2 differs from its definition"):
        maker.make(GraphKey("decode", 2), "again")

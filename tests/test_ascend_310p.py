"""The Ascend 310P: no compiled graph of ours runs there, and every kind of graph runs op by op, quantised weights too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.choices import PlanError
from staticvl.compiler.eager_products import linear_packed, linear_w4, linear_w8, linear_w8a8
from staticvl.compiler.options import Options
from staticvl.compiler.plan import Buckets
from staticvl.model_defs import ops
from staticvl.runtime.artifact import read_manifest
from staticvl.runtime.backends.ascend.weights import to_offsets, to_signed
from staticvl.weights.ascend_contents import packed_features

from .ascend import CHECKPOINTS, QUESTION
from .conftest import REPO
from .need_torchair import skip_without_torchair

skip_without_torchair()

SHAPES = REPO / "tools" / "assets" / "shapes.png"
EAGER = ("vision", "prefill", "decode")
SOC = "Ascend310P"
BUCKETS = Buckets(prefill=(16,), decode=(1,), context=448, slots=1)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer of ONNX Runtime with weights in floats."""
    out = tmp_path_factory.mktemp("onnx") / "artifact"
    build(Options(checkpoint=CHECKPOINTS["llava"], out=out, buckets=BUCKETS))
    return answer(out, "cpu")


def answer(artifact: Path, device: str) -> str:
    return runtime.load(artifact, device=device).generate(QUESTION, [SHAPES], max_new_tokens=24, temperature=0.0).text


# Products of w8a16 are those of w4a16 but for the unpacking, which test_grouped_products compares.
@pytest.mark.parametrize("quant", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("", "w8a16")), "w8a8", "w4a16"])
def test_every_kind_op_by_op(expected: str, tmp_path: Path, quant: str) -> None:
    out = tmp_path / "artifact"
    build(
        Options(checkpoint=CHECKPOINTS["llava"], out=out, buckets=BUCKETS, backend="ascend", quant=quant, eager=EAGER, soc=SOC)
    )
    manifest = read_manifest(out)
    assert manifest.ascend is not None and manifest.ascend.soc == SOC
    assert all(graph.eager for graph in manifest.graphs)
    assert all(graph.certificate and graph.certificate.worst <= 1e-4 for graph in manifest.graphs)
    if quant:  # weights are stored as on other cards
        assert {"uint8", "int8"} & {spec.dtype for spec in manifest.weights.values()}
    assert answer(out, "sim") == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"takes no compiled vision, prefill, decode graphs: .*910B and 910_93 alone .*--eager vision,prefill,decode$"),
        ({"eager": ("vision", "decode")}, r"takes no compiled prefill graphs: .*--eager vision,prefill,decode$"),
        (
            {"eager": EAGER, "buckets": Buckets(verify=(5,))},
            r"takes no compiled verify graphs: .*--eager vision,prefill,decode,verify$",
        ),
        ({"eager": EAGER, "dtype": "bfloat16"}, r"Ascend310P computes in float16 alone, and dtype is bfloat16"),
    ],
)
def test_what_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        Options(checkpoint=Path(), out=Path(), backend="ascend", soc=SOC, **options)


# ---- products of eager programs, against the definitions


def weight_of(bits: int, *, zeros: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A stored weight of 6 x 3 blocks of 32, its scales, and its zero points; 90 in features fill the last block in part."""
    generator = torch.Generator().manual_seed(bits)
    width = 32 // (8 // bits)
    qweight = torch.randint(0, 256, (6, 3, width), dtype=torch.uint8, generator=generator)
    scales = torch.rand(6, 3, generator=generator) / 16
    columns = 3 if bits == 8 else 2
    points = torch.randint(0, 256, (6, columns), dtype=torch.uint8, generator=generator) if zeros else None
    return qweight, scales, points


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_grouped_products(bits: int, zeros: bool) -> None:
    qweight, scales, points = weight_of(bits, zeros=zeros)
    x, bias = torch.randn(2, 5, 90), torch.randn(6)
    definition, function = (ops.linear_w8, linear_w8) if bits == 8 else (ops.linear_w4, linear_w4)
    offsets = None if points is None else to_offsets(points, qweight, scales)
    found = function(x, to_signed(qweight), scales, bias, offsets)
    torch.testing.assert_close(found, definition(x, qweight, scales, bias, points), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("zeros", [False, True])
def test_products_of_weights_packed_along_the_features(zeros: bool) -> None:
    """64 x 256 in blocks of 128: the stored form of 4 bits (weights/ascend_forms.py), against the definition over blocks."""
    generator = torch.Generator().manual_seed(4)
    qweight = torch.randint(0, 256, (64, 2, 64), dtype=torch.uint8, generator=generator)
    scales = torch.rand(64, 2, generator=generator) / 16
    points = torch.randint(0, 256, (64, 1), dtype=torch.uint8, generator=generator) if zeros else None
    x, bias = torch.randn(2, 5, 256, generator=generator), torch.randn(64, generator=generator)
    stored, stored_scales = packed_features("qweight", qweight), packed_features("scales", scales)
    offsets = None if points is None else to_offsets(points, stored, stored_scales)
    product = linear_packed(x, to_signed(stored), stored_scales, bias, offsets)
    torch.testing.assert_close(product, ops.linear_w4(x, qweight, scales, bias, points), rtol=1e-5, atol=1e-4)


def test_products_of_weights_with_one_scale_a_column() -> None:
    """[N, K] in one block, and a bias in float32 beside activations in 16 bits."""
    generator = torch.Generator().manual_seed(8)
    qweight = torch.randint(0, 256, (6, 90), dtype=torch.uint8, generator=generator)
    scales, bias = torch.rand(6, 1, generator=generator) / 16, torch.randn(6, generator=generator)
    x = torch.randn(2, 5, 90, generator=generator)
    expected = ops.linear_w8(x, qweight[:, None], scales, bias)
    torch.testing.assert_close(linear_w8(x, to_signed(qweight), scales, bias), expected, rtol=1e-5, atol=1e-4)
    halves = linear_w8(x.half(), to_signed(qweight), scales, bias)
    assert halves.dtype == torch.float16 and (halves - expected).abs().max() < 0.02 * expected.abs().max()


def test_whole_number_products() -> None:
    qweight, scales = torch.randint(-127, 128, (90, 6), dtype=torch.int8), torch.rand(6) / 16
    x, bias = torch.randn(2, 5, 90), torch.randn(6)
    found = linear_w8a8(x, qweight, scales, bias, True)
    torch.testing.assert_close(found, ops.linear_w8a8(x, qweight, scales, bias, False), rtol=1e-5, atol=1e-4)
    halves = linear_w8a8(100 * x.half(), qweight, scales, bias.half(), True)
    assert halves.isfinite().all() and halves.dtype == torch.float16

"""A cache in 8 bits: the op against plain loops and ONNX Runtime, what scales are measured, faults, and whole models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from benchmarks.quantisation_accuracy import answered, compiled, forced
from benchmarks.quantisation_accuracy import calibration as drawn
from staticvl import runtime
from staticvl.compiler import calibrate as calibrate_code
from staticvl.compiler.build import build
from staticvl.compiler.calibrate import CACHE_MARGIN, LEAST_SCALE, cache_scales, largest_in
from staticvl.compiler.calibration import Calibration, Conversation
from staticvl.compiler.check import CertificateError, rounding_error
from staticvl.compiler.cost import graph_cost
from staticvl.compiler.emit_onnx import emit
from staticvl.compiler.graphs import GraphContext, GraphDef, define_graph, trace
from staticvl.compiler.inputs import plan_only, prepare
from staticvl.compiler.make import GraphMaker
from staticvl.compiler.onnx_graph import LOWERINGS, Emitter
from staticvl.compiler.plan import Buckets, Options, PlanError, make_plan
from staticvl.compiler.progress import Progress
from staticvl.model_defs import ops
from staticvl.model_defs.config import read_config
from staticvl.model_defs.decoder import Attention
from staticvl.runtime.artifact import CacheSpec, GraphKey, Manifest, TensorSpec, WeightSpec, read_manifest
from staticvl.runtime.backends.ascend.weights import map_weight
from staticvl.runtime.processor.prompt import Message
from staticvl.tools.cli import main
from staticvl.tools.comparing.checkpoint import Checkpoint
from staticvl.tools.comparing.metrics import compare_logits
from staticvl.tools.comparing.samples import user_sample
from staticvl.tools.comparing.static_side import open_artifact_side, open_eager_side
from staticvl.tools.development.train_tiny import cases
from staticvl.tools.tuning.target import from_artifact, from_checkpoint
from staticvl.weights.calibrated_layers import decoder_folds
from staticvl.weights.shard import rank_span
from staticvl.weights.tensors import StoredTensor
from staticvl.weights.weight_map import targets
from staticvl.weights.writer import lay_out, write_weight_file

from .ascend import CHECKPOINTS
from .checkpoints_mllama import tiny_mllama
from .conftest import EMBEDDED
from .fakes import Guess, noise
from .need_torchair import skip_without_torchair
from .wide_models import wide_config

HEADS, KV_HEADS, WIDTH, ROOM = 4, 2, 16, 20
ONE_IMAGE = Calibration((Conversation("line 1", (Message("user", "Say one word.", 1),), (noise(5),)),), "ab" * 32)
BUCKETS = Buckets(prefill=(8, 32), decode=(1, 4), verify=(5,), vision=(1,), context=256, slots=4)


# ---- the op


@dataclass(frozen=True)
class Step:
    """What one attention is given; rows of the caches after the lengths are what an earlier sequence left."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor
    v_scale: Tensor
    lengths: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.k_cache, self.v_cache, self.k_scale, self.v_scale, self.lengths


def step(tokens: int, lengths: Sequence[int]) -> Step:
    """Some keys lie between two steps, some beyond the last; no two channels have one scale."""
    random = torch.Generator().manual_seed(tokens + sum(lengths))
    rows = len(lengths)
    scales = [torch.rand(KV_HEADS, 1, WIDTH, generator=random) * factor + 0.01 for factor in (0.02, 0.05)]
    q = torch.randn(rows, tokens, HEADS * WIDTH, generator=random)
    new = [torch.randn(rows, tokens, KV_HEADS * WIDTH, generator=random) for _ in "kv"]
    new[0][:, :, :4] = torch.tensor([0.5, 1.5, -2.5, 900.0]) * scales[0].flatten()[:4]
    new[1][:, :, -1] = -900.0
    caches = [torch.randint(-128, 128, (rows, KV_HEADS, ROOM, WIDTH), generator=random, dtype=torch.int8) for _ in "kv"]
    return Step(q, *new, *caches, *scales, torch.tensor(lengths, dtype=torch.int32))


def looped(given: Step) -> tuple[np.ndarray, ...]:
    """The same in 64 bits, row by row, head by head, token by token."""
    q, k, v, k_cache, v_cache, k_scale, v_scale, _ = (each.numpy().copy() for each in given.tensors)
    out = np.zeros(q.shape)
    for b, past in enumerate(given.lengths.tolist()):
        for t in range(q.shape[1]):
            for head in range(KV_HEADS):
                channels = slice(head * WIDTH, (head + 1) * WIDTH)
                for cache, new, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
                    steps = new[b, t, channels] * (np.float32(1) / scale[head, 0])
                    cache[b, head, past + t] = np.clip(np.rint(steps), -128, 127)
            for head in range(HEADS):
                own, channels = head // (HEADS // KV_HEADS), slice(head * WIDTH, (head + 1) * WIDTH)
                keys, values = (
                    cache[b, own, : past + t + 1].astype(np.float64) * scale[own, 0].astype(np.float64)
                    for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
                )
                scores = keys @ q[b, t, channels] / WIDTH**0.5
                weights = np.exp(scores - scores.max())
                out[b, t, channels] = weights / weights.sum() @ values
    return out, k_cache, v_cache


class Scaled(nn.Module):
    """The op with its scales as weights, as the decoder has it."""

    def __init__(self, given: Step) -> None:
        super().__init__()
        self.k_scale = nn.Parameter(given.k_scale.flatten(), requires_grad=False)
        self.v_scale = nn.Parameter(given.v_scale.flatten(), requires_grad=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Any:
        scales = self.k_scale.view(-1, 1, WIDTH), self.v_scale.view(-1, 1, WIDTH)
        return ops.int8_cached_attention(q, k, v, k_cache, v_cache, *scales, lengths, HEADS)


def on_onnx_runtime(given: Step, folder: Path) -> list[np.ndarray]:
    """What comes out, and the caches, which are written in place."""
    names = ("q", "k", "v", "k_cache.0", "v_cache.0", "lengths")
    feed = dict(zip(names, (each.numpy().copy() for each in (*given.tensors[:5], given.lengths)), strict=True))
    specs = [TensorSpec(name=name, dtype=each.dtype.name, shape=each.shape) for name, each in feed.items()]
    outputs = [TensorSpec(name="out", dtype="float32", shape=feed["q"].shape)]
    outputs += [TensorSpec(name=f"{spec.name}.out", dtype="int8", shape=spec.shape) for spec in specs[3:5]]
    module = Scaled(given)
    stored = {name: StoredTensor("float32", tuple(each.shape)) for name, each in module.named_parameters()}
    shard = lay_out("weights.safetensors", stored)
    write_weight_file(folder, shard, dict(module.named_parameters()).__getitem__)
    graph = GraphDef(GraphKey("decode", 1), module, tuple(specs), tuple(outputs))
    (folder / "model.onnx").write_bytes(emit(graph, shard.tensors))
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    written = {"out": np.zeros_like(feed["q"])} | {spec.name: feed[spec.name.removesuffix(".out")] for spec in outputs[1:]}
    binding = session.io_binding()
    for bind, arrays in ((binding.bind_input, feed), (binding.bind_output, written)):
        for name, array in arrays.items():
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return [*written.values()]


STEPS = {
    "prefill from empty": (8, (0,)),
    "a chunk after others": (6, (9,)),
    "verify": (5, (7,)),
    "up to the last row": (4, (ROOM - 4,)),
    "decode": (1, (13,)),
    "decode at several lengths": (1, (0, 5, 11, ROOM - 1)),
}


@pytest.mark.parametrize("name", STEPS)
def test_onnx_runtime_computes_what_the_op_is_defined_as(name: str, tmp_path: Path) -> None:
    """Roundings to the bit, those of what lies between two steps and beyond the last included."""
    given = step(*STEPS[name])
    expected = looped(given)
    defined = [each.numpy() for each in ops.int8_cached_attention(*given.tensors, HEADS)]
    for found in (defined, on_onnx_runtime(given, tmp_path)):
        assert all(np.array_equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
    written = expected[1][0, 0, given.lengths[0]]
    assert written[:4].tolist() == [0, 2, -2, 127] and expected[2][0, -1, given.lengths[0], -1] == -128


def test_over_stored_numbers_nothing_is_rounded() -> None:
    """Given the roundings, the same attention; what comes back are the steps that were rounded."""
    given = step(5, (7,))
    out, *caches = ops.int8_cached_attention(*given.tensors, HEADS)
    held = replace(given, k_cache=caches[0].float(), v_cache=caches[1].float())
    again, *steps = ops.attention_over_stored(*held.tensors, HEADS)
    torch.testing.assert_close(again, out)
    for rounded, exact in zip(caches, steps, strict=True):
        assert 0 < float((exact - rounded).abs().max()) <= 0.5
        assert rounding_error(rounded.numpy(), exact.numpy()) == 0
        assert rounding_error(rounded.numpy() + 1.0, exact.numpy()) > 1e-3
    assert rounding_error(rounded.numpy(), np.full(rounded.shape, np.nan)) == float("inf")


def test_the_decoder_scales_keys_as_keys_and_values_as_values() -> None:
    """Keys a thousand times as large as values, whose steps they would never fit; against the same layer over floats."""
    config = replace(read_config(EMBEDDED).text, heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH, hidden_size=32)
    layers = [Attention(replace(config, int8_cache=int8), "none", 1) for int8 in (True, False)]
    random = torch.Generator().manual_seed(4)
    weights = {name: torch.randn(value.shape, generator=random) for name, value in layers[1].named_parameters()}
    weights["k.weight"] *= 30
    weights["v.weight"] /= 30
    scales = {"k_scale": torch.full((KV_HEADS * WIDTH,), 2.0), "v_scale": torch.full((KV_HEADS * WIDTH,), 0.002)}
    for layer, held in zip(layers, (weights | scales, weights), strict=True):
        layer.load_state_dict(held)
    feed = {name: torch.ones(1, 6, WIDTH) * value for name, value in (("rope_cos", 1.0), ("rope_sin", 0.0))}
    feed["lengths"] = torch.zeros(1, dtype=torch.int32)
    x = torch.randn(1, 6, 32, generator=random) / 6
    caches = [torch.zeros(2, 1, KV_HEADS, 8, WIDTH, dtype=dtype) for dtype in (torch.int8, torch.float32)]
    (out, (keys, _)), (expected, _) = (
        layer(x, feed, (cache[0], cache[1])) for layer, cache in zip(layers, caches, strict=True)
    )
    assert keys.dtype == torch.int8
    assert float((out - expected).norm() / expected.norm()) < 0.1


# ---- scales


def test_scales_hold_what_keys_become_at_any_position() -> None:
    """The rotary embedding turns two channels into each other: neither may grow beyond both."""
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, KV_HEADS, 7, WIDTH, generator=random) for _ in "kv")
    values[:, 0, :, 3] = 0
    scales = cache_scales([largest_in(keys / 2, values), largest_in(keys, values / 2)])
    most = scales["attn.k_scale"].view(KV_HEADS, 1, WIDTH) * 127 / CACHE_MARGIN
    for angle in torch.linspace(0, 6.28, 50):
        turned = ops.rope(keys.transpose(1, 2).flatten(2), *(x.expand(1, 7, WIDTH) for x in (angle.cos(), angle.sin())))
        assert (turned.unflatten(-1, (KV_HEADS, WIDTH)).transpose(1, 2).abs() <= most * 1.0001).all()
    expected = (values.abs().amax((0, 2)) * CACHE_MARGIN / 127).clamp(min=LEAST_SCALE).flatten()
    torch.testing.assert_close(scales["attn.v_scale"], expected)
    assert torch.tensor(LEAST_SCALE).half() == LEAST_SCALE == scales["attn.v_scale"][3]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Questions about drawings, without answers."""
    found = drawn(6, tmp_path_factory.mktemp("prompts") / "drawings")
    return replace(found, conversations=tuple(replace(each, messages=each.messages[:1]) for each in found.conversations))


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory, prompts: Calibration) -> Path:
    """The trained tiny model with a cache in 8 bits."""
    return built(tmp_path_factory.mktemp("eight") / "artifact", prompts)


def built(out: Path, prompts: Calibration, **options: Any) -> Path:
    given = {"checkpoint": EMBEDDED, "buckets": BUCKETS, "calibration": prompts, "kv_cache": "int8", **options}
    build(Options(out=out, **given))
    return out


def scales_of(out: Path, manifest: Manifest | None = None) -> dict[str, Tensor]:
    weights = (manifest or read_manifest(out)).weights
    return {name: map_weight(out, spec) for name, spec in weights.items() if name.endswith("_scale")}


def test_what_is_stored_was_measured(eight: Path, prompts: Calibration) -> None:
    """Against the caches of the float model that is run over the same prompts by the engine."""
    side = open_eager_side(Checkpoint(EMBEDDED), context=256, images=None, name="float")
    largest = []
    for each in prompts.conversations:
        prepared = side.prepare(user_sample("it", each.messages[0].text, each.images))
        (said,) = side.run_forced([prepared], [np.array([5])], caches=True)
        largest.append([torch.from_numpy(np.ascontiguousarray(said.caches[f"{w}_cache.2"]))[None] for w in "kv"])
    expected, found = cache_scales([largest_in(*each) for each in largest]), scales_of(eight)
    for which in "kv":
        name = f"attn.{which}_scale"
        torch.testing.assert_close(found[f"text.layers.2.{name}"], expected[name], rtol=1e-4, atol=0)


def test_folded_scales_go_along() -> None:
    """What smoothing divides rows of v by divides their scales: the numbers in the cache stay what they are."""
    text, random = read_config(EMBEDDED).text, torch.Generator().manual_seed(1)
    kv, width = text.kv_heads * text.head_dim, text.heads * text.head_dim
    layer = {
        "attn.v.weight": torch.randn(kv, 8, generator=random),
        "attn.o.weight": torch.randn(8, width, generator=random),
        "attn.v_scale": torch.rand(kv, generator=random),
        "attn.k_scale": torch.rand(kv, generator=random),
    }
    factors = torch.randint(-3, 4, (kv,), generator=random).float().exp2()
    folded = decoder_folds(text, 0)["attn.o"].apply(layer, factors)
    assert not torch.equal(folded["attn.v.weight"], layer["attn.v.weight"])
    steps = [each["attn.v.weight"] / each["attn.v_scale"][:, None] for each in (layer, folded)]
    assert torch.equal(*steps) and torch.equal(folded["attn.k_scale"], layer["attn.k_scale"])


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_scales_are_cut_as_the_heads_that_they_are_of(tp: int) -> None:
    """Also where neighbouring ranks hold the same head."""
    config = wide_config("mllama", 2)
    config = replace(config, text=replace(config.text, int8_cache=True))
    shapes = targets(config)
    names = [name for name in shapes if name.endswith("_scale")]
    assert len(names) == 2 * config.text.self_layers and "text.layers.1.attn.k_scale" not in shapes
    for name in names:
        linear = name.replace("_scale", ".weight")
        for rank in range(tp):
            spans = [rank_span(config, each, shapes[each], tp, rank) for each in (name, linear)]
            assert spans[0] == spans[1], (name, rank)


def test_ranks_and_stages_hold_their_own_scales(tmp_path: Path, prompts: Calibration, eight: Path) -> None:
    out = built(tmp_path / "ranks", prompts, tp=2, pp=2)
    whole, manifest = scales_of(eight), read_manifest(out)
    seen = set()
    for stage in range(2):
        side = manifest.of_stage(stage)
        assert side.cache.text_dtype == "int8" and side.cache.kv_heads == 1
        for name, first in scales_of(out, side).items():
            folder = f"weights/rank-{2 * stage}/"
            assert side.weights[name].file.startswith(folder)
            second = map_weight(out, replaced(side.weights[name], folder, f"weights/rank-{2 * stage + 1}/"))
            assert torch.equal(torch.cat((first, second)), whole[name])
            seen.add(name)
    assert seen == whole.keys() and len(seen) == 2 * 4


def replaced(spec: WeightSpec, old: str, new: str) -> WeightSpec:
    return msgspec.structs.replace(spec, file=spec.file.replace(old, new))


# ---- an artifact


def test_a_manifest_says_what_the_cache_is_kept_in(eight: Path, embedded_artifact: Path) -> None:
    manifest, plain = read_manifest(eight), read_manifest(embedded_artifact)
    assert (manifest.cache.text_dtype, manifest.cache.dtype) == ("int8", "float32")
    assert "text_dtype" not in (embedded_artifact / "manifest.json").read_text(), "as ever"
    assert "int8_cache" not in next(embedded_artifact.glob("tokenizer-*/definition.json")).read_text()
    one = manifest.cache.nbytes / (manifest.cache.slots * manifest.cache.rows)
    assert 4 * one == plain.cache.nbytes / (plain.cache.slots * plain.cache.rows)
    assert manifest.build.options["kv_cache"] == "int8" and "--kv-cache int8" in manifest.recompilation()
    info: Any = manifest.build.calibration
    assert info.method == "largest keys and values"
    caches = {spec.dtype for graph in manifest.graphs for spec in graph.inputs if "_cache." in spec.name}
    assert caches == {"int8"}
    assert all(graph.certificate and graph.certificate.worst < 1e-4 for graph in manifest.graphs)


def test_another_cache_is_another_build(tmp_path: Path, prompts: Calibration) -> None:
    buckets = replace(BUCKETS, prefill=(8,), decode=(4,), verify=None)
    out = tmp_path / "artifact"
    plain = Options(checkpoint=EMBEDDED, out=out, buckets=buckets)
    eight = replace(plain, kv_cache="int8", calibration=prompts)
    for options, changed in ((plain, True), (eight, True), (eight, False), (plain, True)):
        report = build(options)
        assert (report.converted, len(report.traced) > 0) == (changed, changed)
    assert not scales_of(out)


def held(cache: CacheSpec, kinds: str) -> int:
    """Bytes of some kinds of buffers."""
    widths = {"int8": 1, "float32": 4}
    wanted = {name: shape for name, shape in cache.buffers().items() if name.split(".")[0] in kinds.split()}
    return sum(widths[cache.dtype_of(name)] * math.prod(shape) for name, shape in wanted.items())


def test_the_forecast_counts_a_quarter(prompts: Calibration) -> None:
    """Images that enter by cross-attention stay in floats."""
    config = read_config(EMBEDDED.with_name("tiny_mllama"))
    plain = Options(checkpoint=EMBEDDED.with_name("tiny_mllama"), out=Path())
    eight = replace(plain, kv_cache="int8", calibration=prompts)
    caches = [make_plan(config, options).cache for options in (plain, eight)]
    text, images = ([held(cache, kind) for cache in caches] for kind in ("k_cache v_cache", "cross_k cross_v"))
    assert text[0] == 4 * text[1] and images[0] == images[1] > 0
    assert [plan_only(options).sizes["cache_bytes"] for options in (plain, eight)] == [cache.nbytes for cache in caches]
    info = prepare(eight, Progress()).info
    costs = [
        graph_cost(define_graph(context, GraphKey("decode", 1)), "float32")
        for context in (
            GraphContext(config=options.defined(config), image=info.image, cache=cache)
            for options, cache in zip((plain, eight), caches, strict=True)
        )
    ]
    assert costs[0].flops == costs[1].flops
    saved = (text[0] - text[1]) / caches[0].slots - 4 * 2 * caches[0].layers * config.text.kv_heads * config.text.head_dim
    assert costs[0].nbytes - costs[1].nbytes == saved


def test_buckets_are_tuned_for_what_it_takes(eight: Path) -> None:
    """From the artifact, and from the checkpoint that it is made of."""
    counted = from_checkpoint(str(EMBEDDED), "910B", 0.0, quant="none", dtype="float32", vision_tower=None, kv_cache="int8")
    made = from_artifact(eight, "910B", 0.0, 0, None)
    assert counted.row_bytes == made.row_bytes == 2 * 4 * 2 * 32
    assert counted.weight_bytes == made.weight_bytes


# ---- faults


Break = Callable[..., Any]  # the emitter, the right lowering, and its arguments by name


def swapped(e: Emitter, right: Break, k_scale: str, v_scale: str, **_: Any) -> Any:
    return right(k_scale=v_scale, v_scale=k_scale)


def of_the_next_channel(e: Emitter, right: Break, k_scale: str, **_: Any) -> Any:
    order = e.constant(np.roll(np.arange(WIDTH), 1))
    return right(k_scale=e.node("Gather", [k_scale, order], axis=2))


def a_little_large(e: Emitter, right: Break, v_scale: str, **_: Any) -> Any:
    return right(v_scale=e.node("Mul", [v_scale, e.constant(1.01, "float32")]))


def a_row_late(e: Emitter, right: Break, lengths: str, **_: Any) -> Any:
    return right(lengths=e.node("Add", [lengths, e.constant(1, "int32")]))


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> GraphMaker:
    """Makes graphs of a random model with cross-attention, compiled already, anew."""
    folder = tmp_path_factory.mktemp("faults")
    buckets = Buckets(prefill=(8,), decode=(2,), context=48, slots=2, images=(1,))
    options = Options(
        checkpoint=tiny_mllama(folder / "checkpoint").folder,
        out=folder / "artifact",
        buckets=buckets,
        kv_cache="int8",
        calibration=ONE_IMAGE,
    )
    build(options)
    job = prepare(options, Progress())
    return GraphMaker(options, job.config, job.info, job.plan, read_manifest(options.out).weights)


@pytest.fixture(scope="module")
def traced() -> Callable[[GraphDef], torch.export.ExportedProgram]:
    """A trace of a graph, made once: faults of lowerings come after it."""
    traces: dict[str, torch.export.ExportedProgram] = {}

    def traced_once(graph: GraphDef) -> torch.export.ExportedProgram:
        if graph.name not in traces:
            traces[graph.name] = trace(graph)
        return traces[graph.name]

    return traced_once


@pytest.mark.parametrize("broken", [swapped, of_the_next_channel, a_little_large, a_row_late])
@pytest.mark.parametrize("graph", [GraphKey("prefill", 8), GraphKey("decode", 2, 1)])
def test_a_graph_that_misuses_scales_is_refused(
    maker: GraphMaker,
    traced: Callable[[GraphDef], torch.export.ExportedProgram],
    monkeypatch: pytest.MonkeyPatch,
    broken: Break,
    graph: GraphKey,
) -> None:
    monkeypatch.setattr("staticvl.compiler.emit_onnx.trace", traced)
    op = "staticvl.int8_cached_attention"
    lowering = LOWERINGS[op]
    names = ("q", "k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "lengths", "heads")

    def lower(e: Emitter, node: Any, *args: Any) -> Any:
        given = dict(zip(names, args, strict=True))
        return broken(e, lambda **changed: lowering(e, node, *(given | changed).values()), **given)

    monkeypatch.setitem(LOWERINGS, op, lower)
    with pytest.raises(CertificateError, match="differs from its definition"):
        maker.make(graph, "again")


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"calibration": None}, r"a cache in 8 bits needs to know how large keys and values become; give --calibrate FILE"),
        ({"kv_cache": "int4"}, r"kv cache 'int4' is unknown; expected one of float, int8"),
        ({"kv_cache": "float"}, r"'none' has nothing to calibrate; .* and with --kv-cache int8 the cache"),
        ({"backend": "ascend", "eager": ("prefill",)}, r"eager graphs have no cache in 8 bits; leave out"),
        ({"backend": "ascend", "soc": "Ascend310P"}, r"Ascend310P has no attention over a cache in 8 bits; leave out"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], sentence: str) -> None:
    given = {"quant": "none", "kv_cache": "int8", "calibration": Calibration((), "")} | options
    with pytest.raises(PlanError, match=sentence):
        Options(checkpoint=Path(), out=Path(), **given)


def test_the_command_line_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "build.yaml"
    config.write_text(f"checkpoint: {EMBEDDED}\nout: a\nkv_cache: int8\n")
    given = ["compile", str(EMBEDDED), "--out", str(tmp_path / "a"), "--kv-cache", "int8"]
    for args in (given, ["compile", "--config", str(config)]):
        assert main(args) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("staticvl: a cache in 8 bits needs") and not (tmp_path / "a").exists()


def test_what_a_cache_cuts_off_is_shown(eight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(eight)]) == 0
    sentence = " ".join(capsys.readouterr().out.split())
    assert "2 kv heads of 32, int8" in sentence and "cut off keys and values beyond the largest of their channel" in sentence


# ---- whole models


GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 40}


def test_answers_are_those_of_a_cache_in_floats(eight: Path, embedded_artifact: Path) -> None:
    """As a batch of rows of several lengths, and one after another with what is the same taken from other slots."""
    wanted = [case for case in cases(2) if not case.turns][:10]
    texts, shown = [case.question for case in wanted], [list(case.images) for case in wanted]
    with runtime.load(embedded_artifact) as model:
        expected = [out.text for out in model.generate(texts, shown, **GREEDY)]
    with runtime.load(eight) as model:
        assert [out.text for out in model.generate(texts, shown, **GREEDY)] == expected
        alone = [model.generate(text, images=images, **GREEDY) for text, images in zip(texts, shown, strict=True)]
        assert [out.text for out in alone] == expected
        assert model.engine.metrics.reused_tokens > 0 and model.engine.metrics.runs["prefill"] > len(texts)


def test_a_chat_keeps_its_cache_and_a_fork_has_a_copy(eight: Path) -> None:
    """What was rounded once is kept and copied as it is: logits are those of a cache that was filled anew but for its steps."""
    first, then = "What is in the picture?", "How many are there?"
    with runtime.load(eight) as model:
        with model.chat() as chat:
            chat.send(first, images=[noise(1)], **GREEDY)
            with chat.fork() as other:
                said = [each.send(then, **GREEDY, return_logits=True) for each in (chat, other)]
        assert model.engine.metrics.copies > 0
    assert said[0].token_ids == said[1].token_ids
    assert said[0].logits is not None and said[1].logits is not None
    np.testing.assert_allclose(said[0].logits, said[1].logits, atol=0.02 * np.abs(said[0].logits).max())


def test_drafts_are_verified_over_it(eight: Path) -> None:
    with runtime.load(eight, reuse=False) as model:
        params = runtime.SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True)
        prompt = model.processor.prompt("What is in the picture?", [noise(3)])
        (plain,) = model.run([model.new_sequence(prompt, params)])
        sequence = model.new_sequence(prompt, params)
        sequence.prompt_lookup = Guess(plain.token_ids, np.random.default_rng(0))  # type: ignore[assignment]
        (drafted,) = model.run([sequence])
        assert drafted.token_ids == plain.token_ids
        assert 0 < model.engine.metrics.accepted < model.engine.metrics.drafted


@pytest.mark.slow
def test_two_ranks_answer_as_one(eight: Path, tmp_path: Path, prompts: Calibration) -> None:
    out = built(tmp_path / "two", prompts, tp=2, buckets=replace(BUCKETS, prefill=(32,), decode=(1,), verify=None, slots=1))
    sides = [open_artifact_side(folder, device="auto", threads=1, name=folder.name) for folder in (eight, out)]
    prepared = [side.prepare(user_sample("it", "What is in the picture?", (noise(2),))) for side in sides]
    said = [side.run_forced([each], [np.arange(5, 15)], caches=True)[0] for side, each in zip(sides, prepared, strict=True)]
    distance = np.linalg.norm(said[0].logits - said[1].logits) / np.linalg.norm(said[0].logits)
    assert distance < 0.02
    for name, expected in said[0].caches.items():  # what the numbers stand for, all heads together
        assert np.abs(said[1].caches[name] - expected).max() < 0.02 * np.abs(expected).max(), name


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "w8a16", "w8a8"])
def test_it_costs_a_trained_model_little(quant: str, tmp_path: Path, prompts: Calibration) -> None:
    """And scales that are far too small cost it much."""
    wanted = [case for case in cases(4) if not case.turns]
    reference = compiled(EMBEDDED, "none", tmp_path / "float")
    answers = answered(reference, wanted)
    logits = forced(reference, wanted, answers)

    def divergence(name: str) -> float:
        side = compiled(EMBEDDED, quant, tmp_path / name, "onnx", prompts, "int8")
        info: Any = side.artifact.manifest.build.calibration
        assert info.method == ("SmoothQuant, " if quant == "w8a8" else "") + "largest keys and values"
        both = zip(logits, forced(side, wanted, answers), answers.tokens, strict=True)
        return float(np.mean([compare_logits(*each).kl_mean for each in both]))

    assert divergence("eight") < 2e-4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_code, "CACHE_MARGIN", 0.3)
        assert divergence("cut off") > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_ascend_answers_as_onnx_runtime(family: str, tmp_path: Path) -> None:
    """Every family, on the simulator in float32: the same tokens over the same steps."""
    skip_without_torchair()
    images = (1,) if family == "mllama" else None
    buckets = Buckets(prefill=(64,), decode=(1,), verify=(4,), context=384, slots=1, images=images)
    said = []
    for backend, device in (("onnx", "cpu"), ("ascend", "sim:float32")):
        out = built(tmp_path / backend, ONE_IMAGE, checkpoint=CHECKPOINTS[family], buckets=buckets, backend=backend)
        with runtime.load(out, device=device) as model:
            said.append(model.generate("What is this?", [noise(4)], temperature=0.0, max_new_tokens=24, return_logits=True))
    assert said[0].token_ids == said[1].token_ids
    distance = np.linalg.norm(said[0].logits - said[1].logits) / np.linalg.norm(said[0].logits)
    assert distance < 0.05

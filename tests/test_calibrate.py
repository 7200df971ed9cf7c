"""What a calibration sees is what layers take, it goes on where it was broken off, and what it makes is cut among ranks."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.quantisation_accuracy import answered, forced, with_outliers
from benchmarks.quantisation_accuracy import calibration as drawn
from benchmarks.quantisation_accuracy import compiled as compiled_side
from staticvl.compiler import calibrate as calibration_code
from staticvl.compiler.build import build
from staticvl.compiler.calibrate import CalibrationContext, calibrate, prompts_of
from staticvl.compiler.calibration import Calibration, CalibrationError, Conversation
from staticvl.compiler.fingerprint import weights_key
from staticvl.compiler.plan import Buckets, Options, PlanError, make_plan
from staticvl.compiler.progress import Progress
from staticvl.model_defs.config import read_config
from staticvl.model_defs.decoder import Block
from staticvl.runtime.artifact import read_manifest
from staticvl.runtime.backends.ascend.weights import map_weight
from staticvl.runtime.engine.engine import GraphRun
from staticvl.runtime.processor.prompt import Message, Prompt
from staticvl.tools.comparing.checkpoint import Checkpoint
from staticvl.tools.comparing.metrics import compare_logits
from staticvl.tools.comparing.samples import Sample, built_in_samples
from staticvl.tools.comparing.static_side import open_eager_side
from staticvl.tools.development.train_tiny import cases
from staticvl.weights.calibrated_layers import CalibratedLayers, stored_by_ranks
from staticvl.weights.convert import Conversion, convert
from staticvl.weights.input_statistics import InputStatistics, StatisticsCollector
from staticvl.weights.quantize import dequantize, dequantize_w4
from staticvl.weights.source import open_source
from staticvl.weights.tensors import WeightsError
from staticvl.weights.weight_map import targets

from .ascend import CHECKPOINTS
from .checkpoints import tiny_llava
from .conftest import EMBEDDED
from .parity import noise_image

SAMPLES = {
    "llava": ("text 2", "image, wide", "second turn"),
    "llava_next": ("text 1", "image, tall"),
    "mllama": ("text 2", "image, large", "two images"),
    "qwen_vl": ("text 1", "image, wide"),
}
CONTEXT = {"llava": 300, "llava_next": 400, "mllama": 128, "qwen_vl": 200}
LINEAR = ("attn.q", "attn.o", "mlp.gate", "mlp.down")
Seen = dict[str, Tensor]  # layer and linear -> [tokens, features]


def of_samples(samples: list[Sample]) -> Calibration:
    return Calibration(tuple(Conversation(each.name, each.messages, each.images) for each in samples), "0" * 64)


class Setup:
    """A checkpoint, and a calibration of it straight into a store."""

    def __init__(self, folder: Path, calibration: Calibration, context: int) -> None:
        self.checkpoint = Checkpoint(folder)
        self.config, self.info = self.checkpoint.config, self.checkpoint.info
        options = Options(checkpoint=folder, out=folder, buckets=Buckets(context=context, slots=1))
        self.cache = make_plan(self.config, options).cache
        self.prompts = prompts_of(calibration, self.checkpoint.processor, context)

    def run(
        self, store: CalibratedLayers, quant: str = "w4a16", tp: int = 1, progress: Progress | None = None
    ) -> CalibratedLayers:
        source = open_source(self.checkpoint.folder, None)
        context = CalibrationContext(config=self.config, info=self.info, cache=self.cache, quant=quant, tp=tp, store=store)
        calibrate(source, context, self.prompts, progress or Progress())
        return store


def run_by_engine(setup: Setup, samples: list[Sample], context: int, *, tower: bool) -> Seen:
    """What linear layers take when the engine runs the definitions, chunk by chunk."""
    side = open_eager_side(setup.checkpoint, context=context, images=2 if setup.cache.cross else None, name="eager")
    rows: dict[str, list[Tensor]] = {}
    counts: list[int] = []

    def watch(run: GraphRun) -> None:
        if run.step.kind == "prefill":
            counts.append(int(run.feed["last_index"][0]) + 1)

    side.engine.on_run = watch
    for graph in side.artifact.manifest.graphs:
        side.engine.backend.load(graph)
        for name, module in side.engine.backend.modules[graph.name].named_modules():  # type: ignore[attr-defined]
            kept = rows.setdefault(name, [])
            if isinstance(module, Block):  # the last one too goes on with all tokens, as in a calibration
                module.forward = lambda x, feed, cache, only, forward=module.forward: forward(x, feed, cache)
            if graph.kind == "prefill" and name.startswith("text.layers") and name.endswith(LINEAR):
                module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0, : counts[-1]].clone()))
            elif tower and re.fullmatch(r"vision\.(global_)?layers\.\d+\.(attn\.[qo]|mlp\.up)", name):
                module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, 1).clone()))
    for sample in samples:
        side.greedy(side.prepare(sample), 1)
    return {name: torch.cat(each) for name, each in rows.items() if each}


def weights_of(prompts: list[Prompt], tokens: int) -> Tensor:
    """Images count for as much as the text beside them, where they are more. Cross layers see prompts with images alone."""
    if tokens < sum(prompt.length for prompt in prompts):
        prompts = [prompt for prompt in prompts if len(prompt.pixels)]
    found = []
    for prompt in prompts:
        imaged = prompt.image_tokens and (prompt.rows >= 0).sum()
        text = prompt.length - imaged
        found += [text / imaged if row >= 0 and imaged > text else 1.0 for row in prompt.rows]
    return torch.tensor(found, dtype=torch.float32)


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, InputStatistics]]]:
    """The inputs of every layer that is quantised meanwhile."""
    found: list[dict[str, InputStatistics]] = []

    def noted(layer: Any, inputs: dict[str, InputStatistics], *others: Any) -> Any:
        found.append(dict(inputs))
        return smoothed(layer, inputs, *others)

    smoothed = calibration_code.smoothed
    monkeypatch.setattr(calibration_code, "smoothed", noted)
    yield found
    monkeypatch.setattr(calibration_code, "smoothed", smoothed)


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        ("llava", "w4a16"),
        ("mllama", "w8a8+vision"),
        ("qwen_vl", "w8a8+vision"),
        pytest.param("llava_next", "w8a8", marks=pytest.mark.slow),
        pytest.param("mllama", "w4a16", marks=pytest.mark.slow),
    ],
)
def test_statistics_are_of_what_the_engine_feeds_each_layer(
    family: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images among the tokens or by cross-attention, text alone, several turns, prompts in several pieces; towers too."""
    samples = [sample for sample in built_in_samples() if sample.name in SAMPLES[family]]
    setup = Setup(CHECKPOINTS[family], of_samples(samples), CONTEXT[family])
    monkeypatch.setattr(calibration_code, "CHUNK", 40)
    layers: list[str] = []
    made = calibration_code.stored_by_ranks
    monkeypatch.setattr(calibration_code, "stored_by_ranks", lambda *args: (layers.append(args[1]), made(*args))[1])
    with watched(monkeypatch) as found:
        store = setup.run(CalibratedLayers(tmp_path, "k"), quant)
    expected = run_by_engine(setup, samples, CONTEXT[family], tower="+vision" in quant)
    for name, rows in expected.items():
        layer, linear = re.fullmatch(r"(.*layers\.\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
        assert store.has(layer)
        inputs = found[layers.index(layer)][linear]
        assert inputs.tokens == len(rows)
        size = float(rows.abs().max())
        torch.testing.assert_close(inputs.largest, rows.abs().amax(0), rtol=1e-3, atol=1e-4 * size)
        torch.testing.assert_close(inputs.mean, rows.abs().mean(0), rtol=1e-3, atol=1e-4 * size)
        if quant == "w4a16":
            moment = (rows.T * weights_of(setup.prompts, len(rows))) @ rows
            torch.testing.assert_close(inputs.moment, moment, rtol=1e-3, atol=1e-4 * float(moment.abs().max()))
    assert sum(name.startswith("text") for name in expected) == len(LINEAR) * setup.config.text.layers
    assert any(name.startswith("vision") for name in expected) == ("+vision" in quant)


# ---- broken off, cut, recorded


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    samples = [sample for sample in built_in_samples() if sample.name in ("text 2", "image, describe")]
    return Setup(tiny_llava(tmp_path_factory.mktemp("small")).folder, of_samples(samples), 300)


def files(store: CalibratedLayers) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


class Breaks(Progress):
    """Stops after the first layer."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str):
        def advance(_: int) -> None:
            if unit == "layer":
                raise KeyboardInterrupt

        yield advance


def test_what_was_broken_off_goes_on_behind_the_last_layer(
    small: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(small.run(CalibratedLayers(tmp_path, "whole")))
    assert list(whole) and files(small.run(CalibratedLayers(tmp_path, "again"))) == whole, (
        "the same prompts give the same weights"
    )
    store = CalibratedLayers(tmp_path, "broken")
    with pytest.raises(KeyboardInterrupt):
        small.run(store, progress=Breaks())
    assert store.has("text.layers.0") and not store.has("text.layers.1")
    (store.folder / "images").mkdir(exist_ok=True)  # what a killed process leaves
    with watched(monkeypatch) as made:
        assert files(small.run(store)) == whole
    assert len(made) == 1
    with watched(monkeypatch) as made:
        small.run(store)
    assert not made, "nothing is left to do"


@pytest.mark.parametrize("quant", ["w4a16", "w8a8"])
def test_ranks_hold_parts_of_what_was_calibrated_as_a_whole(small: Setup, tmp_path: Path, quant: str) -> None:
    one, two = (small.run(CalibratedLayers(tmp_path, f"tp{tp}"), quant, tp) for tp in (1, 2))
    name = "text.layers.1.attn.o"  # 64 columns: a cut falls between two blocks
    whole, parts = one.parameter(f"{name}.weight", 0), [two.parameter(f"{name}.weight", rank) for rank in (0, 1)]
    assert whole.keys() == {f"{name}.qweight", f"{name}.scales"}
    if quant == "w4a16":
        for part, value in whole.items():
            assert torch.equal(torch.cat([each[part] for each in parts], dim=1), value), part
    name = "text.layers.1.mlp.gate"  # by rows, which are rounded each by itself
    whole, parts = one.parameter(f"{name}.weight", 0), [two.parameter(f"{name}.weight", rank) for rank in (0, 1)]
    for part, value in whole.items():
        axis = 1 if quant == "w8a8" and part.endswith("qweight") else 0
        assert torch.equal(torch.cat([each[part] for each in parts], dim=axis), value), part
    name = "text.layers.1.mlp.down"  # 112 columns: a cut falls within a block
    whole, parts = one.parameter(f"{name}.weight", 0), [two.parameter(f"{name}.weight", rank) for rank in (0, 1)]
    near = dequantize(quant, {part.rsplit(".", 1)[1]: value for part, value in whole.items()}, 112)
    joined = torch.cat(
        [dequantize(quant, {part.rsplit(".", 1)[1]: value for part, value in each.items()}, 56) for each in parts], dim=1
    )
    assert (joined - near).norm() < (0.2 if quant == "w4a16" else 0.01) * near.norm()
    norm = "text.layers.1.mlp_norm.weight"
    assert all(torch.equal(two.parameter(norm, rank)[norm], one.parameter(norm, 0)[norm]) for rank in (0, 1))
    assert not one.parameter("text.lm_head.weight", 0) and not one.parameter("vision.layers.0.attn.q.weight", 0)


@pytest.mark.parametrize("quant", ["w4a16", "w8a8+vision"])
def test_weight_files_hold_what_was_calibrated(small: Setup, tmp_path: Path, quant: str) -> None:
    """Of each rank its own; all else is converted as ever."""
    store = small.run(CalibratedLayers(tmp_path, "k"), quant, 2)
    source, out = open_source(small.checkpoint.folder, None), tmp_path / "out"
    plain = convert(source, small.config, tmp_path / "plain", Conversion(quant=quant, prefix="p", tp=2, rank=1)).weights
    found = convert(source, small.config, out, Conversion(quant=quant, prefix="k", tp=2, rank=1), calibrated=store).weights
    taken = set()
    for name in targets(small.config):
        for part, value in store.parameter(name, 1).items():
            assert torch.equal(map_weight(out, found[part]), value), part
            taken.add(part)
    assert taken and found.keys() == plain.keys()
    assert any(name.startswith("vision.layers.0.attn.q.") for name in taken) == (quant == "w8a8+vision")
    for name in found.keys() - taken:
        assert torch.equal(map_weight(out, found[name]), map_weight(tmp_path / "plain", plain[name])), name
    different = [
        name for name in taken if not torch.equal(map_weight(out, found[name]), map_weight(tmp_path / "plain", plain[name]))
    ]
    assert different, "what was calibrated is not what rounding alone gives"


def test_a_cut_weight_is_rounded_as_a_whole(small: Setup) -> None:
    """What the first rank's columns lose, the second's take back: their error together is less than each by itself leaves."""
    generator = torch.Generator().manual_seed(1)
    config, stem = small.config, "text.layers.0"
    shared = torch.randn(400, 8, generator=generator) @ torch.randn(8, 112, generator=generator)
    x = shared + 0.05 * torch.randn(400, 112, generator=generator)
    gathering = StatisticsCollector(112, moment=True)
    gathering.add(x)
    weight = torch.randn(64, 112, generator=generator)
    inputs = {"mlp.down": gathering.statistics()}

    def error(layers: list[dict[str, Tensor]]) -> float:
        near = [dequantize_w4(each["mlp.down.qweight"], each["mlp.down.scales"], 56) for each in layers]
        return float((x @ (torch.cat(near, dim=1) - weight).T).norm())

    together = stored_by_ranks(config, stem, {"mlp.down.weight": weight}, inputs, "w4a16", 2)
    apart = inputs["mlp.down"]
    assert apart.moment is not None
    blind = apart.moment.clone()
    blind[:56, 56:] = blind[56:, :56] = 0
    known = {"mlp.down": InputStatistics(apart.tokens, apart.largest, apart.mean, blind, apart.rows)}
    assert error(together) < 0.9 * error(stored_by_ranks(config, stem, {"mlp.down.weight": weight}, known, "w4a16", 2))


def one_noise_image() -> Calibration:
    conversation = (Message("user", "Say one word.", 1), Message("assistant", "A circle."))
    return Calibration((Conversation("line 1", conversation, (noise_image((40, 30)),)),), "ab" * 32)


def compiled(folder: Path, out: Path, calibration: Calibration | None, **options: Any) -> bool:
    buckets = Buckets(prefill=(16,), decode=(1,), vision=(1,), context=128, slots=1)
    return build(Options(checkpoint=folder, out=out, buckets=buckets, calibration=calibration, **options)).converted


def test_an_artifact_says_what_it_was_calibrated_with(tmp_path: Path) -> None:
    folder, out = tiny_llava(tmp_path / "checkpoint", layers=1).folder, tmp_path / "out"
    compiled(folder, out, None, quant="w4a16")
    before = read_manifest(out)
    assert "calibration" not in (out / "manifest.json").read_text(), "as ever"
    calibration = one_noise_image()
    assert compiled(folder, out, calibration, quant="w4a16")
    after = read_manifest(out)
    info: Any = after.build.calibration
    assert (info.method, info.sha256, info.prompts, info.pictures) == ("GPTQ", "ab" * 32, 1, 1)
    assert after.build.options["calibrate"] == "FILE" and "--calibrate FILE" in after.recompilation()
    assert after.build.key != before.build.key
    name = "text.layers.0.mlp.down.qweight"
    assert after.weights[name].file != before.weights[name].file, "files of both never mix"
    assert {path.name for path in (out / "weights").iterdir()} == {Path(spec.file).name for spec in after.weights.values()}
    assert not compiled(folder, out, calibration, quant="w4a16"), "nothing changed"
    other = Options(checkpoint=folder, out=out, quant="w4a16", calibration=Calibration(calibration.conversations, "cd" * 32))
    assert weights_key(after.build.source, read_config(folder), other, None) != after.build.key, "another file"


# ---- what cannot be calibrated


def test_a_disk_without_room(small: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match=r"needs \d+ bytes, but only 1000 are free"):
        small.run(CalibratedLayers(tmp_path, "k"))


def test_what_needs_no_calibration() -> None:
    with pytest.raises(
        PlanError, match=r"'w8a16' has nothing to calibrate; calibrated are w4a16, w4a16-g32, w8a8, w8a8\+vision"
    ):
        Options(checkpoint=Path(), out=Path(), quant="w8a16", calibration=Calibration((), ""))


def test_a_prompt_that_does_not_fit(small: Setup) -> None:
    for words, remedy in ((40, r"shorten it, or give --context \d+ or more$"), (200, "shorten it$")):
        calibration = Calibration((Conversation("line 7", (Message("user", "word " * words),)),), "")
        with pytest.raises(CalibrationError, match=rf"^calibration, line 7: \d+ tokens, but the artifact holds 64; {remedy}"):
            prompts_of(calibration, small.checkpoint.processor, 64)


def test_a_prompt_that_cannot_be_read(small: Setup, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"nothing")
    calibration = Calibration((Conversation("line 2", (Message("user", "What?", 1),), (tmp_path / "no.png",)),), "")
    with pytest.raises(CalibrationError, match=r"^calibration, line 2: .*no\.png"):
        prompts_of(calibration, small.checkpoint.processor, 300)


def test_without_images_there_is_a_warning(tmp_path: Path) -> None:
    said: list[str] = []

    class Says(Progress):
        def say(self, line: str) -> None:
            said.append(line)

    folder = tiny_llava(tmp_path / "checkpoint", layers=1).folder
    calibration = Calibration((Conversation("line 1", (Message("user", "Name three colours."),)),), "ef" * 32)
    buckets = Buckets(prefill=(16,), decode=(1,), vision=(1,), context=64, slots=1)
    build(Options(checkpoint=folder, out=tmp_path / "out", buckets=buckets, quant="w8a8", calibration=calibration), Says())
    assert sum("no images" in line for line in said) == 1


# ---- whole models


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["w4a16", "w8a8"])
def test_large_channels_cost_a_calibrated_model_little(quant: str, tmp_path: Path) -> None:
    """A trained model some channels of which are made large and the weights after them small: in floats it is the same."""
    checkpoint = with_outliers(EMBEDDED, tmp_path / "planted", 64.0)
    wanted = [case for case in cases(3) if not case.turns]
    plain, reference = (compiled_side(folder, "none", tmp_path / f"none-{folder.name}") for folder in (EMBEDDED, checkpoint))
    answers = answered(reference, wanted)
    logits = forced(reference, wanted, answers)
    for found, expected in zip(forced(plain, wanted, answers), logits, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())

    def divergence(name: str, calibration: Calibration | None) -> float:
        side = compiled_side(checkpoint, quant, tmp_path / name, "onnx", calibration)
        both = zip(logits, forced(side, wanted, answers), answers.tokens, strict=True)
        return float(np.mean([compare_logits(*each).kl_mean for each in both]))

    without, by = divergence("plain", None), divergence("calibrated", drawn(12, tmp_path / "prompts"))
    assert without > 1e-3 and by < without / 10, (without, by)

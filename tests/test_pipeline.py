"""Pipelines: stages together compute what the whole model computes, and what each of them holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from staticvl.compiler.build import build
from staticvl.compiler.check import relative_error
from staticvl.compiler.lockstep import results_of
from staticvl.compiler.plan import Buckets, Options, PlanError, make_plan
from staticvl.model_defs.config import Stage, read_config
from staticvl.runtime.artifact import GraphSpec, Manifest, Transfer, is_cached, open_artifact, rank_weights, verify
from staticvl.runtime.backends.base import Backend, Feed
from staticvl.runtime.backends.open import open_backend
from staticvl.tools.cli import main
from staticvl.tools.comparing.open_side import open_side
from staticvl.weights.weight_map import targets

from .comparisons import compared, samples_of
from .conftest import EMBEDDED
from .lockstep import StageGroup, world
from .rank_models import feed
from .seeded import copied
from .tiny_families import GOLDEN_QWEN
from .wide_models import wide_config

CHECKPOINTS = {"llava": EMBEDDED, "mllama": EMBEDDED.with_name("tiny_mllama"), "qwen_vl": GOLDEN_QWEN}
CHUNK, SLOTS = 5, 2
TOLERANCE = 1e-5


def compiled(family: str, out: Path, tp: int, pp: int, backend: str = "onnx") -> Path:
    images = (1,) if family == "mllama" else None
    verify = (3,) if family == "qwen_vl" else None
    buckets = Buckets(prefill=(CHUNK,), decode=(SLOTS,), verify=verify, images=images, context=32, slots=SLOTS)
    build(Options(checkpoint=CHECKPOINTS[family], out=out, tp=tp, pp=pp, backend=backend, buckets=buckets))
    return out


def whole(family: str, folder: Path) -> list[np.ndarray]:
    """What the model finds that is not cut."""
    compiled(family, folder, 1, 1)
    manifest = open_artifact(folder).manifest
    backend = open_backend("onnx", folder, manifest.cache, threads=1, manifest=manifest)
    found = [backend.run(*call).first.copy() for call in calls(manifest)]
    return [each for each, (graph, *_) in zip(found, calls(manifest), strict=True) if graph.kind != "vision"]


def calls(manifest: Manifest) -> list[tuple[GraphSpec, Feed, int]]:
    """An image, two chunks of one sequence and one of another, a token of both, perhaps a draft of the other: graphs, feeds,
    slots."""
    rng, cross = np.random.default_rng(1), manifest.cache.cross
    images = 1 if cross else 0
    vision = manifest.graph("vision", manifest.buckets("vision")[0])
    prefill, decode = manifest.graph("prefill", CHUNK, images), manifest.graph("decode", SLOTS, images)
    made: list[tuple[GraphSpec, Feed, int]] = [(vision, fed(vision, rng, [0]), slot) for slot in range(SLOTS)]
    for slot, past in ((0, 0), (0, CHUNK), (1, 0)):
        made.append((prefill, fed(prefill, rng, [past]), slot))
    made.append((decode, fed(decode, rng, [2 * CHUNK, CHUNK]), 0))
    for tokens in manifest.buckets("verify"):
        drafted = manifest.graph("verify", tokens, images)
        made.append((drafted, fed(drafted, rng, [CHUNK]), 1))
    return made


def fed(graph: GraphSpec, rng: np.random.Generator, lengths: list[int]) -> Feed:
    made = feed(graph, rng, lengths)
    if "image_rows" in made:
        made["image_rows"][...] = np.random.default_rng(2).standard_normal(made["image_rows"].shape)
    return made


def run_world(folder: Path) -> list[np.ndarray]:
    """What rank 0 finds when all ranks of all stages run the same calls."""
    manifest = open_artifact(folder).manifest
    members = world(manifest.tp, manifest.pp)

    def work(member: StageGroup) -> list[np.ndarray]:
        own = manifest.of_stage(member.stage)
        device = "cpu" if own.backend == "onnx" else "sim"
        backend: Backend = open_backend(own.backend, folder, own.cache, device=device, threads=1, manifest=own, group=member)
        graphs = {graph.name: graph for graph in own.graphs}
        found = []
        for graph, made, slot in calls(manifest):
            if graph.name in graphs:
                found.append(backend.run(graphs[graph.name], made, slot).first.copy())
        return found

    with ThreadPoolExecutor(len(members)) as pool:
        first = results_of([pool.submit(work, member) for member in members])[0]
    return first[SLOTS:]


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with cross-attention, two stages of two ranks."""
    return compiled("mllama", tmp_path_factory.mktemp("looking"), 2, 2)


SLOW = [("llava", 1, 2), ("llava", 2, 2), ("mllama", 1, 4), ("mllama", 1, 2), ("qwen_vl", 2, 2)]


@pytest.mark.parametrize(
    ("family", "tp", "pp"),
    [("llava", 1, 4), ("qwen_vl", 1, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_stages_compute_what_the_whole_model_computes(family: str, tmp_path: Path, tp: int, pp: int) -> None:
    check_against_the_whole(family, compiled(family, tmp_path / "cut", tp, pp), tmp_path)


@pytest.mark.slow
def test_stages_that_make_their_own_keys_of_images(looking: Path, tmp_path: Path) -> None:
    check_against_the_whole("mllama", looking, tmp_path)


def check_against_the_whole(family: str, folder: Path, tmp_path: Path) -> None:
    verify(folder)
    found, expected = run_world(folder), whole(family, tmp_path / "whole")
    errors = [relative_error(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
    assert len(errors) == 4 + (family == "qwen_vl") and max(errors) <= TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tp", "pp"), [("llava", 1, 2), ("mllama", 2, 2)])
def test_on_the_simulator(family: str, tmp_path: Path, tp: int, pp: int) -> None:
    found = run_world(compiled(family, tmp_path / "cut", tp, pp, "ascend"))
    expected = whole(family, tmp_path / "whole")
    distances = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True)]
    assert 0 < max(distances) <= 2e-2, distances  # float16


def test_what_ranks_bring_to_others_is_what_show_tells(
    looking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calls and bytes of sums and gathers, and of what is handed on, of every rank of every stage."""
    counted: Counter[tuple[int, int, str]] = Counter()  # stage, rank, what
    right = {name: getattr(StageGroup, name) for name in ("all_reduce", "all_gather", "send")}

    def counting(name: str) -> Callable[..., None]:
        def call(self: StageGroup, array: np.ndarray, *others: Any) -> None:
            what = "send" if name == "send" else "collective"
            counted[self.stage, self.rank, what] += 1
            counted[self.stage, self.rank, f"{what} bytes"] += array.nbytes
            right[name](self, array, *others)

        return call

    for name in right:
        monkeypatch.setattr(StageGroup, name, counting(name))
    run_world(looking)

    manifest, expected = open_artifact(looking).manifest, Counter()
    runs = Counter(graph.name for graph, *_ in calls(manifest))
    monkeypatch.setenv("COLUMNS", "160")
    main(["show", str(looking)])
    table = capsys.readouterr().out.partition("sent by one rank to the others")[2]
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    for stage in range(manifest.pp):
        for graph in manifest.of_stage(stage).graphs:
            moved = graph.collectives, graph.collective_bytes, len(graph.sent), sum(spec.nbytes for spec in graph.sent)
            kb, each = f"{moved[1] / 1e3:.1f}", f"{moved[1] / graph.bucket / 1e3:.1f}"
            assert [graph.name, str(stage), str(moved[0]), kb, each, str(moved[2]), f"{moved[3] / 1e3:.1f}"] in shown
            for rank in range(manifest.tp):
                for what, value in zip(("collective", "collective bytes", "send", "send bytes"), moved, strict=True):
                    expected[stage, rank, what] += runs[graph.name] * value
    assert counted == expected
    assert all(counted[stage, rank, "send bytes"] for stage in range(2) for rank in range(2))


@pytest.mark.slow
def test_a_pipeline_is_compared(looking: Path, tmp_path: Path) -> None:
    """Logits, keys and values of all stages, weights of all ranks; a wrong weight of the last rank is named."""
    reference = open_side(compiled("mllama", tmp_path / "whole", 1, 1), threads=1)
    result = compared(reference, looking, samples_of("mllama")[-1:], with_edges=False)
    assert result.passed, (result.broken, result.findings)
    layers = read_config(CHECKPOINTS["mllama"]).text.layers
    cross = read_config(CHECKPOINTS["mllama"]).text.cross_layers
    assert len(result.samples[0].layers) == layers - len(cross) and max(result.samples[0].layers) < TOLERANCE
    broken = copied(looking, tmp_path / "broken")
    manifest = open_artifact(broken).manifest
    spec = rank_weights(manifest.of_stage(1).weights, 4, 3)["text.norm.weight"]
    norm = np.memmap(broken / spec.file, spec.dtype, "r+", spec.offset, spec.shape)
    norm *= 2
    norm.flush()
    result = compared(reference, broken, samples_of("mllama")[-1:], with_edges=False)
    assert result.first is not None
    assert (result.first.stage, result.first.where, result.first.rank) == ("weights", "text.norm.weight", 1)


def test_a_fault_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that gets something else than what was handed on."""
    right = StageGroup.receive

    def wrong(self: StageGroup, array: np.ndarray, stage: int) -> None:
        right(self, array, stage)
        if array.ndim == 3:
            array[...] = np.roll(array, 1, axis=-1)

    expected = run_world(compiled("llava", tmp_path, 1, 2))
    monkeypatch.setattr(StageGroup, "receive", wrong)
    found = run_world(tmp_path)
    assert min(relative_error(*pair) for pair in zip(found, expected, strict=True)) > 100 * TOLERANCE


# --- What a stage holds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama", "qwen_vl"])
@pytest.mark.parametrize("pp", [1, 2])
def test_every_parameter_is_in_one_stage(family: str, pp: int) -> None:
    config = wide_config(family)
    held = [targets(config.of_stage(i, pp)) for i in range(pp)]
    names = Counter(name for each in held for name in each)
    assert set(names.values()) == {1} and {k: v for each in held for k, v in each.items()} == targets(config)
    assert all(name.startswith(("text.layers.", "cross.", "text.norm.", "text.lm_head.")) for name in held[-1] if pp > 1)
    assert "text.embed.weight" in held[0] and "text.lm_head.weight" in held[-1]


def test_cross_layers_go_with_what_makes_their_keys() -> None:
    """wide_config's layers 1 and 3 of four attend to images."""
    for stage, layer in ((0, 1), (1, 3)):
        names = targets(wide_config("mllama").of_stage(stage, 2))
        assert {name.split(".")[2] for name in names if ".attn.q_norm" in name} == {str(layer)}
        assert {name.split(".")[1] for name in names if name.startswith("cross.")} == {str(stage)}


def test_layers_are_shared_evenly() -> None:
    for count in (1, 2, 3, 7):
        ranges = [Stage(i, count).layers(40) for i in range(count)]
        assert [layer for each in ranges for layer in each] == list(range(40))
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize(
    ("pp", "cross_layers", "message"),
    [
        (0, (), "pipeline of 0 stages; expected a number from 1 on"),
        (5, (), "pipeline of 5 stages; every stage needs a layer that attends to the text, and this model has 4 layers"),
        (4, (1, 3), "pipeline of 4 stages; every stage needs a layer that attends to the text"),
    ],
)
def test_too_many_stages(pp: int, cross_layers: tuple[int, ...], message: str) -> None:
    config = read_config(EMBEDDED)
    config = replace(config, text=replace(config.text, cross_layers=cross_layers))
    with pytest.raises(PlanError, match=message):
        make_plan(config, Options(checkpoint=EMBEDDED, out=EMBEDDED, pp=pp))


def test_a_stage_is_fed_what_the_first_is(looking: Path) -> None:
    """So that one message serves all, whatever a stage has a use for."""
    manifest = open_artifact(looking).manifest
    first, second = (manifest.of_stage(stage) for stage in range(2))
    for mine, theirs in zip(first.graphs, second.graphs, strict=True):
        assert mine.name == theirs.name
        assert [s for s in mine.inputs if not is_cached(s.name)] == [s for s in theirs.inputs if not is_cached(s.name)]
        sent, received = ([s for s in g.plan if isinstance(s, Transfer)] for g in (mine, theirs))
        assert len(sent) == len(received) == (1 if mine.kind == "vision" else 2)
    assert manifest.ranks == 4 and first.cache.layers == second.cache.layers == 2

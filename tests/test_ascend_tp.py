"""Graphs of one rank with the collectives inside: ranks on the simulator, as threads in lockstep, against the whole model."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from staticvl.compiler import emit_ascend, emit_eager
from staticvl.compiler.eager import EagerBackend
from staticvl.runtime.artifact import ArtifactError, FileSpec, GraphSpec, Kind, Manifest, WeightSpec, rank_weights
from staticvl.runtime.ascend import torchair_host
from staticvl.runtime.ascend.kernel import ascend_facts
from staticvl.runtime.backends import ascend
from staticvl.runtime.backends.ascend import AscendBackend, open_ascend, simulated

from .lockstep import ArrayMember, Meeting, member_in, run_ranks
from .need_torchair import skip_without_torchair
from .rank_models import Model, feed, held, model_of, spec_of, steps, worst_errors
from .wide_models import write_random

skip_without_torchair()

WIDE = 1e-4  # of the largest magnitude, in float32
ROUNDED = 2e-2  # in length, in float16


def ascend_model(family: str, kv_heads: int, folder: Path = Path()) -> Model:
    """Heads as wide as the fused attention takes."""
    model = model_of(family, kv_heads, folder)
    return replace(model, config=replace(model.config, text=replace(model.config.text, head_dim=16)), backend="ascend")


def written(family: str, kv_heads: int, folder: Path) -> Model:
    model = ascend_model(family, kv_heads, folder)
    write_random(model.config, folder)
    return model


Graphs = tuple[dict[Kind, GraphSpec], dict[str, FileSpec]]


def compiled(model: Model, tp: int, *, eager: bool = False) -> Graphs:
    """One file of each graph, whatever the rank."""
    specs: dict[Kind, GraphSpec] = {}
    files: dict[str, FileSpec] = {}
    for kind, graph in model.define(tp).items():
        made = (emit_eager if eager else emit_ascend).emit(graph, "float16")
        file = f"{graph.name}-tp{tp}-{eager}"
        (model.out / file).write_bytes(made.data)
        files[file] = FileSpec(nbytes=len(made.data), sha256=hashlib.sha256(made.data).hexdigest())
        constants = {name: tuple(graph.constants[name].tolist()) for name in made.constants}
        specs[kind] = msgspec.structs.replace(spec_of(graph), file=file, weights=made.weights, constants=constants, eager=eager)
    return specs, files


def run(model: Model, graphs: Graphs, tp: int, weights: Mapping[str, WeightSpec], *, wide: bool) -> list[np.ndarray]:
    specs, files = graphs
    group = member_in(tp) if tp > 1 else None
    backend = AscendBackend(model.out, model.cache(tp), weights, files, simulated(wide=wide), group=group)
    return steps(backend, specs, list(backend.caches))


def alone(model: Model, *, wide: bool = True) -> list[np.ndarray]:
    """What the whole model's graphs find."""
    return run(model, compiled(model, 1), 1, model.converted(1, 0).weights, wide=wide)


def defined(model: Model) -> list[np.ndarray]:
    """What the whole model is defined to find."""
    graphs = model.define(1)
    backend = EagerBackend(model.out, model.converted(1, 0).weights, model.cache(1), lambda kind, *_: graphs[kind])
    found = steps(backend, {kind: spec_of(graph) for kind, graph in graphs.items()}, list(backend.caches))
    assert all(np.isfinite(each).all() and each.std() > 0 for each in found)
    return found


def results(model: Model, tp: int, graphs: Graphs | None = None, *, wide: bool = True) -> list[list[np.ndarray]]:
    """What every rank finds; graphs are compiled once, and weights found by those of rank 0."""
    stored = [model.converted(tp, rank) for rank in range(tp)]
    made = graphs or compiled(model, tp)
    return run_ranks(tp, lambda r: run(model, made, tp, rank_weights(stored[0].weights, tp, r), wide=wide))[0]


def distance(model: Model, ranks: list[list[np.ndarray]], whole: list[np.ndarray]) -> float:
    """The worst in length of any first output of any rank."""
    firsts, worst = len(whole) - len(model.cache(1).buffers()), 0.0
    for rank, found in enumerate(ranks):
        expected = held(model, whole, rank, len(ranks))
        pairs = zip(found[:firsts], expected[:firsts], strict=True)
        worst = max(worst, *(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs))
    return worst


def check_same_logits(model: Model, tp: int, ranks: list[list[np.ndarray]]) -> None:
    """To the bit: every rank samples the same token."""
    logits = [found[-1 - len(model.cache(tp).buffers())] for found in ranks]
    assert all(np.array_equal(each, logits[0]) for each in logits)


# --- Ranks on the simulator -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("llava", 2), ("mllama", 2), ("qwen_vl", 8)], ids=lambda param: param[0])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, kv_heads = request.param
    return written(family, kv_heads, tmp_path_factory.mktemp("ascend_tp"))


@pytest.fixture(scope="module")
def whole(model: Model) -> list[np.ndarray]:
    return defined(model)


@pytest.fixture(scope="module")
def graphs(model: Model) -> Graphs:
    return compiled(model, 2)


def test_ranks_compute_what_the_whole_model_computes(model: Model, whole: list[np.ndarray], graphs: Graphs) -> None:
    ranks = results(model, 2, graphs)
    errors = worst_errors(model, ranks, whole)
    assert len(errors) == len(whole) and max(errors) <= WIDE, errors
    check_same_logits(model, 2, ranks)


def test_in_16_bits(model: Model, whole: list[np.ndarray], graphs: Graphs) -> None:
    ranks = results(model, 2, graphs, wide=False)
    assert 1e-6 < distance(model, ranks, whole) <= ROUNDED
    check_same_logits(model, 2, ranks)


ONE_FAMILY = pytest.mark.parametrize("model", [("mllama", 2)], indirect=True, ids=["mllama"])


@ONE_FAMILY
def test_eager_programs(model: Model, whole: list[np.ndarray]) -> None:
    eager = compiled(model, 2, eager=True)
    assert max(worst_errors(model, results(model, 2, eager), whole)) <= WIDE
    ranks = results(model, 2, eager, wide=False)
    assert 1e-6 < distance(model, ranks, whole) <= ROUNDED
    check_same_logits(model, 2, ranks)


# --- What would be seen ------------------------------------------------------------------------------------------------------


def not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArrayMember, "all_reduce", lambda self, array: None)


def reversed_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ArrayMember.all_gather

    def reverse(self: ArrayMember, array: np.ndarray, out: np.ndarray) -> None:
        right(self, array, out)
        out[...] = np.concatenate(np.split(out, self.size, axis=-1)[::-1], axis=-1)

    monkeypatch.setattr(ArrayMember, "all_gather", reverse)


def weights_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.rank_weights", lambda weights, tp, rank: weights)


@ONE_FAMILY
@pytest.mark.parametrize("fault", [not_summed, reversed_gather, weights_of_rank_0])
def test_a_fault_is_seen(
    model: Model, whole: list[np.ndarray], graphs: Graphs, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None]
) -> None:
    fault(monkeypatch)
    assert max(worst_errors(model, results(model, 2, graphs), whole)) > 100 * WIDE


# --- What is written and opened ------------------------------------------------------------------------------------------


@ONE_FAMILY
def test_loading_needs_no_process_group(model: Model, graphs: Graphs) -> None:
    """Neither torch_npu nor a default group is there afterwards, and what torch says of groups is what it always says."""
    assert not torch.distributed.is_initialized() and "torch_npu" not in sys.modules
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        torch.distributed.get_rank()


@ONE_FAMILY
def test_a_file_names_ranks_and_nothing_of_a_process(model: Model, graphs: Graphs) -> None:
    """Loading on a card looks for the group of these ranks, whatever it is called there."""
    for spec in graphs[0].values():
        data = (model.out / spec.file).read_bytes()
        assert data.count(b"used_process_group = {'tag=;rank_list=0,1': ([0, 1], '')}") == 1
        assert b"_find_pg_by_ranks_and_tag(tag, rank_list)" in data


def test_the_default_group_is_what_such_a_file_finds_on_a_card() -> None:
    found = torch.distributed.distributed_c10d._find_pg_by_ranks_and_tag
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert found("", [0]) is torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()
    assert found("", [0]) is None


def manifest_of(model: Model, graphs: Graphs, tp: int) -> Manifest:
    """The fields that are read when an artifact is opened."""
    stored = [model.converted(tp, rank) for rank in range(tp)]
    files = {name: spec for each in stored for name, spec in each.files.items()}
    facts: Any = SimpleNamespace(
        ascend=ascend_facts(torchair_host.VERSION, torchair_host.SOCS[0]),
        tp=tp,
        cache=model.cache(tp),
        weights=stored[0].weights,
        files={**graphs[1], **files},
    )
    return facts


@ONE_FAMILY
def test_an_artifact_of_two_ranks(model: Model, whole: list[np.ndarray], graphs: Graphs, tmp_path: Path) -> None:
    """Each opens its own weights, and no other's."""
    manifest = manifest_of(model, graphs, 2)

    def work(rank: int) -> list[np.ndarray]:
        backend = open_ascend(model.out, manifest, "sim", member_in(2))
        return steps(backend, graphs[0], list(backend.caches))

    assert distance(model, run_ranks(2, work)[0], whole) <= ROUNDED
    copy = shutil.copytree(model.out, tmp_path / "artifact")
    for path in (copy / "weights" / "rank-1").glob("*.safetensors"):
        path.write_bytes(b"0" + path.read_bytes()[1:])
    open_ascend(copy, manifest, "sim", ArrayMember(Meeting(2), 0))
    with pytest.raises(ArtifactError, match="rank-1/.* is not the file that the manifest describes"):
        open_ascend(copy, manifest, "sim", ArrayMember(Meeting(2), 1))


@ONE_FAMILY
def test_a_rank_is_not_opened_alone(model: Model, graphs: Graphs) -> None:
    manifest = manifest_of(model, graphs, 2)
    for group, size in ((None, 1), (ArrayMember(Meeting(4), 0), 4)):
        with pytest.raises(ArtifactError, match=f"{model.out} is one rank's of 2, but runs in a group of {size}; open all 2"):
            open_ascend(model.out, manifest, "sim", group)
    eager, files = compiled(model, 2, eager=True)
    backend = AscendBackend(model.out, model.cache(2), model.converted(2, 0).weights, files, simulated())
    with pytest.raises(ArtifactError, match="one rank's of 2, but runs in a group of 1"):
        backend.run(eager["decode"], feed(eager["decode"], np.random.default_rng(0), [0, 0]))


def test_weights_of_a_rank() -> None:
    def spec(file: str) -> WeightSpec:
        return WeightSpec(file=file, dtype="float16", shape=(2,), offset=64, nbytes=4)

    assert rank_weights({"w": spec("weights/rank-0/a.safetensors")}, 4, 3) == {"w": spec("weights/rank-3/a.safetensors")}
    assert rank_weights({"w": spec("weights/a.safetensors")}, 1, 0) == {"w": spec("weights/a.safetensors")}


# --- On a card, with stand-ins ---------------------------------------------------------------------------------------------


@dataclass
class Carded(ArrayMember):
    """A member of a group with a store."""

    store: Any = None


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """torch_npu with two cards."""
    npu = SimpleNamespace(
        device_count=lambda: 2,
        set_device=lambda index: setattr(npu, "index", index),
        get_device_name=lambda _: "Ascend910B3",
        utils=SimpleNamespace(get_cann_version=lambda: "8.5"),
    )
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=npu))
    return npu


def test_a_rank_takes_the_card_of_its_place_on_the_machine(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_3 = ArrayMember(Meeting(4), 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ascend._card(ascend._ranks_card("npu", rank_3)) == (ascend.Device("npu:1"), "Ascend910B") and card.index == 1
    assert ascend._ranks_card("npu:0", rank_3) == "npu:0"
    assert ascend._ranks_card("npu", None) == ascend._ranks_card("npu", ArrayMember(Meeting(1), 0)) == "npu"
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ArtifactError, match="device npu:3 was asked for, but 2 Ascend cards are visible"):
        ascend._card(ascend._ranks_card("npu", rank_3))


def test_what_a_card_compiles_is_kept_by_rank(card: SimpleNamespace, tmp_path: Path) -> None:
    names = [ascend._keep(tmp_path, "Ascend910B", group).name for group in (None, ArrayMember(Meeting(2), 1))]
    assert names == ["Ascend910B-8.5", "Ascend910B-8.5-rank-1-of-2"]


def test_ranks_on_cards_agree_on_a_group_through_their_store(monkeypatch: pytest.MonkeyPatch) -> None:
    group, asked = Carded(Meeting(2), 1, torch.distributed.HashStore()), []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *given, **named: asked.append((given, named)))
    ascend._join(group)
    ((given, named),) = asked
    named.pop("store").set("place", "card")
    assert group.store.get("hccl/place") == b"card"
    assert (given, named) == (("hccl",), {"rank": 1, "world_size": 2})


def test_another_default_group_is_in_the_way() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(
            ArtifactError, match=r"over gloo as rank 0 of 1, but .* over hccl as rank 1 of 2; run them in a pro"
        ):
            ascend._join(Carded(Meeting(2), 1, None))
    finally:
        torch.distributed.destroy_process_group()


# --- Long proofs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize(
    ("family", "kv_heads"),
    [("llava", 8), ("llava", 2), ("llava", 1), ("mllama", 8), ("mllama", 2), ("mllama", 1), ("qwen_vl", 8)],
)
def test_every_cut(family: str, kv_heads: int, tp: int, tmp_path: Path) -> None:
    """Against the whole model's own graphs, compiled and op by op."""
    model = written(family, kv_heads, tmp_path)
    whole = alone(model)
    assert max(worst_errors(model, [whole], defined(model))) <= WIDE
    for eager in (False, True):
        graphs = compiled(model, tp, eager=eager)
        assert max(worst_errors(model, results(model, tp, graphs), whole)) <= WIDE
        assert distance(model, results(model, tp, graphs, wide=False), whole) <= ROUNDED


@pytest.mark.parametrize("family", ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mllama", "qwen_vl"))])
def test_in_8_bits_where_cuts_fall_between_blocks(family: str, tmp_path: Path) -> None:
    """Elsewhere ranks have blocks of their own, and so other roundings than the whole."""
    model = ascend_model(family, 8, tmp_path)
    text = replace(model.config.text, heads=4, kv_heads=4, intermediate_size=64)
    model = replace(model, config=replace(model.config, text=text), quant="w8a16")
    write_random(model.config, tmp_path)
    whole, graphs = defined(model), compiled(model, 2)
    assert max(worst_errors(model, results(model, 2, graphs), whole)) <= WIDE
    assert distance(model, results(model, 2, graphs, wide=False), whole) <= ROUNDED

"""Graphs of one rank with the collectives inside: ranks on the simulator, as threads in lockstep, against the whole model."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from staticvl.runtime.backends.ascend import backend as ascend
from staticvl.runtime.backends.ascend import process_groups, torchair_host
from staticvl.runtime.backends.ascend.backend import AscendBackend, open_ascend, simulated
from staticvl.runtime.backends.ascend.kernel import ascend_info
from staticvl.runtime.backends.base import Group
from staticvl.runtime.backends.ge_simulator.ge_graph import parse

from .lockstep import ArrayGroup, Counting, Lockstep, array_group, not_summed, reversed_gather, run_ranks
from .need_torchair import skip_without_torchair
from .rank_models import Model, communication, feed, held, model_of, steps, worst_errors
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


def compiled(model: Model, tp: int, *, eager: bool = False, fused: bool = False) -> Graphs:
    """One file of each graph, whatever the rank. `fused`: with the option that makes products and their sums one."""
    specs: dict[Kind, GraphSpec] = {}
    files: dict[str, FileSpec] = {}
    for kind, graph in model.define(tp).items():
        made = emit_eager.emit(graph, "float16") if eager else emit_ascend.emit(graph, "float16", fused_all_reduce=fused)
        file = f"{graph.name}-tp{tp}-{eager}-{fused}"
        (model.out / file).write_bytes(made.data)
        files[file] = FileSpec(nbytes=len(made.data), sha256=hashlib.sha256(made.data).hexdigest())
        constants = {name: tuple(graph.constants[name].tolist()) for name in made.constants}
        specs[kind] = msgspec.structs.replace(graph.spec(), file=file, weights=made.weights, constants=constants, eager=eager)
    return specs, files


def run(
    model: Model, graphs: Graphs, tp: int, weights: Mapping[str, WeightSpec], *, wide: bool, group: Group | None = None
) -> list[np.ndarray]:
    specs, files = graphs
    group = group or (array_group(tp) if tp > 1 else None)
    backend = AscendBackend(model.out, model.cache(tp), weights, files, simulated(wide=wide), group=group)
    return steps(backend, specs, list(backend.caches))


def alone(model: Model, *, wide: bool = True) -> list[np.ndarray]:
    """What the whole model's graphs find."""
    return run(model, compiled(model, 1), 1, model.converted(1, 0).weights, wide=wide)


def defined(model: Model) -> list[np.ndarray]:
    """What the whole model is defined to find."""
    graphs = model.define(1)
    backend = EagerBackend(model.out, model.converted(1, 0).weights, model.cache(1), lambda key: graphs[key.kind])
    found = steps(backend, {kind: graph.spec() for kind, graph in graphs.items()}, list(backend.caches))
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


MODELS = [
    pytest.param(("llava", 2), marks=pytest.mark.slow),
    ("mllama", 2),
    pytest.param(("qwen_vl", 8), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=MODELS, ids=["llava", "mllama", "qwen_vl"])
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


@pytest.mark.parametrize("model", [("mllama", 2)], indirect=True, ids=["mllama"])
def test_products_that_are_summed_by_their_operator(model: Model, whole: list[np.ndarray]) -> None:
    graphs = compiled(model, 2, fused=True)
    errors = worst_errors(model, results(model, 2, graphs), whole)
    assert len(errors) == len(whole) and max(errors) <= WIDE, errors
    ranks = results(model, 2, graphs, wide=False)
    assert 1e-6 < distance(model, ranks, whole) <= ROUNDED
    check_same_logits(model, 2, ranks)


def test_communication_is_what_was_counted(model: Model, graphs: Graphs) -> None:
    """In 16 bits; between simulators it travels in 32."""
    stored = [model.converted(2, rank) for rank in range(2)]

    def work(rank: int) -> tuple[int, int]:
        group = array_group(2, Counting)
        run(model, graphs, 2, stored[rank].weights, wide=False, group=group)
        return group.calls, group.nbytes // 2

    assert run_ranks(2, work)[0] == [communication(model.define(2), "float16")] * 2


ONE_FAMILY = pytest.mark.parametrize("model", [("mllama", 2)], indirect=True, ids=["mllama"])


@pytest.fixture(scope="module")
def eager(model: Model) -> Graphs:
    return compiled(model, 2, eager=True)


@ONE_FAMILY
def test_eager_programs(model: Model, whole: list[np.ndarray], eager: Graphs) -> None:
    assert max(worst_errors(model, results(model, 2, eager), whole)) <= WIDE
    ranks = results(model, 2, eager, wide=False)
    assert 1e-6 < distance(model, ranks, whole) <= ROUNDED
    check_same_logits(model, 2, ranks)


# --- What would be seen ------------------------------------------------------------------------------------------------------


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


class LoadedError(Exception):
    """Nothing is run."""


@ONE_FAMILY
def test_a_loaded_graph_calls_its_group_what_the_communicator_is_called(
    model: Model, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which another process may have called otherwise."""
    monkeypatch.setattr(process_groups._NamedGroup, "get_hccl_comm_name", lambda *_, init_comm: f"card {init_comm}")
    loaded = []

    def executor(data: bytes) -> Any:
        loaded.append(parse(data))
        raise LoadedError

    device = ascend.Device("cpu", lambda _group: torchair_host.load().running_on(executor))
    backend = AscendBackend(model.out, model.cache(2), model.converted(2, 0).weights, graphs[1], device)
    with pytest.raises(LoadedError):
        backend.run(graphs[0]["decode"], feed(graphs[0]["decode"], np.random.default_rng(0), [0, 0]))
    meets = [node.attributes["group"] for node in loaded[0].nodes if node.type.startswith("Hcom")]
    assert len(meets) > 2 and set(meets) == {"card True"}


def manifest_of(model: Model, graphs: Graphs, tp: int) -> Manifest:
    """The fields that are read when an artifact is opened."""
    stored = [model.converted(tp, rank) for rank in range(tp)]
    files = {name: spec for each in stored for name, spec in each.files.items()}
    info: Any = SimpleNamespace(
        ascend=ascend_info(torchair_host.VERSION, torchair_host.SOCS[0]),
        tp=tp,
        ranks=tp,
        cache=model.cache(tp),
        weights=stored[0].weights,
        files={**graphs[1], **files},
    )
    return info


@ONE_FAMILY
def test_an_artifact_of_two_ranks(model: Model, whole: list[np.ndarray], graphs: Graphs, tmp_path: Path) -> None:
    """Each opens its own weights, and no other's."""
    manifest = manifest_of(model, graphs, 2)

    def work(rank: int) -> list[np.ndarray]:
        backend = open_ascend(model.out, manifest, "sim", array_group(2))
        return steps(backend, graphs[0], list(backend.caches))

    assert distance(model, run_ranks(2, work)[0], whole) <= ROUNDED
    copy = shutil.copytree(model.out, tmp_path / "artifact")
    for path in (copy / "weights" / "rank-1").glob("*.safetensors"):
        path.write_bytes(b"0" + path.read_bytes()[1:])
    open_ascend(copy, manifest, "sim", ArrayGroup(Lockstep(2), 0))
    with pytest.raises(ArtifactError, match=r"rank-1/.* is not the file that the manifest describes"):
        open_ascend(copy, manifest, "sim", ArrayGroup(Lockstep(2), 1))


@ONE_FAMILY
def test_a_rank_is_not_opened_alone(model: Model, graphs: Graphs, eager: Graphs) -> None:
    manifest = manifest_of(model, graphs, 2)
    for group, size in ((None, 1), (ArrayGroup(Lockstep(4), 0), 4)):
        with pytest.raises(ArtifactError, match=f"{model.out} is for one of 2 ranks, but its group has {size}; open all 2"):
            open_ascend(model.out, manifest, "sim", group)
    for specs, files in (graphs, eager):
        backend = AscendBackend(model.out, model.cache(2), model.converted(2, 0).weights, files, simulated())
        with pytest.raises(ArtifactError, match="for one of 2 ranks, but its group has 1"):
            backend.run(specs["decode"], feed(specs["decode"], np.random.default_rng(0), [0, 0]))


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
    """Elsewhere ranks have blocks of their own, and so other roundings than the whole; so do layers with one scale a column."""
    model = ascend_model(family, 8, tmp_path)
    text = replace(model.config.text, heads=4, kv_heads=4, intermediate_size=64)
    model = replace(model, config=replace(model.config, text=text), quant="w8a16+float-head")
    write_random(model.config, tmp_path)
    whole, graphs = defined(model), compiled(model, 2)
    assert max(worst_errors(model, results(model, 2, graphs), whole)) <= WIDE
    assert distance(model, results(model, 2, graphs, wide=False), whole) <= ROUNDED

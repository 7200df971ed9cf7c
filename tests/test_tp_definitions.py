"""Ranks together compute what the whole model computes: weights cut by the converter, definitions of one rank, in lockstep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from staticvl.compiler.cost import _calls
from staticvl.compiler.eager import EagerBackend
from staticvl.compiler.graphs import GraphDef
from staticvl.model_defs import ops
from staticvl.model_defs.config import ModelConfig
from staticvl.model_defs.group import in_group
from staticvl.model_defs.layers import RowParallelLinear
from staticvl.runtime.artifact import Kind
from staticvl.weights import convert as convert_module
from staticvl.weights.convert import Converted
from staticvl.weights.shard import rank_span, rank_targets
from staticvl.weights.storage import QUANTS, stored_targets

from .lockstep import Lockstep, TensorGroup, run_ranks
from .rank_models import Model, model_of, steps, worst_errors
from .wide_models import write_random

TP = (1, 2, 4, 8)
# Each family; heads of keys that are cut (8), shared by some ranks (2) and by all of them (1).
MODELS = [("llava", 2), ("llava_next", 2), ("mllama", 1), ("qwen_vl", 8)]
MORE_MODELS = [("llava", 8), ("llava", 1), ("mllama", 8), ("mllama", 2)]
TOLERANCE = 1e-5


def named(model: tuple[str, int], *marks: pytest.MarkDecorator) -> ParameterSet:
    return pytest.param(model, marks=marks, id=f"{model[0]}-{model[1]}")


@pytest.fixture(scope="module", params=[*map(named, MODELS), *(named(each, pytest.mark.slow) for each in MORE_MODELS)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, kv_heads = request.param
    model = model_of(family, kv_heads, tmp_path_factory.mktemp("tp"))
    write_random(model.config, model.folder)
    return model


# --- What is run -----------------------------------------------------------------------------------------------------------


def run_all(model: Model, graphs: dict[Kind, GraphDef], stored: Converted, tp: int) -> list[np.ndarray]:
    backend = EagerBackend(model.out, stored.weights, model.cache(tp), lambda key: graphs[key.kind])
    return steps(backend, {kind: graph.spec() for kind, graph in graphs.items()}, list(backend.caches))


def results(model: Model, tp: int) -> list[list[np.ndarray]]:
    """What every rank has found."""
    stored = [model.converted(tp, rank) for rank in range(tp)]

    def work(rank: int) -> list[np.ndarray]:
        return run_all(model, model.define(tp), stored[rank], tp)

    return run_ranks(tp, work)[0]


def errors(model: Model, tp: int, whole: list[np.ndarray]) -> list[float]:
    return worst_errors(model, results(model, tp), whole)


@pytest.fixture(scope="module")
def whole(model: Model) -> list[np.ndarray]:
    return alone(model)


def alone(model: Model) -> list[np.ndarray]:
    """What the model finds that is not cut."""
    found = run_all(model, model.define(1), model.converted(1, 0), 1)
    assert all(np.isfinite(each).all() and each.std() > 0 for each in found)
    return found


@pytest.mark.parametrize("tp", TP)
def test_ranks_compute_what_the_whole_model_computes(model: Model, whole: list[np.ndarray], tp: int) -> None:
    found = errors(model, tp, whole)
    assert len(found) == len(whole) and max(found) <= TOLERANCE, found


@pytest.mark.parametrize("family", ["llava", "mllama", "qwen_vl"])
def test_in_8_bits_where_cuts_fall_between_blocks(family: str, tmp_path: Path) -> None:
    """Elsewhere ranks have blocks of their own, and so other roundings than the whole."""
    model = model_of(family, 8, tmp_path)
    model = replace(model, config=replace(model.config, text=replace(model.config.text, intermediate_size=64)), quant="w8a16")
    write_random(model.config, tmp_path)
    assert max(errors(model, 2, alone(model))) <= TOLERANCE


# --- What would be seen ----------------------------------------------------------------------------------------------------


def reversed_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TensorGroup.all_gather
    monkeypatch.setattr(TensorGroup, "all_gather", lambda self, x: torch.cat(right(self, x).chunk(self.size, -1)[::-1], dim=-1))


def bias_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowParallelLinear, "forward", lambda self, x: ops.all_reduce(self.product(x, self.bias), self.ranks))


def shifted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rank of all gets rows of its neighbour in one layer."""

    def shifted(config: ModelConfig, name: str, shape: tuple[int, ...], tp: int, rank: int) -> tuple[int, int]:
        first, stop = rank_span(config, name, shape, tp, rank)
        return (first - 1, stop - 1) if rank == tp - 1 and name == "text.layers.1.mlp.up.weight" else (first, stop)

    monkeypatch.setattr(convert_module, "rank_span", shifted)


def neighbours_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank gets the keys of the rank before it."""

    def shifted(config: ModelConfig, name: str, shape: tuple[int, ...], tp: int, rank: int) -> tuple[int, int]:
        return rank_span(config, name, shape, tp, (rank - 1) % tp if name.endswith("attn.k.weight") else rank)

    monkeypatch.setattr(convert_module, "rank_span", shifted)


@pytest.mark.parametrize("model", [("mllama", 2), ("qwen_vl", 8)], indirect=True, ids=["mllama", "qwen_vl"])
@pytest.mark.parametrize("fault", [reversed_gather, bias_on_every_rank, shifted_rows, neighbours_head])
def test_a_fault_is_seen(
    model: Model, whole: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], tmp_path: Path
) -> None:
    fault(monkeypatch)
    assert max(errors(replace(model, out=tmp_path), 4, whole)) > 100 * TOLERANCE


# --- What a graph is made of ----------------------------------------------------------------------------------------------

FAMILIES = [("llava", 2), ("llava_next", 8), ("mllama", 2), ("qwen_vl", 8)]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda param: param[0])
def sizes(request: pytest.FixtureRequest) -> Model:
    return model_of(*request.param)


def collectives(graph: GraphDef) -> Counter[str]:
    names = (name for name, _ in _calls(graph))
    return Counter(name.removeprefix(f"{ops.NAMESPACE}.") for name in names if name.endswith(ops.COLLECTIVES))


def test_a_whole_model_never_meets_anyone(sizes: Model) -> None:
    assert not any(collectives(graph) for graph in sizes.define(1).values())


# Twice in each layer of a tower; then a summed projector, or one that is joined after a looked-up table or a joined input.
VISION_MEETS = {
    "llava": {"all_reduce": 2 * 2 + 1},
    "llava_next": {"all_reduce": 2 * 2 + 1},
    "mllama": {"all_reduce": 2 * (3 + 2), "all_gather": 2},
    "qwen_vl": {"all_reduce": 2 * 2 + 1, "all_gather": 2},
}


def test_where_ranks_meet(sizes: Model) -> None:
    graphs, config = sizes.define(2), sizes.config
    for kind in ("prefill", "decode"):  # the embedding and the logits are joined
        assert collectives(graphs[kind]) == {"all_reduce": 2 * config.text.layers, "all_gather": 2}
    assert collectives(graphs["vision"]) == VISION_MEETS[config.family]


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("quant", [*QUANTS, "w4a16-g32-asym+float-head"])
def test_modules_hold_what_a_rank_is_given(sizes: Model, tp: int, quant: str) -> None:
    found: dict[str, tuple[int, ...]] = {}
    for graph in replace(sizes, quant=quant).define(tp).values():
        found |= {name: tuple(p.shape) for name, p in graph.module.named_parameters() if name not in graph.constants}
    assert found == {name: stored.shape for name, stored in stored_targets(sizes.config, quant, tp=tp).items()}
    if quant == "none":
        assert found == rank_targets(sizes.config, tp)


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_caches_of_all_ranks_are_the_cache(kv_heads: int) -> None:
    """Or as many copies of a head as there are ranks that share it."""
    sizes = model_of("mllama", kv_heads)
    for tp in TP:
        assert sizes.cache(tp).kv_heads == max(1, kv_heads // tp)
        assert tp * sizes.cache(tp).nbytes == max(1, tp // kv_heads) * sizes.cache(1).nbytes


# --- Groups -----------------------------------------------------------------------------------------------------------------


def test_joined_and_summed() -> None:
    def work(rank: int) -> Any:
        x = torch.arange(6.0).view(2, 3) + 10 * rank
        return ops.all_reduce(x, 4), ops.all_gather(x, 4)

    found, calls = run_ranks(4, work)
    base = torch.arange(6.0).view(2, 3)
    for total, joined in found:
        assert torch.equal(total, 4 * base + 60)
        assert torch.equal(joined, torch.cat([base + 10 * rank for rank in range(4)], dim=1))
    assert calls == ["all_reduce", "all_gather"]


def test_alone_both_are_the_identity() -> None:
    x = torch.randn(2, 3)
    for op in (ops.all_reduce, ops.all_gather):
        assert torch.equal(op(x, 1), x) and op(x, 1).data_ptr() != x.data_ptr()


def test_a_part_of_a_model_does_not_run_by_itself() -> None:
    x = torch.randn(2, 3)
    for op in (ops.all_reduce, ops.all_gather):
        with pytest.raises(ValueError, match="for one of 2 ranks, but its group has 1; run all ranks together"):
            op(x, 2)
        with in_group(TensorGroup(Lockstep(4), 0)), pytest.raises(ValueError, match="of 2 ranks, but its group has 4"):
            op(x, 2)


def test_what_a_rank_raises_reaches_the_test() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise KeyError("broken")
        ops.all_reduce(torch.ones(2), 2)

    with pytest.raises(KeyError, match="broken"):
        run_ranks(2, work)


def test_shapes_of_collectives_are_known_without_running() -> None:
    for op in (ops.all_reduce, ops.all_gather):
        torch.library.opcheck(op, (torch.randn(2, 3), 1))
    assert ops.all_gather(torch.empty(2, 3, device="meta"), 4).shape == (2, 12)

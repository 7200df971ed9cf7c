"""Graphs of one rank with the collectives inside: ranks on the simulator, as threads in lockstep, against the whole model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from staticvl.compiler import emit_ascend, emit_eager
from staticvl.compiler.eager import EagerBackend
from staticvl.runtime.artifact import FileSpec, GraphSpec, Kind, WeightSpec, rank_weights
from staticvl.runtime.backends.ascend import AscendBackend, simulated

from .lockstep import member_in, run_ranks
from .need_torchair import skip_without_torchair
from .rank_models import Model, held, model_of, spec_of, steps, worst_errors
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


@pytest.mark.parametrize("model", [("mllama", 2)], indirect=True, ids=["mllama"])
def test_eager_programs(model: Model, whole: list[np.ndarray]) -> None:
    eager = compiled(model, 2, eager=True)
    assert max(worst_errors(model, results(model, 2, eager), whole)) <= WIDE
    ranks = results(model, 2, eager, wide=False)
    assert 1e-6 < distance(model, ranks, whole) <= ROUNDED
    check_same_logits(model, 2, ranks)


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

"""Costs of sizes that nobody measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from staticvl.runtime.artifact import open_artifact
from staticvl.tools.cards import CARDS
from staticvl.tools.tuning.bucket_sizes import MAX_SIZES, candidate_sizes, powers_of_two
from staticvl.tools.tuning.costs import (
    Costs,
    costs_yaml,
    line_through,
    manifest_lines,
    manifest_points,
    measured_costs,
    parse_costs,
)
from staticvl.tools.tuning.curves import CostError, fit
from staticvl.tools.tuning.target import from_artifact, from_checkpoint

from .conftest import EMBEDDED

POINTS = st.dictionaries(st.integers(1, 300), st.integers(1, 999).map(lambda n: n / 4), min_size=1, max_size=8)


def test_straight_between_measured_sizes() -> None:
    curve = fit({16: 10.0, 64: 22.0, 128: 60.0})
    assert [curve(size) for size in (16, 40, 64, 96, 128)] == [10.0, 16.0, 22.0, 41.0, 60.0]
    assert curve(8) == 8.0 and curve.fixed == 6.0  # along the first line
    assert curve(256) == 60.0 + 38.0 * 2  # along the last


def test_nothing_costs_less_than_nothing() -> None:
    """The first line would meet size 0 below 0."""
    curve = fit({16: 1.0, 64: 22.0})
    assert curve.fixed == 0.0 and curve(8) == 0.5


def test_one_measured_size() -> None:
    assert fit({16: 8.0})(32) == 16.0


def test_costs_that_fall_are_noise() -> None:
    curve = fit({16: 10.0, 32: 30.0, 64: 20.0, 128: 25.0, 256: 50.0})
    assert curve.costs == (10.0, 25.0, 25.0, 25.0, 50.0)


@given(points=POINTS)
def test_larger_sizes_never_cost_less(points: dict[int, float]) -> None:
    curve = fit(points)
    costs = [curve(size) for size in range(1, 400)]
    assert all(cost > 0 for cost in costs)
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(costs))
    rising = [points[size] for size in sorted(points)]
    if rising == sorted(set(rising)):
        assert all(curve(size) == pytest.approx(cost) for size, cost in points.items())


def test_a_decode_step_is_a_prefill_of_one_token() -> None:
    costs = measured_costs({("prefill", 0): {16: 20.0, 32: 28.0}, ("decode", 0): {1: 9.0}}, "here")
    assert costs.ms("prefill", 1) == 9.0 and costs.ms("prefill", 16) == 20.0
    slower = measured_costs({("prefill", 0): {16: 20.0, 32: 28.0}, ("decode", 0): {1: 29.0}}, "here")
    assert slower.ms("prefill", 1) == 12.5  # a step that took longer than 16 tokens says nothing


def test_variants_and_kinds() -> None:
    costs = measured_costs({("prefill", 0): {16: 1.0}, ("prefill", 1): {16: 2.0}, ("prefill", 4): {16: 4.0}}, "here")
    assert [costs.ms("prefill", 16, images) for images in (0, 1, 2, 4, 9)] == [1.0, 2.0, 4.0, 4.0, 4.0]
    with pytest.raises(CostError, match="there are no costs of vision graphs"):
        costs.ms("vision", 1)


def test_a_table() -> None:
    costs = parse_costs({"prefill": {16: 4, 64: 9.5}, "decode": {1: 2.0}}, "costs.yaml")
    assert costs.ms("prefill", 64) == 9.5 and "costs.yaml" in costs.source


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected a mapping with some of the keys"),
        ({}, "expected a mapping with some of the keys"),
        ({"encode": {1: 2}}, "expected a mapping with some of the keys"),
        ({"past_ms": 1.0}, "expected a mapping with some of the keys"),
        ({"prefill": {1: 1.0}, "past_ms": -1}, "past_ms is -1; expected milliseconds"),
        ({"prefill": 5}, "prefill is 5; expected a mapping"),
        ({"prefill": {"a": 5}}, "expected a mapping of size"),
        ({"prefill": {1: "a"}}, "expected a mapping of size"),
        ({"prefill": {True: 1.0}}, "expected a mapping of size"),
        ({"prefill": {}}, "prefill: no costs were given"),
        ({"prefill": {0: 1.0}}, "size 0 costs 1.0 ms; expected a positive size"),
        ({"prefill": {1: 0.0}}, "expected a positive size and a positive cost"),
        ({"prefill": {1: float("nan")}}, "expected a positive size and a positive cost"),
    ],
)
def test_what_is_no_table(data: object, message: str) -> None:
    with pytest.raises(CostError, match=message):
        parse_costs(data, "costs.yaml")


def test_a_saved_table_is_read_again() -> None:
    before = measured_costs({("prefill", 0): {16: 4.125, 64: 9.5}, ("decode", 0): {1: 2.0}}, "here", 1.5e-4)
    after = parse_costs(yaml.safe_load(costs_yaml(before)), "costs.yaml")
    assert after.past_ms == 1.5e-4
    assert all(after.ms(kind, size) == before.ms(kind, size) for kind in ("prefill", "decode") for size in (1, 20, 64, 100))  # type: ignore[arg-type]
    with pytest.raises(CostError, match="counted, not measured"):
        costs_yaml(Costs("a bound", {("prefill", 0): float}))


# --- From an artifact and from a checkpoint ------------------------------------------------------------------------------


def test_an_artifacts_costs(embedded_artifact: Path) -> None:
    manifest = open_artifact(embedded_artifact).manifest
    target = from_artifact(embedded_artifact, None, 0.0, 0, None)
    costs = target.costs(512, 4)
    points = manifest_points(manifest)
    assert set(points) == {("prefill", 0), ("decode", 0), ("vision", 0)}
    assert points["prefill", 0] == {graph.bucket: graph.cost_ms for graph in manifest.graphs if graph.kind == "prefill"}
    assert costs.ms("decode", 4) > 0 and not target.crossed
    cache = manifest.cache
    held = target.nbytes(cache.context, cache.slots, cache.rows - cache.context, 0)
    assert held == cache.nbytes + sum(weight.nbytes for weight in manifest.weights.values())


def test_measured_again(embedded_artifact: Path) -> None:
    target = from_artifact(embedded_artifact, None, 0.0, 2, 1)
    costs = target.costs(512, 4)
    assert costs.past_ms >= 0 and "measured now" in costs.source
    assert all(costs.ms(kind, size) > 0 for kind, size in (("prefill", 8), ("decode", 1), ("vision", 1)))


def test_a_cards_costs_are_those_that_show_prints(embedded_artifact: Path) -> None:
    """Operations and bytes are straight lines in the size, so a graph between two others is met exactly."""
    manifest, card = open_artifact(embedded_artifact).manifest, CARDS["310P"]
    costs = from_artifact(embedded_artifact, "310P", 0.25, 0, None).costs(512, 4)
    for graph in manifest.graphs:
        assert costs.ms(graph.kind, graph.bucket) == pytest.approx(card.bound_ms(graph.flops, graph.nbytes) + 0.25, rel=1e-6)
    between = manifest_lines(manifest)["decode", 0]
    middle = manifest.graph("decode", 2)
    assert between.flops[0] + 2 * between.flops[1] == pytest.approx(middle.flops)
    assert between.nbytes[0] + 2 * between.nbytes[1] == pytest.approx(middle.nbytes)


def test_a_checkpoint_costs_what_its_artifact_would(embedded_artifact: Path) -> None:
    """Counted from the definitions with the same cache; float32, as the artifact has it."""
    target = from_checkpoint(str(EMBEDDED), "910B", 0.0, quant="none", dtype="float32", vision_tower=None)
    counted = target.costs(512 - 8, 8)  # rows 16 more than the context, where the artifact has 8
    card = from_artifact(embedded_artifact, "910B", 0.0, 0, None)
    for kind, size in (("prefill", 8), ("prefill", 32), ("decode", 4), ("vision", 2)):
        assert counted.ms(kind, size) == pytest.approx(card.costs(512, 4).ms(kind, size), rel=1e-6)  # type: ignore[arg-type]
    assert (target.weight_bytes, target.row_bytes) == (card.weight_bytes, card.row_bytes)
    assert target.max_positions and target.info == card.info


def test_a_line_through_one_point() -> None:
    line = line_through([(4, 100, 50)])
    assert line.flops == (0.0, 25.0) and line.nbytes == (50, 0.0)


# --- Candidates ----------------------------------------------------------------------------------------------------------


def test_candidates() -> None:
    lengths = dict.fromkeys(range(1, 4000), 1)
    sizes = candidate_sizes(lengths, 16, 2048)
    assert len(sizes) <= MAX_SIZES and sizes[0] == 16 and sizes[-1] == 2048
    assert all(size % 16 == 0 for size in sizes)
    assert set(powers_of_two(16, 2048)) <= set(sizes)
    assert candidate_sizes({20: 1}, 16, 2048) == [16, 32]  # nothing above what the longest prompt takes


def test_many_prompts_of_one_length_make_a_candidate() -> None:
    """As images of 576 tokens with little text do."""
    lengths = {**dict.fromkeys(range(1, 2000), 1), 590: 500, 1166: 300}
    assert {592, 1168} <= set(candidate_sizes(lengths, 16, 2048))
    assert not {592, 1168} <= set(candidate_sizes(dict.fromkeys(range(1, 2000), 1), 16, 2048))


def test_powers_of_two() -> None:
    assert powers_of_two(16, 1000) == [16, 32, 64, 128, 256, 512, 1024]
    assert powers_of_two(16, 1024)[-1] == 1024 and powers_of_two(16, 1025)[-1] == 2048
    assert powers_of_two(16, 5) == [16]

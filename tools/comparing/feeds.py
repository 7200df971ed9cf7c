"""The feeds of runs, whole, against those that prompts and answers require (expected_inputs.py), not against the engine's own.

B rows, T tokens, n images of t tiles each, P rows of features a tile, C hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.artifact import CROSS_HIDDEN, GraphSpec
from ...runtime.backends.base import Feed
from ...runtime.engine.engine import GraphRun
from ...runtime.engine.request import Sequence as Request
from .expected_inputs import ExpectedInputs
from .findings import Finding
from .metrics import relative_error
from .static_side import StaticPrepared, StaticSide

PER_POSITION = 3e-7  # by which an angle in float32 may be off, over its position


@dataclass(frozen=True, slots=True, eq=False)
class FedRun:
    """One run of a graph as it was fed. `features`: those of its first request, [tiles * P, C]."""

    graph: GraphSpec
    feed: Feed
    image: int
    count: int  # real tokens, tiles or rows
    requests: tuple[Request, ...]
    slots: tuple[int, ...]
    features: np.ndarray | None


@contextlib.contextmanager
def fed_runs(side: StaticSide) -> Iterator[list[FedRun]]:
    """A list that gains every run of a side until the context ends."""
    runs: list[FedRun] = []

    def watch(run: GraphRun) -> None:
        step = run.step
        features = step.sequences[0].features.copy() if step.kind == "prefill" and "image_rows" in run.feed else None
        feed = {name: array.copy() for name, array in run.feed.items()}
        slots = tuple(-1 if each.slot is None else each.slot for each in step.sequences)
        graph = side.engine.graphs[step.graph_key]
        runs.append(FedRun(graph, feed, run.image, step.count, step.sequences, slots, features))

    side.engine.on_run = watch
    try:
        yield runs
    finally:
        side.engine.on_run = None


@dataclass(slots=True, eq=False)
class _Progress:
    """How far a request is, counted here."""

    expected: ExpectedInputs
    answer: np.ndarray
    tiles: int = 0
    position: int = 0
    generated: int = 0


class FeedCheck:
    """The check of all runs of requests. `limit`: see Thresholds.inputs."""

    def __init__(
        self, side: StaticSide, prompts: Sequence[StaticPrepared], answers: Sequence[np.ndarray], limit: float
    ) -> None:
        self.side, self.limit = side, limit
        self.progress = {
            id(prepared.prompt): _Progress(expected_of(prepared), answer)
            for prepared, answer in zip(prompts, answers, strict=True)
        }

    def findings(self, runs: Sequence[FedRun]) -> list[Finding]:
        """The first wrong feed of each name."""
        findings: dict[str, Finding] = {}
        for run in runs:
            if run.graph.kind == "verify" or any(id(each.prompt) not in self.progress for each in run.requests):
                continue
            for name, right, value, where in self._pairs(run):
                if name not in findings and (finding := self._finding(run, name, right, value, where)):
                    findings[name] = finding
        return list(findings.values())

    def _pairs(self, run: FedRun) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
        """Name, required value, value, and place of what a run was fed."""
        if run.graph.kind == "vision":
            yield from self._vision(run, self.progress[id(run.requests[0].prompt)])
        elif run.graph.kind == "prefill":
            yield from self._prefill(run, self.progress[id(run.requests[0].prompt)])
        else:
            rows = range(len(run.requests)) if "block_table" in run.feed else run.slots
            for row, request in zip(rows, run.requests, strict=True):
                yield from self._decode(run, row, request)

    def _vision(self, run: FedRun, progress: _Progress) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
        expected, start = progress.expected, progress.tiles
        where = f"for tile {start}"
        yield "pixels", expected.prompt.pixels[start : start + run.count], run.feed["pixels"][: run.count], where
        if "aspect_id" in run.feed:
            image = start // expected.info.image.tiles
            yield "tile_count", np.array([expected.tile_counts[image]]), run.feed["tile_count"], f"for image {image}"
            yield "aspect_id", np.array([expected.aspect_ids[image]]), run.feed["aspect_id"], f"for image {image}"
            yield "image number", np.array([image]), np.array([run.image]), f"for image {image}"
        progress.tiles += run.count

    def _prefill(self, run: FedRun, progress: _Progress) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
        expected, start = progress.expected, progress.position
        count = min(run.graph.bucket, expected.prompt.length - start)
        span, where = slice(start, start + count), f"after {start} tokens"
        yield "token_ids", expected.prompt.token_ids[span], run.feed["token_ids"][0, :count], where
        yield "last_index", np.array([count - 1]), run.feed["last_index"], where
        yield from self._positions(run, 0, np.arange(start, start + count), progress, where)
        if "row_index" in run.feed and expected.rows is not None:
            rows = expected.rows[span]
            taken = rows[rows >= 0]
            index = np.where(rows >= 0, np.cumsum(rows >= 0) - 1, -1)
            yield "row_index", index, run.feed["row_index"][0, :count], where
            if run.features is not None and len(taken) and taken.max() < len(run.features):
                yield "image_rows", run.features[taken], run.feed["image_rows"][: len(taken)], where
        progress.position += count

    def _decode(self, run: FedRun, row: int, request: Request) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
        progress = self.progress[id(request.prompt)]
        where = f"after {progress.position} tokens"
        token = progress.answer[progress.generated : progress.generated + 1]
        yield "token_ids", token, run.feed["token_ids"][row], where
        yield from self._positions(run, row, np.array([progress.position]), progress, where)
        progress.position += 1
        progress.generated += 1

    def _positions(
        self, run: FedRun, row: int, positions: np.ndarray, progress: _Progress, where: str
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
        """What prefill and decode are both fed, by position."""
        expected, feed, count = progress.expected, run.feed, len(positions)
        yield "lengths", positions[:1], feed["lengths"][row : row + 1], where
        cos, sin = expected.rope(positions, expected.prompt.ntk)
        yield "rope_cos", cos, feed["rope_cos"][row, :count], where
        yield "rope_sin", sin, feed["rope_sin"][row, :count], where
        if "query_scale" in feed:
            yield "query_scale", expected.query_scales(positions), feed["query_scale"][row, :count, 0], where
        if "cross_mask" in feed:
            seen = np.minimum(positions, expected.prompt.length - 1)  # an answer sees what the last token of the prompt sees
            tiles = feed["cross_mask"].shape[-1]
            visible, gates = np.zeros((count, tiles), bool), np.zeros((count, 2))
            if expected.grids:
                visible[:, : expected.visible.shape[1]] = expected.visible[seen]
                gates[:] = expected.gates[seen]
            yield "cross_mask", np.where(visible, 0, CROSS_HIDDEN), feed["cross_mask"][row, :count], where
            yield "cross_gate", gates, feed["cross_gate"][row, :count], where

    def _finding(self, run: FedRun, name: str, right: np.ndarray, value: np.ndarray, where: str) -> Finding | None:
        right, value = np.asarray(right, np.float64), np.asarray(value, np.float64)
        limit = self.limit
        if name.startswith("rope"):
            limit += PER_POSITION * float(max((each.position for each in self.progress.values()), default=0))
        if right.shape == value.shape and relative_error(right, value) <= limit:
            return None
        graph = run.graph.name
        if value.size == 1 and right.size == 1:
            text = f"{graph} was fed {name} {value.item():.6g} {where}, where {right.item():.6g} is right"
        elif right.shape != value.shape:
            text = f"{graph} was fed {name} of {list(value.shape)} {where}, where {list(right.shape)} is right"
        else:
            at = [int(i) for i in np.argwhere(np.abs(right - value) > limit * max(np.abs(right).max(), 1e-30))[0]]
            pair = f"{value[tuple(at)]:.6g}, where {right[tuple(at)]:.6g} is right"
            text = f"{graph} was fed {name} {list(value.shape)} {where} that differs, first at {at}: {pair}"
        return Finding(stage="feeds", where=name, text=text, graph=graph, shape=value.shape)


def expected_of(prepared: StaticPrepared) -> ExpectedInputs:
    return ExpectedInputs(prepared.prompt, prepared.info, prepared.head_dim)


def check_prompt(prepared: StaticPrepared, label: str) -> list[Finding]:
    """Findings for what a processor made of a prompt, where that is not what its token ids and images require."""
    expected, prompt = expected_of(prepared), prepared.prompt
    pairs: list[tuple[str, np.ndarray, np.ndarray]] = []
    if expected.rows is None:
        count = int((prompt.rows >= 0).sum())
        text = f"row_index: the images have {count} positions in the prompt, not as many as their features require"
        return [Finding(stage="inputs", where="row_index", text=text, side=label)]
    pairs.append(("row_index", expected.rows, prompt.rows))
    if prompt.grids is not None and len(prompt.grids):
        pairs.append(("grids", np.array(expected.grids), prompt.grids))
    if prompt.cross_attention is not None:
        pairs.append(("tiles_seen", expected.visible, prompt.cross_attention.visible))
        pairs.append(("cross_gate", expected.gates, prompt.cross_attention.gates))
    pairs.append(("ntk", np.array([expected.ntk]), np.array([prompt.ntk])))
    return [each for pair in pairs if (each := _prompt_finding(*pair, label))]


def _prompt_finding(name: str, right: np.ndarray, value: np.ndarray, label: str) -> Finding | None:
    right, value = np.asarray(right, np.float64), np.asarray(value, np.float64)
    if right.shape == value.shape and np.array_equal(right, value):
        return None
    if right.shape != value.shape:
        text = f"{name} has the shape {list(value.shape)}, where the prompt requires {list(right.shape)}"
    else:
        at = [int(i) for i in np.argwhere(right != value)[0]]
        text = f"{name}{at} is {value[tuple(at)]:.6g}, where the prompt requires {right[tuple(at)]:.6g}"
    return Finding(stage="inputs", where=name, text=text, side=label, shape=value.shape)

"""The feeds of a request's runs, against those that its prompt requires: positions, tokens, rotary tables.

The expected feeds are counted from the prompt alone, not by the engine that is checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .capture import CapturedRun
from .findings import Finding
from .metrics import relative_error
from .static_side import StaticPrepared


def compare_feeds(
    runs: Sequence[CapturedRun], prompt: StaticPrepared, answer: np.ndarray, expected: dict[str, np.ndarray], limit: float
) -> list[Finding]:
    """The first wrong feed of a request for one prompt, or none. `expected`: the reference's inputs of prompt and
    answer (see inputs.py). `runs`: all of the request, up to the last that is checked."""
    position, generated = 0, 0
    for run in runs:
        if run.graph.kind == "vision":
            continue
        prefill = run.graph.kind == "prefill"
        row = 0 if prefill else next(iter(run.past))
        count = min(run.graph.bucket, prompt.length - position) if prefill else 1
        tokens = prompt.prompt.token_ids[position : position + count] if prefill else answer[generated : generated + 1]
        required = {"lengths": np.array([position]), "token_ids": tokens}
        required |= {"last_index": np.array([count - 1])} if prefill else {}
        span = slice(position, position + count)
        for name in ("rope_cos", "rope_sin", "query_scale"):
            if name in expected and name in run.feed:
                required[name] = expected[name][span]
        feeds = {name: run.feed[name][row] for name in required if name not in ("last_index", "lengths")}
        feeds |= {"lengths": run.feed["lengths"][row : row + 1]}
        feeds |= {"last_index": run.feed["last_index"]} if prefill else {}
        for name, right in required.items():
            value = feeds[name][:count] if name not in ("lengths", "last_index") else feeds[name]
            value = value.reshape(right.shape)
            if relative_error(right.astype(float), value.astype(float)) > limit:
                return [_finding(run, name, value, right, position)]
        position += count
        generated += 0 if prefill else 1
    return []


def _finding(run: CapturedRun, name: str, value: np.ndarray, right: np.ndarray, position: int) -> Finding:
    where = f"after {position} tokens"
    if value.size == 1:
        text = f"{run.graph.name} was fed {name} {value.item():.6g} {where}, where {right.item():.6g} is right"
    else:
        error = relative_error(right.astype(float), value.astype(float))
        text = f"{run.graph.name} was fed {name} {list(value.shape)} {where} that differs by {error:.2e}"
    return Finding(stage="feeds", where=name, text=text, graph=run.graph.name, shape=value.shape)

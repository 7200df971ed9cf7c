"""What each step fed its graph, against what the prompt says that it must: positions, tokens, rotary tables.

Counted here from the prompt alone, not by the engine that is judged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .capture import Captured
from .findings import Finding
from .metrics import relative_error
from .static_side import StaticPrepared


def compare_feeds(
    runs: Sequence[Captured], prompt: StaticPrepared, answer: np.ndarray, expected: dict[str, np.ndarray], limit: float
) -> list[Finding]:
    """The first step of a request for one prompt that was fed wrongly; `expected` is what the reference makes of prompt and
    answer (see inputs.py). `runs` must be all that the request took, up to the last that is checked."""
    done, said = 0, 0
    for run in runs:
        if run.graph.kind == "vision":
            continue
        prefill = run.graph.kind == "prefill"
        slot = next(iter(run.past))
        row = 0 if prefill else slot
        count = min(run.graph.bucket, prompt.length - done) if prefill else 1
        tokens = prompt.prompt.token_ids[done : done + count] if prefill else answer[said : said + 1]
        wanted = {"lengths": np.array([done]), "token_ids": tokens}
        wanted |= {"last_index": np.array([count - 1])} if prefill else {}
        here = slice(done, done + count)
        for name in ("rope_cos", "rope_sin", "query_scale"):
            if name in expected and name in run.feed:
                wanted[name] = expected[name][here]
        fed = {name: run.feed[name][row] for name in wanted if name not in ("last_index", "lengths")}
        fed |= {"lengths": run.feed["lengths"][row : row + 1]}
        fed |= {"last_index": run.feed["last_index"]} if prefill else {}
        for name, right in wanted.items():
            given = fed[name][:count] if name not in ("lengths", "last_index") else fed[name]
            given = given.reshape(right.shape)
            if relative_error(right.astype(float), given.astype(float)) > limit:
                return [_finding(run, name, given, right, done)]
        done += count
        said += 0 if prefill else 1
    return []


def _finding(run: Captured, name: str, given: np.ndarray, right: np.ndarray, done: int) -> Finding:
    where = f"behind {done} tokens"
    if given.size == 1:
        text = f"{run.graph.name} was fed {name} {given.item():.6g} {where}, where {right.item():.6g} is right"
    else:
        error = relative_error(right.astype(float), given.astype(float))
        text = f"{run.graph.name} was fed {name} {list(given.shape)} {where} that differs by {error:.2e}"
    return Finding(stage="feeds", where=name, text=text, graph=run.graph.name, shape=given.shape)

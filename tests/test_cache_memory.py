"""Memory of the cache on onnxruntime, with a cache that is large beside the rest of a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.tools.development.random_checkpoint import write_checkpoint

from .conftest import EMBEDDED, REPO
from .fakes import check_blocks, gigabytes

CONTEXT, TOKENS, SLOTS = 1536, 1400, 8
TOKEN_BYTES = 2 * 2 * 8 * 128 * 4  # keys and values of two layers with 8 heads of 128 in float32
WIDE = {
    "text_config.num_attention_heads": 8,
    "text_config.num_key_value_heads": 8,
    "text_config.head_dim": 128,
    "text_config.num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: a slot of the cache takes 25 MB, and everything else little."""
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(EMBEDDED, folder / "checkpoint", dtype="float16", overrides=WIDE)
    buckets = Buckets(prefill=(256,), decode=(1, SLOTS), vision=(1,), context=CONTEXT, slots=SLOTS)
    build(Options(checkpoint=folder / "checkpoint", out=folder / "artifact", buckets=buckets))
    return folder / "artifact"


def memory(artifact: Path, *settings: object) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.resident_memory", str(artifact), str(TOKENS), *map(str, settings)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's figures of memory")
def test_memory_after_a_long_request_is_that_before(wide: Path) -> None:
    seen = memory(wide, SLOTS * CONTEXT * TOKEN_BYTES / 1e9)
    assert seen["during"] - seen["before"] > 0.9 * TOKENS * TOKEN_BYTES, "the request does take its rows"
    assert seen["after"] < 1.05 * seen["before"]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's figures of memory")
def test_kept_prefixes_stay_within_the_budget(wide: Path) -> None:
    """Five prompts of eleven blocks each, of which twelve are kept."""
    seen = memory(wide, 12.5 * 128 * TOKEN_BYTES / 1e9, "reuse")
    assert seen["after"] < 1.05 * seen["before"]


def test_eight_requests_at_once_in_the_blocks_of_two_slots(wide: Path) -> None:
    texts = [f"{number} apples" for number in range(SLOTS)]
    with runtime.load(wide) as model:
        budget = gigabytes(model.engine.manifest, 2 * CONTEXT // 128)
        expected = [model.generate(text, raw=True, max_new_tokens=20, ignore_eos=True).token_ids for text in texts]
    with runtime.load(wide, cache_gb=budget) as model:
        engine, most = model.engine, 0
        sequences = [
            engine.add_request(
                model.processor.raw_prompt(text, None), runtime.SamplingParams(max_new_tokens=20, ignore_eos=True)
            )
            for text in texts
        ]
        while not engine.scheduler.idle:
            engine.step()
            check_blocks(engine)
            most = max(most, len(engine.scheduler.running))
        assert most == SLOTS and engine.scheduler.preemptions == 0
        assert [sequence.generated for sequence in sequences] == expected

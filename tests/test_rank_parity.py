"""The long proof that a cut model says what the whole one says: every family in 2, 4 and 8 processes, on both backends.

Weights are random, so what is compared is the arithmetic; key-value heads are shared by ranks where there are fewer of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.check import relative_error
from staticvl.compiler.plan import Buckets, Options
from staticvl.tools.development.random_checkpoint import write_checkpoint

from .ascend import CHECKPOINTS, GREEDY, QUESTION, REQUESTS, answer_requests
from .need_torchair import skip_without_torchair
from .parity import noise_image

pytestmark = pytest.mark.slow

# 8 heads everywhere; of key-value heads fewer, but for Qwen, which has as many. Its resampler has heads of 128.
LLAVA = {"text_config.num_attention_heads": 8, "text_config.num_key_value_heads": 2, "vision_config.num_attention_heads": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llava": LLAVA,
    "llava_next": LLAVA,
    "mllama": {
        "text_config.num_attention_heads": 8,
        "text_config.num_key_value_heads": 4,
        "vision_config.attention_heads": 8,
    },
    "qwen_vl": {
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "kv_channels": 128,
        "intermediate_size": 512,
        "visual.output_dim": 1024,
        "visual.heads": 8,
    },
}
# float32 everywhere: in 16 bits a sum of parts is rounded elsewhere, and random weights decide few tokens by more than that.
DEVICES = {"onnx": "cpu", "ascend": "sim:float32"}
ALLOWED = 1e-4  # of the largest magnitude


@dataclass(frozen=True)
class Answers:
    batch: list[runtime.Output]
    chat: list[runtime.Output]


@pytest.fixture(scope="module", params=OVERRIDES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "checkpoint"
    write_checkpoint(CHECKPOINTS[request.param], out, dtype="float32", scale=0.08, overrides=OVERRIDES[request.param])
    return request.param, out


@pytest.fixture(scope="module", params=DEVICES)
def whole(
    request: pytest.FixtureRequest, checkpoint: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Answers]]:
    if request.param == "ascend":
        skip_without_torchair()
    yield request.param, answers(checkpoint, tmp_path_factory.mktemp("whole"), request.param, 1)


def answers(checkpoint: tuple[str, Path], out: Path, backend: str, tp: int) -> Answers:
    """A batch of four, and a chat."""
    family, folder = checkpoint
    images = (2,) if family == "mllama" else None
    buckets = Buckets(prefill=(8, 32), decode=(1, 4), images=images, context=400, slots=4)
    build(Options(checkpoint=folder, out=out / "artifact", backend=backend, tp=tp, buckets=buckets))
    with runtime.load(out / "artifact", device=DEVICES[backend], tp=tp) as model:
        batch = answer_requests(model)
        with model.chat() as chat:
            turns = [chat.send(QUESTION, [noise_image((50, 80))], **GREEDY), chat.send("Where is it?", **GREEDY)]
    return Answers(batch, turns)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_say_what_the_whole_model_says(
    checkpoint: tuple[str, Path], whole: tuple[str, Answers], tmp_path: Path, tp: int
) -> None:
    backend, expected = whole
    found = answers(checkpoint, tmp_path, backend, tp)
    errors = []
    for mine, theirs in zip(found.batch + found.chat, expected.batch + expected.chat, strict=True):
        assert mine.token_ids == theirs.token_ids and len(mine.token_ids) == 64
        assert mine.logits is not None and theirs.logits is not None
        errors.append(relative_error(mine.logits, theirs.logits))
    print(f"{checkpoint[0]} {backend} tp={tp}: worst error {max(errors):.1e}")
    assert max(errors) <= ALLOWED
    assert len({tuple(out.token_ids) for out in found.batch}) == len(REQUESTS)

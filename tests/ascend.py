"""Artifacts of one checkpoint for both backends, for tests that compare what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options

from .conftest import EMBEDDED
from .parity import noise_image

ASSETS = EMBEDDED.parent
CHECKPOINTS = {
    "llava": ASSETS / "tiny_llava15",
    "llava_next": ASSETS / "tiny_llava16",
    "mllama": ASSETS / "tiny_mllama",
    "qwen_vl": Path(__file__).parent / "golden" / "qwen_vl_tiny" / "checkpoint",
}
QUESTION = "What is in the picture?"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 64, "ignore_eos": True, "return_logits": True}
LONG = "Say one word about each of these things, please: a circle, a square, a triangle, a star and a hexagon. "
# One image, none, two, and a prompt of many chunks; the rows of one batch.
REQUESTS = (
    (QUESTION, [(70, 50)]),
    ("Say one word.", []),
    ("Which of the two is larger?", [(64, 64), (30, 90)]),
    (LONG, [(120, 40)]),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same checkpoint and buckets, compiled twice."""

    onnx: Path
    ascend: Path
    trained: bool

    def load(self, device: str = "sim") -> tuple[runtime.Model, runtime.Model]:
        return runtime.load(self.onnx), runtime.load(self.ascend, device=device)


def compile_pair(family: str, folder: Path, buckets: Buckets, dtype: str = "float16", **options) -> Pair:
    """Both artifacts of a family's tiny checkpoint; `options` are the Ascend one's."""
    checkpoint = CHECKPOINTS[family]
    if family == "mllama":
        buckets = replace(buckets, images=(2,))
    pair = Pair(folder / "onnx", folder / "ascend", trained=checkpoint.parent == ASSETS)
    build(Options(checkpoint=checkpoint, out=pair.onnx, buckets=buckets))
    build(Options(checkpoint=checkpoint, out=pair.ascend, buckets=buckets, backend="ascend", dtype=dtype, **options))
    return pair


def answer_requests(model: runtime.Model) -> list[runtime.Output]:
    """REQUESTS as one batch, 64 greedy tokens each."""
    images = [[noise_image(size, seed) for seed, size in enumerate(sizes)] for _, sizes in REQUESTS]
    return model.generate([text for text, _ in REQUESTS], images, **GREEDY)


def natural_end(output: runtime.Output, stops: Sequence[int]) -> int:
    """Tokens of an answer up to the first that ends it: after that a trained model is as undecided as a random one."""
    return next((i + 1 for i, token in enumerate(output.token_ids) if token in stops), len(output.token_ids))


def check_alike(expected: runtime.Output, found: runtime.Output, rounding: float, near: float = 0.0, sure: int = 0) -> None:
    """The same tokens, and logits as far apart as `rounding` in length explains.

    With `near`, tokens after the first `sure` ones may part where the two logits are nearer to each other than this part of the
    row's root mean square: which of them is the larger depends on the processor, and after another token all is another text.
    """
    assert expected.logits is not None
    assert found.logits is not None
    last = len(expected.token_ids)
    if found.token_ids != expected.token_ids:
        assert len(found.token_ids) == last
        pairs = zip(expected.token_ids, found.token_ids, strict=True)
        parted, mine, other = next((i, a, b) for i, (a, b) in enumerate(pairs) if a != b)
        row = expected.logits[parted]
        margin = (row[mine] - row[other]) / np.sqrt(np.mean(row**2))
        assert parted >= sure and margin < near, (parted, sure, mine, other, margin)
        last = parted + 1  # both rows there are still after the same text
    distance = np.linalg.norm(found.logits[:last] - expected.logits[:last]) / np.linalg.norm(expected.logits[:last])
    assert distance <= rounding

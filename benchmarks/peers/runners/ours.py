"""staticvl's own engine, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from staticvl import runtime
from staticvl.compiler.buckets import Buckets
from staticvl.compiler.choices import READY_QUANTS
from staticvl.runtime.engine.request import Sequence as Running
from staticvl.runtime.processor.prompt import Prompt

from ..build import build_for_timing
from ..sizes import Size
from .base import Tokens, UnsupportedError

VERSIONS = ("staticvl", "onnxruntime")


def prepare(checkpoint: Path, home: Path, quant: str, size: Size) -> None:
    if quant not in READY_QUANTS["onnx"]:
        raise UnsupportedError(f"--quant {quant} is not available; available: {', '.join(READY_QUANTS['onnx'])}")
    buckets = Buckets(prefill=size.prefill_buckets, decode=(1, size.batch), vision=(1,), context=size.context, slots=size.batch)
    build_for_timing(checkpoint, home, quant, buckets, tune=True)
    runtime.load(home).close()  # packs the weights for this machine


class StaticvlRunner:
    """See base.Runner. Runs greedy requests that never end by themselves."""

    def __init__(self, checkpoint: Path, home: Path, quant: str, size: Size, threads: int) -> None:
        self.model = runtime.load(home, threads=threads, reuse=False)
        self.engine, self.size = self.model.engine, size
        self.running: list[Running] = []

    def prefill(self, prompts: Sequence[Tokens]) -> None:
        self._begin([_text(prompt) for prompt in prompts])
        while any(sequence.prefilling for sequence in self.running):
            self.engine.step()

    def step(self) -> None:
        self.engine.step()

    def last(self) -> np.ndarray:
        return self.running[0].logits[-1]

    def image(self, pixels: np.ndarray) -> None:
        self._begin([self._image(pixels, [1])])
        self.engine.step()  # an image's first step is the tower

    def prefill_image(self, pixels: np.ndarray, prompt: Tokens) -> None:
        self._begin([self._image(pixels, prompt)])
        while self.running[0].prefilling:
            self.engine.step()

    def _begin(self, prompts: Sequence[Prompt]) -> None:
        for sequence in self.running:
            self.engine.cancel(sequence)
        room = self.size.context - max(prompt.length for prompt in prompts)
        params = runtime.SamplingParams(max_new_tokens=room, temperature=0.0, ignore_eos=True)
        self.running = [self.engine.add_request(prompt, params, return_logits=True) for prompt in prompts]

    def _image(self, pixels: np.ndarray, prompt: Tokens) -> Prompt:
        rows = self.model.info.image.rows
        text = _text(prompt)
        return Prompt(
            token_ids=np.concatenate((np.zeros(rows, np.int32), text.token_ids)),
            rows=np.concatenate((np.arange(rows, dtype=np.int32), text.rows)),
            pixels=pixels[None],
            frames=(),
            image_tokens=rows,
            state=np.zeros(rows + text.length, np.int32),
        )


def _text(tokens: Tokens) -> Prompt:
    ids = np.array(tokens, np.int32)
    pixels = np.zeros((0, 1, 1, 3), np.uint8)
    return Prompt(
        token_ids=ids, rows=np.full_like(ids, -1), pixels=pixels, frames=(), image_tokens=0, state=np.zeros_like(ids)
    )  # fmt: skip


OPEN = StaticvlRunner

"""onnxruntime-genai, with its own model builder and its own loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from ..sizes import Size
from ..text_checkpoint import text_checkpoint
from .base import TextRunner, Tokens

VERSIONS = ("onnxruntime-genai", "onnxruntime")


def prepare(checkpoint: Path, home: Path, precision: str, size: Size) -> None:
    if (home / "genai_config.json").is_file():
        return
    command = ["-m", "onnxruntime_genai.models.builder", "-i", text_checkpoint(checkpoint), "-o", home]
    command += ["-p", precision, "-e", "cpu", "-c", home.with_name("build")]
    subprocess.run([sys.executable, *map(str, command)], check=True)


class GenaiRunner(TextRunner):
    """See base.Runner."""

    def __init__(self, checkpoint: Path, home: Path, precision: str, size: Size, threads: int) -> None:
        config = og.Config(str(home))
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
        self.model, self.size = og.Model(config), size
        self.generator: og.Generator | None = None

    def prefill(self, prompts: Sequence[Tokens]) -> None:
        params = og.GeneratorParams(self.model)
        # min_length: noise has to go on however soon it says that it ends.
        params.set_search_options(
            batch_size=len(prompts), max_length=self.size.context, min_length=self.size.context, do_sample=False
        )
        self.generator = None  # its cache goes before the next one comes
        generator = self.generator = og.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, np.int32))

    def step(self) -> None:
        assert self.generator
        self.generator.generate_next_token()

    def last(self) -> np.ndarray:
        assert self.generator
        logits = np.asarray(self.generator.get_logits(), np.float32)  # [1, 1, V]
        return logits.reshape(-1, logits.shape[-1])[-1]


OPEN = GenaiRunner

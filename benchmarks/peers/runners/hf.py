"""transformers: eager as in common use, with torch.compile over a static cache, or in float32 as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, StaticCache

from ..sizes import Size
from .base import Tokens, normalised

VERSIONS = ("transformers", "torch")


def prepare(checkpoint: Path, home: Path, setting: str, size: Size) -> None:
    """Does nothing: transformers reads the checkpoint itself."""


class HfRunner:
    """See base.Runner."""

    def __init__(self, checkpoint: Path, home: Path, setting: str, size: Size, threads: int) -> None:
        torch.set_num_threads(threads)
        self.dtype = torch.float32 if setting == "float32" else torch.bfloat16
        kind: Any = transformers.AutoModelForImageTextToText
        self.model: Any = kind.from_pretrained(checkpoint, dtype=self.dtype).eval()
        self.size, self.static = size, setting == "compiled"
        self.image_token = self.model.config.image_token_id
        self.text: Any = self.model.model.language_model
        if self.static:
            self.text.forward = torch.compile(self.text.forward)
        self.cache: Any = None
        self.row = torch.empty(0)  # logits [B, V]

    def prefill(self, prompts: Sequence[Tokens]) -> None:
        self._fresh()
        self._run(input_ids=torch.tensor(prompts))

    def step(self) -> None:
        self._run(input_ids=self.row.argmax(-1, keepdim=True))

    def last(self) -> np.ndarray:
        return self.row[0].float().numpy()

    @torch.no_grad()
    def image(self, pixels: np.ndarray) -> None:
        self.model.model.get_image_features(self._pixels(pixels))

    def prefill_image(self, pixels: np.ndarray, prompt: Tokens) -> None:
        vision = self.model.config.vision_config
        ids = [self.image_token] * (vision.image_size // vision.patch_size) ** 2 + list(prompt)
        self._fresh()
        self._run(input_ids=torch.tensor([ids]), pixel_values=self._pixels(pixels))

    def _fresh(self) -> None:
        config = self.model.config.text_config
        self.cache = StaticCache(config, max_cache_len=self.size.context) if self.static else DynamicCache(config=config)

    @torch.no_grad()
    def _run(self, **inputs: torch.Tensor) -> None:
        self.row = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _pixels(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(normalised(pixels)).to(self.dtype)


OPEN = HfRunner

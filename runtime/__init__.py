"""Run artifacts: `load` one and generate, or `generate` in one call. Imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .async_engine import AsyncEngine
from .backends.distributed.failures import RankError
from .engine.access import InterruptedStepError
from .engine.fit import ContextError
from .engine.request import Output, SamplingParams
from .loading import load
from .model import Model, ModelClosedError
from .processor.image_data import ImageError
from .processor.processor import Processor
from .processor.prompt import IMAGE, Message

__all__ = [
    "IMAGE",
    "AsyncEngine",
    "ContextError",
    "ImageError",
    "InterruptedStepError",
    "Message",
    "Model",
    "ModelClosedError",
    "Output",
    "Processor",
    "RankError",
    "SamplingParams",
    "generate",
    "load",
]


def generate(
    artifact: str | Path,
    prompts: Any,
    images: Any = None,
    *,
    device: str = "cpu",
    tp: int | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    **settings: Any,
) -> Any:
    """Load an artifact, answer, and close it again; arguments and results as of `load` and Model.generate."""
    with load(artifact, device=device, tp=tp, threads=threads, timeout=timeout) as model:
        return model.generate(prompts, images, **settings)

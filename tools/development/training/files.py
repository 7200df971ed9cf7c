"""Writing checkpoint folders whole."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with sorted keys and a final line break."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """model.safetensors in one dtype, tensors in the order of their names."""
    cast = {name: weights[name].to(dtype).contiguous() for name in sorted(weights)}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it readable to its owner only


def replace_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside ``out`` and rename it, keeping a model card that is already there."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        write(beside)
        if (out / "README.md").exists():
            shutil.copy2(out / "README.md", beside / "README.md")
        if out.exists():
            shutil.rmtree(out)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)

"""The decoder of a LLaVA checkpoint as a separate Llama checkpoint, for peers without images."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

PREFIX = "language_model."  # of tensors, as LLaVA repositories spell them
KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def text_checkpoint(checkpoint: Path) -> Path:
    """The folder of the decoder beside `checkpoint`, made if it is not there yet: one file, its tensors as they were."""
    out = checkpoint.with_name("text")
    if out.is_dir():
        return out
    partial = checkpoint.with_name(f"text.{os.getpid()}.partial")
    partial.mkdir()
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as source:
            for name in source.keys():  # noqa: SIM118
                if name.startswith(PREFIX):
                    tensors[name.removeprefix(PREFIX)] = source.get_tensor(name)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    config |= {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
    config |= {"hidden_act": "silu", "tie_word_embeddings": False}
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in KEPT:
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, partial / name)
    partial.rename(out)
    return out

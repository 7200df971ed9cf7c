"""`--lora` from end to end: an artifact made with an adapter answers like the merged model, and like nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import rank_folder
from staticvl.tools.cli import main

from .checkpoints import tiny_llava
from .test_lora import adapt
from .wide_models import part

BUCKETS = Buckets(prefill=(16,), decode=(1,), vision=(1,), context=64, slots=1)


def test_an_adapted_artifact_is_the_merged_model(tmp_path: Path) -> None:
    tiny = tiny_llava(tmp_path / "base")
    merged = adapt(tiny.model, tmp_path / "adapter")
    options = Options(checkpoint=tiny.folder, out=tmp_path / "artifact", buckets=BUCKETS)
    plain = build(options).manifest
    adapted = Options(checkpoint=tiny.folder, out=tmp_path / "artifact", buckets=BUCKETS, lora=tmp_path / "adapter")
    report = build(adapted)
    assert report.converted and report.manifest.build.key != plain.build.key
    out = runtime.load(tmp_path / "artifact").generate("What is it?", raw=True, max_new_tokens=1, return_logits=True)
    model = runtime.load(tmp_path / "artifact")
    ids = torch.tensor([model.processor.tokenizer.encode("What is it?", add_bos=True)])
    with torch.inference_mode():
        expected, base = (m(input_ids=ids).logits[0, -1].numpy() for m in (merged, tiny.model))
    assert np.abs(out.logits[0] - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(out.logits[0] - base).max() > 1e-2 * np.abs(base).max()
    assert not build(adapted).converted  # nothing changed


def test_ranks_hold_their_parts_of_the_merged_weights(tmp_path: Path) -> None:
    tiny = tiny_llava(tmp_path / "base")
    adapt(tiny.model, tmp_path / "adapter")
    config = read_config(tiny.folder)
    held: list[dict[str, torch.Tensor]] = []
    for tp in (1, 2):
        out = tmp_path / f"tp{tp}"
        options = Options(checkpoint=tiny.folder, out=out, buckets=BUCKETS, lora=tmp_path / "adapter", tp=tp)
        files = build(options).manifest.files
        for rank in range(tp):
            names = [name for name in files if name.startswith(f"{rank_folder(tp, rank)}/")]
            held.append({key: tensor for name in names for key, tensor in load_file(out / name).items()})
    whole, *ranks = held
    for rank, tensors in enumerate(ranks):
        assert tensors.keys() == whole.keys()
        assert all(torch.equal(tensors[name], part(config, name, whole[name], 2, rank)) for name in whole)


def test_an_adapter_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = tiny_llava(tmp_path / "base")
    assert main(["compile", str(tiny.folder), "--out", str(tmp_path / "a"), "--lora", str(tmp_path / "none")]) == 1
    assert "expected a LoRA adapter as PEFT saves it" in capsys.readouterr().err

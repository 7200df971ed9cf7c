"""Conversion for one rank of several: its part of every tensor, read sparingly, in files laid out alike on all ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from staticvl.model_defs.config import ModelConfig, head_quant
from staticvl.runtime.artifact import FileSpec
from staticvl.runtime.files import sha256_file
from staticvl.weights import shard_span
from staticvl.weights.convert import Conversion, Converted, convert, forget_journal, plan_weight_files
from staticvl.weights.quantize import dequantize, quantize
from staticvl.weights.shard import rank_span, shard_axis
from staticvl.weights.shard_span import Span, read_span
from staticvl.weights.source import Source, open_source
from staticvl.weights.storage import quant_of, stored_targets
from staticvl.weights.tensors import WeightsError
from staticvl.weights.weight_map import match

from .test_convert import StopError, stop_after
from .wide_models import CONFIGS, part, wide_config, write_random

SHARD_BYTES = 50_000


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    config = wide_config(request.param, 8 if request.param == "qwen_vl" else 2)
    return config, write_random(config, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    config = wide_config("mllama", 2)
    return config, write_random(config, tmp_path_factory.mktemp("mllama"))


def run(checkpoint: tuple[ModelConfig, Path], out: Path, **options: Any) -> Converted:
    config, folder = checkpoint
    progress = options.pop("progress", None)
    conversion = Conversion(**{"prefix": "k", "shard_bytes": SHARD_BYTES} | options)
    return convert(open_source(folder), config, out, conversion, progress=progress)


def load(out: Path, converted: Converted) -> dict[str, Tensor]:
    return {name: tensor for file in converted.files for name, tensor in load_file(out / file).items()}


@pytest.mark.parametrize(("tp", "quant"), [(2, "none"), (8, "w8a16"), (2, "w8a8"), (8, "w4a16")])
def test_a_rank_has_its_part_of_every_tensor(
    checkpoint: tuple[ModelConfig, Path], tmp_path: Path, tp: int, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And quantised weights are those of its part, with scales of its own."""
    monkeypatch.setattr(shard_span, "_PIECE", 1000)  # several pieces of the larger tensors
    config, whole = checkpoint[0], load(tmp_path, run(checkpoint, tmp_path))
    for rank in range(tp):
        got = load(tmp_path, run(checkpoint, tmp_path, tp=tp, rank=rank, quant=quant))
        assert got.keys() == stored_targets(config, quant, tp=tp).keys()
        for name, tensor in whole.items():
            expected = part(config, name, tensor, tp, rank)
            kind, stem = quant_of(name, quant), name.removesuffix(".weight")
            stored = {name: expected}
            if kind != "none":
                stored = {f"{stem}.{part}": value for part, value in quantize(kind, expected).items()}
            assert all(torch.equal(got[key], value) for key, value in stored.items()), name


@pytest.mark.parametrize("quant", ["none", "w8a8+vision", "w4a16"])
def test_files_of_all_ranks_are_laid_out_alike(checkpoint: tuple[ModelConfig, Path], tmp_path: Path, quant: str) -> None:
    config, _ = checkpoint
    places = []
    for rank in range(4):
        converted = run(checkpoint, tmp_path, tp=4, rank=rank, quant=quant)
        planned = plan_weight_files(config, Conversion(quant=quant, prefix="k", shard_bytes=SHARD_BYTES, tp=4, rank=rank))
        folder = f"weights/rank-{rank}/"
        assert list(converted.files) == [shard.file for shard in planned] and len(planned) > 1
        assert all(file.startswith(folder) and (tmp_path / file).is_file() for file in converted.files)
        places.append({
            name: (spec.file.removeprefix(folder), spec.offset, spec.nbytes, spec.shape, spec.dtype)
            for name, spec in converted.weights.items()
        })  # fmt: skip
    assert all(place == places[0] for place in places)
    digests = [{spec.sha256 for spec in converted_files(tmp_path, rank)} for rank in range(4)]
    assert len(set.union(*digests)) > len(digests[0]), "ranks hold different numbers"


def converted_files(out: Path, rank: int) -> list[FileSpec]:
    files = sorted((out / "weights" / f"rank-{rank}").glob("*.safetensors"))
    return [FileSpec(nbytes=file.stat().st_size, sha256=sha256_file(file)) for file in files]


def test_no_more_is_read_than_has_to_be(
    checkpoint: tuple[ModelConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that are taken as they are, the rank's; columns some rows at a time; all else once."""
    config, folder = checkpoint
    monkeypatch.setattr(shard_span, "_PIECE", 1000)
    elements: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    plain = Source.read

    def counted(self: Source, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = plain(self, name, rows)
        elements[name] += tensor.numel()
        largest[name] = max(largest[name], tensor.numel())
        return tensor

    monkeypatch.setattr(Source, "read", counted)
    run(checkpoint, tmp_path, tp=8, rank=5)
    expected: Counter[str] = Counter()
    for name, recipe in match(config, open_source(folder).tensors).recipes.items():
        sizes = [
            torch.Size((ref.rows[1] - ref.rows[0], *ref.shape[1:]) if ref.rows else ref.shape).numel()
            for ref in recipe.rule.sources
        ]
        axis = shard_axis(config, name)
        if axis == 0 and recipe.rule.make is None:
            first, stop = rank_span(config, name, recipe.rule.shape, 8, 5)
            sizes = [sizes[0] // recipe.rule.shape[0] * (stop - first)]
        for tensor, size in zip(recipe.tensors, sizes, strict=True):
            expected[tensor.name] += size
        if axis == 1 and recipe.rule.make is None:
            assert largest[recipe.tensors[0].name] <= 1000
    assert elements == expected


def test_a_tensor_is_read_in_pieces_of_rows() -> None:
    whole, spans = torch.randn(7, 6), []

    def read(rows: tuple[int, int]) -> Tensor:
        spans.append(rows)
        return whole[slice(*rows)]

    before, shard_span._PIECE = shard_span._PIECE, 18
    try:
        assert torch.equal(read_span(read, (7, 6), Span(1, 2, 5)), whole[:, 2:5])
        assert spans == [(0, 3), (3, 6), (6, 7)]
        assert torch.equal(read_span(read, (7, 6), Span(0, 2, 5)), whole[2:5]) and spans[-1] == (2, 5)
    finally:
        shard_span._PIECE = before


def test_a_resumed_rank_ends_like_an_uninterrupted_one(
    mllama: tuple[ModelConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        run(mllama, tmp_path / "whole", tp=2, rank=rank)
    with monkeypatch.context() as patch:
        run(mllama, tmp_path / "broken", tp=2, rank=0)
        stop_after(2, patch)
        with pytest.raises(StopError):
            run(mllama, tmp_path / "broken", tp=2, rank=1)
    folders = [tmp_path / "broken" / "weights" / f"rank-{rank}" for rank in range(2)]
    assert sorted(p.name for p in folders[1].iterdir()) == ["k-00001.safetensors", "k-00002.safetensors", "k.journal"]
    with monkeypatch.context() as patch:
        begun = stop_after(99, patch)
        files = [list(run(mllama, tmp_path / "broken", tp=2, rank=rank).files) for rank in range(2)]
    assert begun == files[1][2:], "finished files are not written again"
    for rank in range(2):
        assert converted_files(tmp_path / "broken", rank) == converted_files(tmp_path / "whole", rank)
        forget_journal(tmp_path / "broken", "k", tp=2, rank=rank)
        assert not (folders[rank] / "k.journal").exists()


def test_values_that_are_not_finite_are_found_by_the_rank_that_holds_them(tmp_path: Path) -> None:
    config = wide_config("llava", 2)
    folder = write_random(config, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight") and "vision" not in name)
    tensors[name][-1, -1] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    for rank in range(3):
        run((config, folder), tmp_path, tp=4, rank=rank)
    with pytest.raises(WeightsError, match=rf"tensor {name} holds values that are not finite"):
        run((config, folder), tmp_path, tp=4, rank=3)


def test_a_number_of_ranks_that_does_not_divide_is_said_before_writing(
    mllama: tuple[ModelConfig, Path], tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=r"8 attention heads do not divide among 3 ranks; .* numbers of ranks: 1, 2, 4, 8"):
        run(mllama, tmp_path, tp=3, rank=0)
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("quant", ["none", "w4a16"])
def test_rows_of_no_token_are_zeros(quant: str, tmp_path: Path) -> None:
    """9 tokens on 8 ranks are 2 rows on each: four ranks have 2 of their own, one has 1, three have none."""
    config = wide_config("llava")
    config = replace(config, text=replace(config.text, vocab_size=9, embed_rows=9))
    folder = write_random(config, tmp_path / "checkpoint")
    whole = load(tmp_path, run((config, folder), tmp_path, prefix="whole"))["text.lm_head.weight"]
    ranks = [load(tmp_path, run((config, folder), tmp_path, quant=quant, tp=8, rank=rank)) for rank in range(8)]
    if quant == "none":
        rows = torch.cat([rank["text.lm_head.weight"] for rank in ranks])
    else:
        parts = [{part: rank[f"text.lm_head.{part}"] for part in ("qweight", "scales")} for rank in ranks]
        rows = torch.cat([dequantize(head_quant(quant), each, whole.shape[1]) for each in parts])
    assert rows.shape == (16, whole.shape[1]) and not rows[9:].any()
    torch.testing.assert_close(rows[:9], whole, atol=0 if quant == "none" else float(whole.abs().max()) / 127, rtol=0)

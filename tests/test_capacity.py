"""Requests that a memory holds, against figures made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from staticvl.runtime.artifact import CacheSpec, CrossSpec
from staticvl.tools.capacity import capacity, image_tokens
from staticvl.tools.cards import CARDS
from staticvl.tools.cli import main

from .conftest import EMBEDDED

LLAVA_7B = CacheSpec(layers=32, kv_heads=32, head_dim=128, slots=4, context=4096, rows=4096 + 32, dtype="float16")
CROSS = CrossSpec(layers=8, images=2, rows=6404, tiles=4)
LLAMA_11B = CacheSpec(layers=32, kv_heads=8, head_dim=128, slots=4, context=4096, rows=4096 + 32, dtype="bfloat16", cross=CROSS)


def test_llava_7b() -> None:
    held = capacity(LLAVA_7B, 576, 14_000_000_000, CARDS["910B"], None)
    assert held.token_bytes == 2 * 32 * 4096 * 2 == 524_288
    assert held.cache == 57_600_000_000 - 14_000_000_000
    assert held.request_tokens == 768
    assert held.slots.request_bytes == 4128 * 524_288  # 2.16 GB
    assert held.pages.request_bytes == 6 * 128 * 524_288  # 0.40 GB
    assert (held.slots.requests, held.pages.requests) == (20, 108)
    assert held.tokens == 43_600_000_000 // (128 * 524_288) * 128
    step_s = (14e9 + 108 * 768 * 524_288) / 1.6e12
    assert held.pages.tokens_per_s == pytest.approx(108 / step_s)


def test_images_of_cross_attention() -> None:
    held = capacity(LLAMA_11B, 1, 21_300_000_000, CARDS["910B"], 32e9)
    assert held.memory == 32_000_000_000
    assert held.token_bytes == 2 * 32 * 1024 * 2 == 131_072
    image = 2 * 8 * 1024 * 2  # of one key
    assert held.image_bytes == 6404 * image
    assert held.slots.request_bytes == 4128 * 131_072 + 2 * 6404 * image
    assert held.pages.request_bytes == 2 * 128 * 131_072 + 51 * 128 * image  # 193 tokens, 51 pages of the image


def test_8_bits_and_no_room() -> None:
    held = capacity(msgspec.structs.replace(LLAVA_7B, text_dtype="int8"), 576, 14_000_000_000, CARDS["910B"], 8e9)
    assert held.token_bytes == 262_144
    assert (held.cache, held.tokens, held.pages.requests, held.pages.tokens_per_s) == (0, 0, 0, 0)


def test_tokens_of_an_image() -> None:
    assert image_tokens(576, [(2, 2), (1, 3)], crossed=False) == 5 * 576
    assert image_tokens(576, [], crossed=False) == 576
    assert image_tokens(1601, [(2, 2)], crossed=True) == 1


def test_show_says_it(embedded_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(embedded_artifact), "--json", "--memory-gb", "0.5"]) == 0
    held = json.loads(capsys.readouterr().out)["artifact"]["capacity"]
    assert held["memory"] == 500_000_000
    assert 0 < held["slots"]["requests"] < held["pages"]["requests"]
    assert main(["show", str(embedded_artifact), "--memory-gb", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "held in 0.5 GB" in shown
    assert f"{held['pages']['requests']}" in shown


def test_plan_only_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(EMBEDDED), "--plan-only", "--memory-gb", "2"]) == 0
    assert "held in 2 GB" in capsys.readouterr().out

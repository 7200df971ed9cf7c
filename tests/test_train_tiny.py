"""The miniature checkpoints: what the training package writes, how it packs prompts, and where it thinks patches look."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers import AutoModelForImageTextToText, AutoProcessor

from staticvl.tools.development.train_tiny import cases
from staticvl.tools.development.training.cli import FAMILIES, family_of
from staticvl.tools.development.training.evaluation import answers, messages
from staticvl.tools.development.training.layout_mllama import PATCH
from staticvl.tools.development.training.loop import train
from staticvl.tools.development.training.packing import IGNORE, Example, ImageBatch
from staticvl.tools.development.training.probe import patch_owners
from staticvl.tools.drawings import Drawing, Shape, make_drawing, render

from .conftest import REPO

ASSETS = REPO / "tools" / "assets"
NAMES = sorted(FAMILIES)
DAY = "26 Jul 2024"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of a trained checkpoint; making it anew takes seconds."""
    return Tokenizer.from_file(str(ASSETS / f"tiny_{name}" / "tokenizer.json"))


@pytest.mark.parametrize("name", [name if name == "llava15" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_a_few_steps_give_a_whole_checkpoint(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, out = FAMILIES[name](), tmp_path / name
    monkeypatch.setattr(family, "tokenizer", lambda seed: tokenizer_of(name))
    few = replace(family.schedule, vision_steps=2, vision_batch=2, steps=2, batch=2, budget=60, extra_every=2)
    train(family, out, 0, few)
    trained = {path.name for path in (ASSETS / f"tiny_{name}").iterdir()}
    assert {path.name for path in out.iterdir()} == trained - {"README.md"}
    assert family_of(out) is FAMILIES[name]
    model, info = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(out)
    one_of_each = {len(case.images): case for case in cases(1, pairs=family.pairs)}
    assert sorted(one_of_each) == ([0, 1, 2] if family.pairs else [0, 1])
    for case in one_of_each.values():
        assert len(answers(processor, model.eval(), [case])) == 1


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_a_checkpoint(tmp_path: Path, name: str) -> None:
    """Without a step, what is written is what was read, whatever the seed."""
    family, start, out = FAMILIES[name](), ASSETS / f"tiny_{name}", tmp_path / "out"
    train(family, out, 1, replace(family.schedule, vision_steps=0, steps=0), start)
    for path in out.iterdir():
        assert path.read_bytes() == (start / path.name).read_bytes(), path.name


def test_llava16_begins_from_llava15() -> None:
    """LLaVA-1.6 begins with every weight of a LLaVA-1.5, and learns a newline of its own."""
    family = FAMILIES["llava16"]()
    model: Any = family.build(tokenizer_of("llava16"))
    family.begin_from(model, ASSETS / "tiny_llava15")
    start = AutoModelForImageTextToText.from_pretrained(ASSETS / "tiny_llava15", dtype=torch.float32).state_dict()
    weights = model.state_dict()
    assert set(weights) - set(start) == {"model.image_newline"}
    assert all(torch.equal(weights[name], value) for name, value in start.items())


@pytest.mark.parametrize("name", NAMES)
def test_trained_checkpoints_are_small_and_have_a_card(name: str) -> None:
    folder = ASSETS / f"tiny_{name}"
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 4 << 20
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("name", ["llava15", "mllama"])
def test_tokenizers_can_be_made_again(name: str) -> None:
    assert FAMILIES[name]().tokenizer(0).to_str() == tokenizer_of(name).to_str()


def test_both_llava_models_have_one_tokenizer() -> None:
    assert tokenizer_of("llava16").to_str() == tokenizer_of("llava15").to_str()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", [0, 1])
def test_rows_read_as_template_and_processor_write_them(name: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packer's tokens of a conversation of three turns are those of the published prompt."""
    family, processor = FAMILIES[name](), AutoProcessor.from_pretrained(ASSETS / f"tiny_{name}")
    packer = family.packer(tokenizer_of(name))
    monkeypatch.setattr(packer, "day", lambda: DAY, raising=False)
    case = next(case for case in cases(1) if case.turns)
    case = replace(case, images=(render(make_drawing(random.Random(0)), 64),) * images)
    prompt = processor.apply_chat_template(messages(case), add_generation_prompt=True, date_string=DAY)
    has_bos = prompt.startswith(processor.tokenizer.bos_token)
    batch = [list(case.images)] if images else None
    expected = processor(images=batch, text=[prompt], add_special_tokens=not has_bos)["input_ids"][0]
    turns = (*case.turns, (case.question, case.answer))
    tokens = family.prepare(case.images).tokens if images else []
    row = packer.conversation([Example(*turn) for turn in turns], tokens, 10_000)
    assert row.ids == [*expected, *packer.encode(case.answer)]
    targets = [target for target in row.targets if target != IGNORE]
    assert targets == [token for _, answer in turns for token in (*packer.encode(answer), packer.end_id)]


@pytest.mark.parametrize("form", [(64, 64), (60, 60), (128, 128), (100, 100), (300, 200), (96, 288), (480, 160)])
@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_known_to_look_where_they_look(name: str, form: tuple[int, int]) -> None:
    """Where patches are said to show a square, its pixels are; elsewhere they are not."""
    family = FAMILIES[name]()
    if not family.any_form and form != (64, 64):
        pytest.skip("takes squares of one size only")
    drawing = Drawing((Shape("square", "black", (0, 0, 0), 3, 8, 9),), (255, 255, 255))
    shown, empty = (render(d, max(form)).resize(form) for d in (drawing, replace(drawing, shapes=())))
    here, there = family.prepare([shown]), family.prepare([empty])
    covered = (patch_means(name, there) - patch_means(name, here)).sum(-1)  # (P,)
    covered = covered / covered.max()
    owned = patch_owners([(drawing,)], here)[0] == 0
    assert owned.sum() >= 4
    assert covered[owned].min() > 0.2
    assert covered[~owned].max() < 0.6


def patch_means(name: str, images: ImageBatch) -> Tensor:
    """(P, 3) mean pixel of each patch of one image, in the order of its embeddings; 0 for what is no patch."""
    pixels = images.inputs["pixel_values"].flatten(0, -4)  # (views, 3, S, S)
    means = avg_pool2d(pixels, PATCH if name == "mllama" else 8).flatten(2).mT  # (views, patches, 3)
    if name == "mllama":
        return torch.nn.functional.pad(means, (0, 0, 1, 0)).flatten(0, 1)  # the class token comes first
    if name == "llava15":
        return means[0]
    model: Any = FAMILIES[name]().build(tokenizer_of(name)).model
    packed, _ = model.pack_image_features([means], images.inputs["image_sizes"], "default", torch.zeros(3))
    return packed[0]

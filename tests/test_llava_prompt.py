"""LLaVA prompts against transformers' processor, and by hand for the original layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from staticvl.compiler.model_info import read_model_info
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import ModelInfo
from staticvl.runtime.processor.boxes import parse_boxes
from staticvl.runtime.processor.families import family, llava, llava_next, mllama
from staticvl.runtime.processor.images import ImageError
from staticvl.runtime.processor.prompt import Message, PromptError
from staticvl.runtime.processor.tokenizer import Tokenizer, load_tokenizer

from .checkpoints import MEAN, STD, tiny_llava


def load(folder: Path, tower: Path | None = None) -> tuple[ModelInfo, Tokenizer, str]:
    info, files = read_model_info(folder, read_config(folder, vision_tower=tower), vision_tower=tower)
    return info, load_tokenizer(folder, info.tokenizer), files["tokenizer/chat_template.jinja"].decode()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelInfo, Tokenizer, str]:
    folder = tiny_llava(tmp_path_factory.mktemp("hf") / "tiny").folder
    return folder, *load(folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelInfo, Tokenizer, str]:
    tiny = tiny_llava(tmp_path_factory.mktemp("original") / "tiny", layout="original")
    return tiny.folder, *load(tiny.folder, tiny.vision_tower)


def sample_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("sizes", [[], [(40, 30)], [(28, 28), (31, 90), (5, 3)]])
def test_prompt_equals_the_processor(hf: tuple[Path, ModelInfo, Tokenizer, str], sizes: list[tuple[int, int]]) -> None:
    folder, info, tokenizer, template = hf
    images = [sample_image(*size, seed=i) for i, size in enumerate(sizes)]
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    text = llava.to_text([Message("user", "What is in the picture?", images=len(images))], template, info, tokenizer)
    assert text == "USER: " + "<image>\n" * len(images) + "What is in the picture? ASSISTANT:"
    expected = processor(images=images or None, text=text, return_tensors="np")

    prompt = llava.raw_prompt(text, images, info, tokenizer)
    assert prompt.token_ids.dtype == prompt.rows.dtype == np.int32
    np.testing.assert_array_equal(prompt.token_ids, expected["input_ids"][0])
    shown = prompt.token_ids == info.tokenizer.image_token_id
    np.testing.assert_array_equal(prompt.rows[shown], np.arange(16 * len(images)))
    assert (prompt.rows[~shown] == -1).all()
    assert prompt.pixels.shape == (len(images), 28, 28, 3) and prompt.pixels.dtype == np.uint8
    if images:
        normalised = (prompt.pixels / 255 - np.array(MEAN)) / np.array(STD)
        np.testing.assert_allclose(normalised.transpose(0, 3, 1, 2), expected["pixel_values"], atol=1e-6)
    assert (prompt.length, prompt.image_tokens) == (shown.size, 16 * len(images))
    assert prompt.text_tokens == prompt.length - prompt.image_tokens
    assert prompt.state.dtype == np.int32 and prompt.state.shape == prompt.rows.shape and not prompt.state.any()
    assert prompt.grids is None and prompt.cross_attention is None
    assert [(frame.image_width, frame.image_height) for frame in prompt.frames] == sizes


def test_a_conversation_is_the_prompt_of_its_text(hf: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    _, info, tokenizer, template = hf
    messages, images = [Message("user", "What is it?", images=1)], [sample_image(40, 30)]
    for answered in (True, False):
        text = llava.to_text(messages, template, info, tokenizer, add_generation_prompt=answered)
        chat = llava.chat_prompt(messages, images, info, tokenizer, template, add_generation_prompt=answered)
        raw = llava.raw_prompt(text, images, info, tokenizer)
        np.testing.assert_array_equal(chat.token_ids, raw.token_ids)
        np.testing.assert_array_equal(chat.pixels, raw.pixels)
        assert text.endswith("ASSISTANT:") == answered


def test_original_prompt_by_hand(original: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    folder, info, tokenizer, template = original
    text = llava.to_text([Message("user", "What is it?", images=1)], template, info, tokenizer)
    assert text.startswith("A chat between a curious user and") and text.endswith(" USER: <image>\nWhat is it? ASSISTANT:")
    wide = sample_image(40, 20)
    prompt = llava.raw_prompt(text, [wide], info, tokenizer)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    before, after = (plain.encode(piece) for piece in text.split("<image>"))
    assert prompt.token_ids.tolist() == [1, *before, *[0] * 16, *after]
    assert prompt.rows.tolist() == [-1] * (len(before) + 1) + list(range(16)) + [-1] * len(after)
    np.testing.assert_array_equal(prompt.pixels[0, 0, 0], (122, 116, 104))  # padded above
    (frame,) = prompt.frames
    assert (frame.left, frame.top, frame.width, frame.height) == (0, -10, 40, 40)
    (box,) = parse_boxes("[0.25, 0.25, 0.75, 0.75]", prompt.frames)
    assert box.pixels == (10, 0, 30, 20)


def test_a_chat_in_the_original_layout_goes_on_after_the_answer(original: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    """The tokens of the first turn begin those of the whole chat, so that a cache can be kept between turns."""
    _, info, tokenizer, template = original
    chat = [Message("user", "What is it?", images=1), Message("assistant", "A circle."), Message("user", "Its colour?")]
    first, whole = (
        llava.raw_prompt(llava.to_text(part, template, info, tokenizer), [sample_image(9, 9)], info, tokenizer)
        for part in (chat[:1], chat)
    )
    assert whole.token_ids[: first.length].tolist() == first.token_ids.tolist()
    assert tokenizer.decode(whole.token_ids[first.length :].tolist(), skip_special=False) == (
        "A circle.</s>USER: Its colour? ASSISTANT:"
    )


def test_marks_in_the_text_say_where_images_stand(hf: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    _, info, tokenizer, template = hf
    parts = llava.parts_of("Is <image> like <image>?", 2, info)
    text = llava.to_text([Message("user", parts)], template, info, tokenizer)
    assert text == "USER: Is <image> like <image>? ASSISTANT:"
    prompt = llava.raw_prompt(text, [sample_image(9, 9), sample_image(30, 9, seed=1)], info, tokenizer)
    assert prompt.image_tokens == 32
    runs = np.flatnonzero(np.diff((prompt.rows >= 0).astype(int)) == 1)
    assert len(runs) == 2
    assert prompt.rows[runs + 1].tolist() == [0, 16]


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_adjacent_marks(layout: str, request: pytest.FixtureRequest) -> None:
    _, info, tokenizer, _ = request.getfixturevalue(layout)
    prompt = llava.raw_prompt("<image><image>", [sample_image(5, 5), sample_image(5, 6)], info, tokenizer)
    assert prompt.rows.tolist() == [-1, *range(32)]


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_errors(layout: str, request: pytest.FixtureRequest) -> None:
    _, info, tokenizer, _ = request.getfixturevalue(layout)
    with pytest.raises(PromptError, match="the prompt has 1 <image> mark but 2 images were given; write <image> once for each"):
        llava.raw_prompt("<image> x", [sample_image(5, 5)] * 2, info, tokenizer)
    with pytest.raises(PromptError, match="the prompt has 2 <image> marks but 1 image was given"):
        llava.raw_prompt("<image> x <image>", [sample_image(5, 5)], info, tokenizer)
    with pytest.raises(PromptError, match="the prompt has 1 <image> mark but 0 images were given"):
        llava.raw_prompt("<image> x", [], info, tokenizer)
    with pytest.raises(ImageError, match="does not exist"):
        llava.raw_prompt("<image> x", ["no.png"], info, tokenizer)


def test_tokens_that_the_model_does_not_have(hf: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    import msgspec

    _, info, tokenizer, _ = hf
    pad = tokenizer.vocabulary.token_id("<pad>")
    small = msgspec.structs.replace(info, vocab_size=pad)
    with pytest.raises(PromptError, match=f"the prompt holds token {pad} but the model knows {pad} tokens; take the special"):
        llava.raw_prompt("a<pad>", [], small, tokenizer)
    silent = Tokenizer(msgspec.structs.replace(tokenizer.config, add_bos=False), tokenizer.vocabulary)
    with pytest.raises(PromptError, match="the prompt is empty; expected some text or an image"):
        llava.raw_prompt("", [], info, silent)


def test_families_are_found_by_name() -> None:
    assert (family("llava"), family("llava_next"), family("mllama")) == (llava, llava_next, mllama)
    with pytest.raises(ValueError, match="the model family 'none' is not known to this runtime; known: llava"):
        family("none")

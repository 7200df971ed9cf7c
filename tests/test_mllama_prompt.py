"""Llama-3.2-Vision prompts: ids, tiles and what is seen of them against transformers' processor and mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil, get_all_supported_aspect_ratios
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask
from transformers.models.mllama.processing_mllama import (
    MllamaProcessor,
    build_string_from_input,
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from staticvl.runtime.artifact import ImageProcessorConfig, ModelInfo, RopeParameters, TokenizerConfig
from staticvl.runtime.processor.chat_template import MLLAMA_BASE, ChatTemplateError
from staticvl.runtime.processor.families import mllama
from staticvl.runtime.processor.images import ImageError
from staticvl.runtime.processor.prompt import IMAGE as IMAGE_PART
from staticvl.runtime.processor.prompt import Message, Prompt, PromptError
from staticvl.runtime.processor.tokenizer import Tokenizer, read_vocabulary

from .conftest import PUBLISHED

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIDE, TILES, KEYS = 28, 4, 5  # pixels, tiles of an image, keys of a tile
BOS, IMAGE = "<|begin_of_text|>", "<|image|>"
SPECIAL = (BOS, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", IMAGE)

# As the published one: the system block only where there are no images, and no system message beside them.
TEMPLATE = """\
{{- bos_token }}
{%- set found = namespace(images=false) %}
{%- for message in messages if message['content'] is not string %}
{%- for part in message['content'] if part['type'] == 'image' %}{% set found.images = true %}{% endfor %}
{%- endfor %}
{%- if found.images and messages[0]['role'] == 'system' %}
{{- raise_exception('Prompting with images is incompatible with system messages.') }}
{%- elif not found.images and messages[0]['role'] != 'system' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['content'] is string %}{{ message['content'] | trim }}
{%- else %}
{%- for part in message['content'] %}{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""


def write_tokenizer(folder: Path) -> Path:
    """Bytes and the special tokens, <|image|> last; BOS is put before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Library(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    begin = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=begin)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelInfo, Tokenizer, MllamaProcessor]:
    path = write_tokenizer(tmp_path_factory.mktemp("mllama"))
    vocabulary = read_vocabulary(path)
    image_id = vocabulary.token_id(IMAGE)
    assert image_id is not None and vocabulary.size == image_id + 1
    info = ModelInfo(
        family="mllama",
        layout="hf",
        hidden_size=16,
        vocab_size=image_id,  # as published, the image's token lies after the vocabulary
        rope=RopeParameters(theta=500000.0),
        eos_token_ids=(vocabulary.token_id("<|eot_id|>") or 0,),
        image=ImageProcessorConfig(
            mode="tiles", size=SIDE, mean=MEAN, std=STD, resample=2, rows=KEYS, mark=IMAGE, tiles=TILES,
            grids=tuple(get_all_supported_aspect_ratios(TILES)),
        ),
        tokenizer=TokenizerConfig(
            kind="tokenizers", style="hf", bos_token_id=vocabulary.token_id(BOS) or 0, add_bos=True, image_token_id=image_id,
            used=image_id,
        ),
    )  # fmt: skip
    reference = MllamaProcessor(
        MllamaImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, max_image_tiles=TILES, resample=2, image_mean=list(MEAN), image_std=list(STD)
        ),
        PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=BOS, eos_token="<|eot_id|>", pad_token="<|end_of_text|>"),
    )
    return info, Tokenizer(info.tokenizer, vocabulary), reference


def sample_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def referred(reference: MllamaProcessor, text: str, images: list[Image.Image]) -> Any:
    """What the processor makes; it is told that BOS is in the text, for it would put a second one before it."""
    return reference(images=[images] if images else None, text=[text], add_special_tokens=False, return_tensors="np")


def random_text(rng: np.random.Generator, image_count: int) -> str:
    """Words and marks in any order, so also marks first, last and side by side; BOS at the front, somewhere, or nowhere."""
    parts = [IMAGE] * image_count + [["a b", "", "so? ", "x", "\n"][i] for i in rng.integers(0, 5, int(rng.integers(1, 6)))]
    rng.shuffle(parts)
    if (place := int(rng.integers(0, 4))) < 2:
        parts.insert(place * int(rng.integers(0, len(parts))), BOS)
    return "".join(parts)


def check_sight(prompt: Prompt, info: ModelInfo, dense: np.ndarray) -> None:
    """Against the mask [L, N, t] of the processor and what the model makes of it: [L, N * t * KEYS] added to scores."""
    cross_attention, image_count = prompt.cross_attention, len(prompt.frames)
    assert cross_attention is not None and cross_attention.visible.dtype == bool and cross_attention.gates.dtype == np.float32
    mask, row_mask = _prepare_cross_attention_mask(torch.from_numpy(dense)[None].float(), KEYS, torch.float32)  # type: ignore[arg-type]
    blind = row_mask[0, 0, :, 0].numpy() == 0
    seen = (mask[0, 0] == 0).numpy()
    assert cross_attention.visible.shape == (prompt.length, image_count * TILES)
    np.testing.assert_array_equal(cross_attention.gates[:, 1], 1 - blind)
    if info.text_before_image == "transformers":
        np.testing.assert_array_equal(np.repeat(cross_attention.visible, KEYS, axis=1), seen)
        assert (cross_attention.gates[:, 0] == 1).all()
        np.testing.assert_array_equal(prompt.state, np.where(blind, image_count, 0))
    else:
        np.testing.assert_array_equal(cross_attention.visible, dense.reshape(prompt.length, -1).astype(bool))
        np.testing.assert_array_equal(cross_attention.gates[:, 0], 1 - blind)
        assert not cross_attention.visible[blind].any() and not prompt.state.any()
    assert prompt.state.dtype == np.int32


@pytest.mark.parametrize("before", ["transformers", "meta"])
def test_prompts_equal_the_processor(model: tuple[ModelInfo, Tokenizer, MllamaProcessor], before: Any) -> None:
    info, tokenizer, reference = model
    info = msgspec.structs.replace(info, text_before_image=before)
    rng = np.random.default_rng(3)
    blind = 0
    for _ in range(120):
        image_count = int(rng.integers(0, 5))
        images = [sample_image(int(w), int(h), seed=w) for w, h in rng.integers(5, 120, (image_count, 2))]
        text = random_text(rng, image_count)
        expected = referred(reference, text, images)
        prompt = mllama.raw_prompt(text, images, info, tokenizer)
        np.testing.assert_array_equal(prompt.token_ids, expected["input_ids"][0], err_msg=text)
        assert prompt.token_ids.dtype == prompt.rows.dtype == np.int32 and (prompt.rows == -1).all()
        assert (prompt.image_tokens, prompt.pixels.shape) == (image_count, (image_count * TILES, SIDE, SIDE, 3))
        assert [(frame.width, frame.height) for frame in prompt.frames] == [image.size for image in images]
        assert prompt.grids is not None and prompt.grids.dtype == np.int32 and prompt.grids.shape == (image_count, 2)
        if not images:
            assert prompt.cross_attention is None and not prompt.state.any()
            continue
        ids = [info.image.grids.index((int(r), int(c))) + 1 for r, c in prompt.grids]
        assert ids == expected["aspect_ratio_ids"][0].tolist()
        check_sight(prompt, info, expected["cross_attention_mask"][0])
        blind += int(np.count_nonzero(prompt.cross_attention.gates[:, 1] == 0)) if prompt.cross_attention else 0
        check_pixels(prompt, expected["pixel_values"][0])
    assert blind > 100


def check_pixels(prompt: Prompt, expected: np.ndarray) -> None:
    """`expected` [N, t, 3, S, S], normalised, with zeros for tiles that are not in use."""
    values = ((prompt.pixels / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2).reshape(expected.shape)
    assert prompt.grids is not None
    for place, used in enumerate(prompt.grids.prod(axis=1)):
        np.testing.assert_allclose(values[place, :used], expected[place, :used], atol=1e-6)
        assert not prompt.pixels[place * TILES + used : (place + 1) * TILES].any() and not expected[place, used:].any()


def test_sight_equals_the_mask_of_many_prompts(model: tuple[ModelInfo, Tokenizer, MllamaProcessor]) -> None:
    info, image_id = model[0], 7
    rng = np.random.default_rng(4)
    for _ in range(1500):
        ids = np.where(rng.random(int(rng.integers(1, 14))) < 0.3, image_id, 1)
        ids[np.flatnonzero(ids == image_id)[4:]] = 1
        tiles = rng.integers(1, TILES + 1, np.count_nonzero(ids == image_id))
        if not tiles.size:
            continue
        sparse = get_cross_attention_token_mask(ids.tolist(), image_id)
        dense = convert_sparse_cross_attention_mask_to_dense([sparse], [tiles.tolist()], TILES, len(ids))[0]
        meta = msgspec.structs.replace(info, text_before_image="meta")
        cross_attention = mllama.cross_attention_mask(ids == image_id, tiles, meta)
        np.testing.assert_array_equal(cross_attention.visible, dense.reshape(len(ids), -1).astype(bool), err_msg=str(ids))


@pytest.mark.parametrize(
    ("ids", "spans"),
    [
        ("1I56", [(1, 4)]),
        ("1I5I67", [(1, 3), (3, 6)]),
        ("1II56", [(1, 5), (2, 5)]),
        ("I5II7", [(0, 2), (2, 5), (3, 5)]),
        ("1I", [(1, 2)]),
    ],
)
def test_spans_by_hand(model: tuple[ModelInfo, Tokenizer, MllamaProcessor], ids: str, spans: list[tuple[int, int]]) -> None:
    info = msgspec.structs.replace(model[0], text_before_image="meta")
    shown = np.array([letter == "I" for letter in ids])
    cross_attention = mllama.cross_attention_mask(shown, np.full(len(spans), 2), info)
    for place, (start, end) in enumerate(spans):
        tiles = cross_attention.visible[:, place * TILES : (place + 1) * TILES]
        expected = [[start <= row < end] * 2 + [False] * 2 for row in range(len(ids))]
        assert tiles.tolist() == expected


@pytest.mark.parametrize(
    "text", ["", "hello", IMAGE, f"{IMAGE}{IMAGE}hello", f"x{IMAGE}", f"{BOS}{IMAGE}x", f"{IMAGE}{BOS}x", f"{IMAGE} a{BOS}b"]
)
def test_bos_is_put_in_once(model: tuple[ModelInfo, Tokenizer, MllamaProcessor], text: str) -> None:
    info, tokenizer, _ = model
    prompt = mllama.raw_prompt(text, [sample_image(9, 9)] * text.count(IMAGE), info, tokenizer)
    assert np.count_nonzero(prompt.token_ids == info.tokenizer.bos_token_id) == 1
    assert tokenizer.decode(prompt.token_ids.tolist(), skip_special=False) == build_string_from_input(text, BOS, IMAGE)


def chat(model: tuple[ModelInfo, Tokenizer, MllamaProcessor], template: str, *messages: Message) -> str:
    info, tokenizer, _ = model
    images = [sample_image(9, 9)] * sum(message.images for message in messages)
    text = mllama.to_text(messages, template, info, tokenizer)
    prompt = mllama.chat_prompt(messages, images, info, tokenizer, template)
    assert tokenizer.decode(prompt.token_ids.tolist(), skip_special=False) == text
    assert text.startswith(BOS) and text.count(BOS) == 1
    return text.removeprefix(BOS)


USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def test_conversations(model: tuple[ModelInfo, Tokenizer, MllamaProcessor]) -> None:
    one = chat(model, TEMPLATE, Message("user", " What? ", images=1))
    assert one == f"{USER}{IMAGE} What? {ANSWER}"
    placed = chat(model, TEMPLATE, Message("user", mllama.parts_of(f"Is {IMAGE} like {IMAGE}?", 2, model[0])))
    assert placed == f"{USER}Is {IMAGE} like {IMAGE}?{ANSWER}", "the template was told of the images: no system block"
    assert "Today" in chat(model, TEMPLATE, Message("user", "Hello"))
    assert "system<|end_header_id|>\n\nBe brief.<|eot_id|>" in chat(
        model, TEMPLATE, Message("system", " Be brief. "), Message("user", "Hello")
    )
    turns = (Message("user", "What?", images=1), Message("assistant", "A cat."), Message("user", "And this?", images=1))
    assert chat(model, TEMPLATE, *turns) == f"{USER}{IMAGE}What?{ANSWER}A cat.<|eot_id|>{USER}{IMAGE}And this?{ANSWER}"


def test_base_models_continue_text(model: tuple[ModelInfo, Tokenizer, MllamaProcessor]) -> None:
    assert chat(model, MLLAMA_BASE, Message("user", "If I had", images=1)) == f"{IMAGE}If I had"
    placed = Message("user", mllama.parts_of(f"See {IMAGE} and", 1, model[0]))
    assert chat(model, MLLAMA_BASE, placed) == f"See {IMAGE} and"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
def test_the_published_template(model: tuple[ModelInfo, Tokenizer, MllamaProcessor]) -> None:
    folder = PUBLISHED / "meta-llama--Llama-3.2-11B-Vision-Instruct"
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    assert chat(model, template, Message("user", " What? ", images=1)) == f"{USER}{IMAGE} What? {ANSWER}"
    assert "\n\nBe brief.<|eot_id|>" in chat(model, template, Message("system", " Be brief. "), Message("user", "Hello"))
    with pytest.raises(ChatTemplateError, match="Prompting with images is incompatible with system messages"):
        chat(model, template, Message("system", "Be brief."), Message("user", "What?", images=1))


def test_a_system_message_beside_images(model: tuple[ModelInfo, Tokenizer, MllamaProcessor]) -> None:
    """Refused, with what can be done; or the instruction moves to the first user turn, after its leading images."""
    info, tokenizer, _ = model
    system = Message("system", " Be brief. ")
    for text in ("What?", f"What is {IMAGE}?"):
        turns = [system, Message("user", mllama.parts_of(text, 1, info))]
        with pytest.raises(ChatTemplateError, match=r"incompatible with system messages; put the .*--system-in-user"):
            chat(model, TEMPLATE, *turns)
        moved = mllama.to_text(turns, TEMPLATE, info, tokenizer, system_in_user=True).removeprefix(BOS)
        shown = f"{IMAGE}Be brief.\n\nWhat?" if IMAGE not in text else f"Be brief.\n\n{text}"
        assert moved == f"{USER}{shown}{ANSWER}"
    turns = [system, Message("user", (IMAGE_PART,)), Message("assistant", "A."), Message("user", "B?")]
    moved = mllama.to_text(turns, TEMPLATE, info, tokenizer, system_in_user=True).removeprefix(BOS)
    assert moved == f"{USER}{IMAGE}Be brief.\n\n{ANSWER}A.<|eot_id|>{USER}B?{ANSWER}"
    kept = [system, Message("user", "Hello")]
    plain, with_move = (mllama.to_text(kept, TEMPLATE, info, tokenizer, system_in_user=moves) for moves in (False, True))
    assert plain == with_move, "what the template takes stays where it is"
    refusing = "{{ raise_exception('no') }}"
    with pytest.raises(ChatTemplateError, match=r"refuses these messages: no$"):
        mllama.to_text(turns, refusing, info, tokenizer)


def test_earlier_text_depends_on_later_images(model: tuple[ModelInfo, Tokenizer, MllamaProcessor]) -> None:
    """What a chat may keep of its first turn: with transformers' rule nothing once an image is added, else all of it."""
    info, tokenizer, _ = model
    image = sample_image(40, 40)
    for before, kept in (("transformers", 0), ("meta", 5)):
        rule = msgspec.structs.replace(info, text_before_image=before)
        first = mllama.raw_prompt(f"{BOS}a{IMAGE}bc", [image], rule, tokenizer)
        whole = mllama.raw_prompt(f"{BOS}a{IMAGE}bcd{IMAGE}e", [image] * 2, rule, tokenizer)
        assert whole.cross_attention is not None and first.cross_attention is not None
        assert first.state.tolist() == [1 - kept // 5, 1 - kept // 5, 0, 0, 0]
        same = first.state == whole.state[:5]
        assert (int(np.argmin(same)) if not same.all() else 5) == kept
        np.testing.assert_array_equal(first.cross_attention.visible[2:], whole.cross_attention.visible[2:5, :TILES])


def test_errors(model: tuple[ModelInfo, Tokenizer, MllamaProcessor]) -> None:
    info, tokenizer, _ = model
    with pytest.raises(PromptError, match=r"has 1 <\|image\|> mark but 2 images were given; write <\|image\|> once for each"):
        mllama.raw_prompt(f"{IMAGE} x", [sample_image(5, 5)] * 2, info, tokenizer)
    with pytest.raises(PromptError, match=r"has 2 <\|image\|> marks but 1 image was given"):
        mllama.raw_prompt(f"{IMAGE} x {IMAGE}", [sample_image(5, 5)], info, tokenizer)
    with pytest.raises(PromptError, match=r"has 1 <\|image\|> mark but 0 images were given"):
        mllama.raw_prompt(f"{IMAGE} x", [], info, tokenizer)
    with pytest.raises(ImageError, match=r"no\.png does not exist"):
        mllama.raw_prompt(f"{IMAGE} x", ["no.png"], info, tokenizer)
    small = msgspec.structs.replace(info, vocab_size=info.vocab_size - 1)
    with pytest.raises(PromptError, match=r"the prompt holds token \d+ but the model knows"):
        mllama.raw_prompt("x<|python_tag|>", [], small, tokenizer)

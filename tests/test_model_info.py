"""Facts from every form in which checkpoints keep their settings, and every setting that must be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from staticvl.compiler.model_info import read_model_info
from staticvl.model_defs.config import ConfigError, read_config
from staticvl.runtime.artifact import ModelInfo, SamplingDefaults
from staticvl.runtime.processor.chat_template import LLAVA_HF, LLAVA_ORIGINAL

from .checkpoints import CHAT_TEMPLATE, MEAN, STD, tiny_llava, write_json
from .test_source import IRREGULAR, make_irregular

PUBLISHED = Path(__file__).parents[2] / "shared" / "published"
SILENT = SamplingDefaults(top_k=50)  # what transformers makes of a file that says nothing of sampling


@pytest.fixture(scope="module")
def hf_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("hf") / "tiny").folder


@pytest.fixture(scope="module")
def original_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("original") / "tiny", layout="original").folder


@pytest.fixture
def hf(hf_source: Path, tmp_path: Path) -> Path:
    return copy(hf_source, tmp_path / "hf")


@pytest.fixture
def original(original_source: Path, tmp_path: Path) -> Path:
    return copy(original_source, tmp_path / "original")


def copy(source: Path, folder: Path) -> Path:
    """Everything but the weights, which are not read here."""
    return Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))


def read(folder: Path) -> tuple[ModelInfo, dict[str, bytes]]:
    tower = folder / "clip" if (folder / "clip").is_dir() else None
    return read_model_info(folder, read_config(folder, vision_tower=tower), vision_tower=tower)


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, made where it is missing; None takes the key out."""
    data = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, {key: value for key, value in (data | values).items() if value is not None})


def test_hf_layout(hf: Path) -> None:
    info, files = read(hf)
    assert (info.family, info.layout, info.hidden_size, info.vocab_size) == ("llava", "hf", 64, 389)
    assert (info.eos_token_ids, info.stop_strings, info.rope.theta) == ((2,), (), 10000.0)
    image, tokenizer = info.image, info.tokenizer
    assert (image.mode, image.size, image.rows, image.mark, image.resample) == ("crop", 28, 16, "<image>", 3)
    assert (image.mean, image.std) == (tuple(MEAN), tuple(STD))
    assert image.rescale == pytest.approx(1 / 255)
    assert (tokenizer.kind, tokenizer.style, tokenizer.bos_token_id, tokenizer.add_bos) == ("tokenizers", "hf", 1, True)
    reference = AutoTokenizer.from_pretrained(hf)
    assert tokenizer.image_token_id == reference.convert_tokens_to_ids("<image>")
    assert tokenizer.used == len(reference) < info.vocab_size
    assert info.sampling == SILENT
    assert files == {
        "tokenizer/tokenizer.json": (hf / "tokenizer.json").read_bytes(),
        "tokenizer/chat_template.jinja": CHAT_TEMPLATE.encode(),
    }


def test_original_layout(original: Path) -> None:
    info, files = read(original)
    assert (info.layout, info.vocab_size, info.stop_strings, info.eos_token_ids) == ("original", 389, ("</s>",), (2,))
    assert (info.image.mode, info.image.size, info.image.rows, info.image.mark) == ("pad", 28, 16, "<image>")
    tokenizer = info.tokenizer
    assert (tokenizer.kind, tokenizer.style, tokenizer.add_bos, tokenizer.legacy) == ("sentencepiece", "original", True, False)
    assert (tokenizer.image_token_id, tokenizer.used, tokenizer.added_tokens) == (None, 389, {})
    assert files == {
        "tokenizer/tokenizer.model": (original / "tokenizer.model").read_bytes(),
        "tokenizer/chat_template.jinja": LLAVA_ORIGINAL.encode(),
    }


def test_published_settings_are_understood(hf: Path, original: Path) -> None:
    """The published JSON files, except for those that fix the size of the tiny models."""
    theirs = PUBLISHED / "llava-hf--llava-1.5-7b-hf"
    if not theirs.is_dir():
        pytest.skip("the published files are not beside this checkout")
    preprocessor = json.loads((theirs / "preprocessor_config.json").read_text())
    side = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    write_json(hf / "preprocessor_config.json", preprocessor | side)
    change(hf / "processor_config.json", **json.loads((theirs / "processor_config.json").read_text()) | {"patch_size": 7})
    for name in ("chat_template.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(theirs / name, hf / name)
    info, files = read(hf)
    assert (info.image.mode, info.tokenizer.add_bos, info.sampling) == ("crop", True, SILENT)
    assert b"{% generation %}" in files["tokenizer/chat_template.jinja"]

    theirs = PUBLISHED / "openai--clip-vit-large-patch14-336"
    preprocessor = json.loads((theirs / "preprocessor_config.json").read_text())
    write_json(original / "clip" / "preprocessor_config.json", preprocessor | {"size": 28, "crop_size": 28})
    theirs = PUBLISHED / "liuhaotian--llava-v1.5-7b"
    for name in ("generation_config.json", "tokenizer_config.json"):
        shutil.copy(theirs / name, original / name)
    info, _ = read(original)
    assert (info.image.mode, info.tokenizer.add_bos, info.eos_token_ids) == ("pad", True, (2,))


@pytest.mark.parametrize("pad", [False, True])
def test_processor_saved_by_transformers(hf: Path, pad: bool) -> None:
    """transformers 5 nests the image processor in processor_config.json and writes chat_template.jinja."""
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.25, 0.125]}
    image_processor = LlavaImageProcessorPil(**sizes, do_pad=True) if pad else CLIPImageProcessorPil(**sizes)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (hf / name).unlink()
    LlavaProcessor(
        image_processor, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(hf)  # fmt: skip
    assert not (hf / "preprocessor_config.json").exists()
    info, files = read(hf)
    assert info.image.mode == ("pad" if pad else "crop")
    assert info.image.mean == (0.5, 0.25, 0.125)
    assert (info.tokenizer.add_bos, info.tokenizer.bos_token_id) == (True, 1)
    assert files["tokenizer/chat_template.jinja"].decode() == template


def test_sources_of_image_settings(hf: Path, original: Path) -> None:
    (hf / "preprocessor_config.json").unlink()
    (hf / "processor_config.json").unlink()
    info, _ = read(hf)
    assert (info.image.mode, info.image.mean, info.image.std) == ("crop", tuple(MEAN), tuple(STD))
    change(original / "clip" / "preprocessor_config.json", image_std=[1, 2, 3], rescale_factor=0.5, resample=2)
    info, _ = read(original)
    assert (info.image.std, info.image.rescale, info.image.resample) == ((1.0, 2.0, 3.0), 0.5, 2)
    change(original / "config.json", mm_vision_tower="clip")  # a folder inside the checkpoint, named by its config
    info, _ = read_model_info(original, read_config(original), vision_tower=None)
    assert info.image.std == (1.0, 2.0, 3.0)
    change(original / "preprocessor_config.json", image_std=[4, 5, 6])  # the checkpoint's own goes first
    assert read(original)[0].image.std == (4.0, 5.0, 6.0)


@pytest.mark.parametrize("form", ["old", "image_size_only"])
def test_old_processor_configs_count_the_class_token(hf: Path, form: str) -> None:
    values = {"num_additional_image_tokens": None}
    change(
        hf / "processor_config.json",
        **values if form == "old" else values | {"patch_size": None, "vision_feature_select_strategy": None},
    )
    assert read(hf)[0].image.rows == 16


def test_full_strategy_keeps_the_class_row(hf: Path) -> None:
    change(hf / "config.json", vision_feature_select_strategy="full")
    change(hf / "processor_config.json", vision_feature_select_strategy="full")
    assert read(hf)[0].image.rows == 17


def test_generation_config(hf: Path) -> None:
    change(
        hf / "generation_config.json", eos_token_id=[2, 7], do_sample=True, temperature=0.6, top_p=0.9, top_k=5, max_length=20,
        length_penalty=1.5,
    )  # fmt: skip
    info, _ = read(hf)
    assert info.eos_token_ids == (2, 7)
    assert info.sampling == SamplingDefaults(do_sample=True, temperature=0.6, top_p=0.9, top_k=5)
    (hf / "generation_config.json").unlink()
    info, _ = read(hf)
    assert (info.eos_token_ids, info.sampling) == ((2,), SILENT)


def test_sources_of_the_template(hf: Path) -> None:
    def template() -> str:
        return read(hf)[1]["tokenizer/chat_template.jinja"].decode()

    (hf / "chat_template.json").unlink()
    assert template() == LLAVA_HF
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE + "1"}]
    change(hf / "tokenizer_config.json", chat_template=several)
    assert template() == CHAT_TEMPLATE + "1"
    change(hf / "tokenizer_config.json", chat_template=CHAT_TEMPLATE + "2")
    assert template() == CHAT_TEMPLATE + "2"
    change(hf / "processor_config.json", chat_template=CHAT_TEMPLATE + "3")
    assert template() == CHAT_TEMPLATE + "3"
    change(hf / "chat_template.json", chat_template=CHAT_TEMPLATE + "4")
    assert template() == CHAT_TEMPLATE + "4"
    (hf / "chat_template.jinja").write_text(CHAT_TEMPLATE + "é", encoding="utf-8")
    assert template() == CHAT_TEMPLATE + "é"


def test_the_original_layout_ignores_the_template_of_its_language_model(original: Path) -> None:
    change(original / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    assert read(original)[1]["tokenizer/chat_template.jinja"].decode() == LLAVA_ORIGINAL
    (original / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert read(original)[1]["tokenizer/chat_template.jinja"].decode() == CHAT_TEMPLATE


def test_bos_settings(hf: Path, original: Path) -> None:
    assert json.loads((original / "tokenizer_config.json").read_text())["bos_token"]["content"] == "<s>"
    change(hf / "tokenizer_config.json", add_bos_token=None)  # then tokenizer.json's post-processor decides
    assert read(hf)[0].tokenizer.add_bos is True
    data = json.loads((hf / "tokenizer.json").read_text())
    write_json(hf / "tokenizer.json", data | {"post_processor": {"type": "Sequence", "processors": [data["post_processor"]]}})
    assert read(hf)[0].tokenizer.add_bos is True
    write_json(hf / "tokenizer.json", data | {"post_processor": None})
    assert read(hf)[0].tokenizer.add_bos is False
    change(hf / "tokenizer_config.json", bos_token=None)
    assert read(hf)[0].tokenizer.bos_token_id == 1
    (original / "tokenizer_config.json").unlink()
    assert read(original)[0].tokenizer.add_bos is True
    change(original / "tokenizer_config.json", add_bos_token=False, legacy=True)
    tokenizer = read(original)[0].tokenizer
    assert (tokenizer.add_bos, tokenizer.legacy) == (False, True)


def sentencepiece_only(hf: Path, original: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of the hf layout with tokenizer.model and two added tokens."""
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer_config.json").unlink()
    shutil.copy(original / "tokenizer.model", hf)
    write_json(hf / "added_tokens.json", {"<image>": 389, "<pad>": 390})
    change(hf / "config.json", image_token_index=389)
    config = json.loads((hf / "config.json").read_text())
    config["text_config"]["vocab_size"] = 400
    write_json(hf / "config.json", config)
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return hf, flags


def test_tokenizer_model_with_added_tokens(hf: Path, original: Path) -> None:
    folder, flags = sentencepiece_only(hf, original)
    tokens = {"1": {"content": "<s>", **flags}, "389": {"content": "<image>", **flags}}
    for known in ({}, {"added_tokens_decoder": tokens}):
        change(folder / "tokenizer_config.json", **known)
        info, files = read(folder)
        assert (info.tokenizer.kind, info.tokenizer.style, info.tokenizer.used) == ("sentencepiece", "hf", 391)
        assert info.tokenizer.added_tokens == {"<image>": 389, "<pad>": 390}
        assert info.image.mark == "<image>"
        assert "tokenizer/tokenizer.model" in files
    assert len(LlamaTokenizer.from_pretrained(folder)) >= 390


def test_the_original_layout_prefers_its_model_file(hf: Path, original: Path) -> None:
    shutil.copy(hf / "tokenizer.json", original)
    assert read(original)[0].tokenizer.kind == "sentencepiece"
    (original / "tokenizer.model").unlink()
    assert read(original)[0].tokenizer.kind == "tokenizers"


def fails(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"crop_size": {"height": 56, "width": 56}},
            r"crop_size is 56 but the vision tower takes 28 x 28 pixels .*; expected 28",
        ),
        ({"crop_size": {"height": 28, "width": 56}}, r"crop_size is \{.*\}; expected one number under height and width"),
        ({"size": 56}, "size is 56 but the vision tower takes 28 x 28"),
        ({"size": {"height": 28, "width": 28}}, "size is .*; expected one number under shortest_edge"),
        ({"size": {"shortest_edge": 28, "longest_edge": 56}}, "size is .*; expected one number under shortest_edge"),
        ({"size": {}}, r"size is \{\}; expected one number under shortest_edge"),
        ({"size": "28"}, "size is '28'; expected a positive number of pixels"),
        ({"do_resize": False}, "do_resize is False; supported: true"),
        ({"do_center_crop": False}, "do_center_crop is False; supported: true"),
        ({"do_rescale": False}, "do_rescale is False; supported: true"),
        ({"do_normalize": False}, "do_normalize is False; supported: true"),
        ({"do_pad": True}, "do_pad is True; supported: false"),
        ({"image_mean": [1, 2]}, r"image_mean is \[1, 2\]; expected three numbers"),
        ({"image_std": "x"}, "image_std is 'x'; expected three numbers"),
        ({"rescale_factor": 0}, "rescale_factor is 0; expected a number above 0"),
        ({"resample": 9}, "resample is 9; expected a PIL filter number, 0 to 5"),
    ],
)
def test_refused_image_settings(hf: Path, values: dict[str, Any], message: str) -> None:
    change(hf / "preprocessor_config.json", **values)
    fails(hf, rf"preprocessor_config\.json: {message}")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("processor_config.json", {"num_additional_image_tokens": 0}, "patch_size 7, .* 0 and .* make 15 .* gives 16; correct"),
        ("processor_config.json", {"patch_size": 14}, "patch_size 14, .* make 4 tokens per image"),
        ("processor_config.json", {"patch_size": 0}, "patch_size is 0; expected an integer of at least 1"),
        ("processor_config.json", {"image_token": "<pic>"}, "image_token is '<pic>' but the image token of .* '<image>'"),
        ("tokenizer_config.json", {"image_token": {"content": "<pic>"}}, "image_token is '<pic>' but"),
        ("tokenizer_config.json", {"add_eos_token": True}, "add_eos_token is True; supported: false"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token is 'yes'; expected true or false"),
        ("tokenizer_config.json", {"bos_token": "<bos>"}, "bos_token is '<bos>', which the tokenizer does not know; "),
        ("chat_template.json", {"chat_template": [{"name": "rag"}]}, ".* neither a text nor a list with one named 'default'"),
        ("chat_template.json", {"chat_template": 3}, "chat_template is neither a text"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is '2'; expected a token id or a list of them"),
        ("generation_config.json", {"eos_token_id": []}, r"eos_token_id is \[\]; expected"),
        ("generation_config.json", {"do_sample": 1}, "do_sample is 1; expected true or false"),
        ("generation_config.json", {"temperature": -1}, "temperature is -1; expected a number of at least 0"),
        ("generation_config.json", {"top_p": 0}, "top_p is 0; expected a number above 0"),
        ("generation_config.json", {"top_p": 1.5}, "top_p is 1.5; expected at most 1"),
        ("generation_config.json", {"top_k": 2.5}, "top_k is 2.5; expected an integer of at least 0"),
    ],
)  # fmt: skip
def test_refused_settings(hf: Path, file: str, values: dict[str, Any], message: str) -> None:
    change(hf / file, **values)
    fails(hf, rf"{file}: {message}")


@pytest.mark.parametrize("token_id", [10**9, 1 << 22, -1, 1.5])
@pytest.mark.parametrize("place", ["vocab", "added"])
def test_ids_of_tokens_are_bounded(hf: Path, place: str, token_id: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the library makes a table that long."""
    data = json.loads((hf / "tokenizer.json").read_text())
    if place == "vocab":
        data["model"]["vocab"]["far"] = token_id
    else:
        data["added_tokens"].append({**data["added_tokens"][-1], "content": "far", "id": token_id})
    write_json(hf / "tokenizer.json", data)
    monkeypatch.setattr("tokenizers.Tokenizer.from_file", None)
    fails(hf, rf"tokenizer\.json: token 'far' has the id {token_id}; expected a number below 4194304")


@pytest.mark.parametrize("token_id", ["1000000000", "x", "9" * 5000])
def test_ids_of_added_tokens_are_bounded(hf: Path, original: Path, token_id: str) -> None:
    folder, flags = sentencepiece_only(hf, original)
    change(folder / "tokenizer_config.json", added_tokens_decoder={token_id: {"content": "<image>", **flags}})
    fails(folder, r"tokenizer_config\.json: token '<image>' has the id .*; expected a number below 4194304")
    change(folder / "tokenizer_config.json", added_tokens_decoder=[1])
    fails(folder, r"added_tokens_decoder is \[1\]; expected an object")
    change(folder / "tokenizer_config.json", added_tokens_decoder=None)
    write_json(folder / "added_tokens.json", {"<image>": 10**9})
    fails(folder, r"added_tokens\.json: token '<image>' has the id 1000000000; expected a number below")


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "spiece.model"]
)
def test_what_is_no_file_is_not_opened(hf: Path, kind: str, name: str) -> None:
    (hf / name).unlink(missing_ok=True)
    make_irregular(hf / name, kind)
    fails(hf, rf"{name} is {kind}.*; expected a file")


def test_a_tower_folder_with_a_pipe(original: Path) -> None:
    make_irregular(original / "clip" / "pytorch_model.bin.index.json", "a pipe")
    fails(original, r"clip/pytorch_model\.bin\.index\.json is a pipe; expected a file")


def test_json_that_cannot_be_read_as_it_is(hf: Path) -> None:
    path = hf / "generation_config.json"
    for text, message in (
        ('{"top_k": 1, "top_k": 2}', "'top_k' is there twice, as 1 and 2"),
        ("[" * 100_000, "nested too deeply"),
        ('{"top_k": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"temperature": NaN}', "temperature is nan; expected a number"),
        ('{"temperature": Infinity}', "temperature is inf; expected a number"),
        ('{"top_k": 1' + "0" * 30 + "}", "expected an integer of at least 0 and at most 2147483647"),
        ('{"eos_token_id": 1' + "0" * 30 + "}", "expected a token id or a list of them"),
    ):
        path.write_text(text)
        fails(hf, message)
    path.write_text('{"top_k": 7, "top_k": 7}')
    assert read(hf)[0].sampling.top_k == 7


def test_refused_templates(hf: Path) -> None:
    path = hf / "chat_template.jinja"
    path.write_text("{% if %}")
    fails(hf, r"the chat template is not valid Jinja .*; correct the checkpoint's chat template")
    path.write_text("{{ raise_exception('no') }}")
    fails(hf, "the chat template refuses these messages: no; correct")
    path.write_text("{{ messages[0].content[-1].text }}")
    fails(
        hf,
        "the chat template does not fit a message with 1 image: the prompt has 0 <image> marks but .* Put the template of the",
    )
    path.write_text("{% for part in messages[0].content %}<image>{% endfor %}")
    fails(hf, "does not fit a message with 1 image: the prompt has 2 <image> marks but 1 image was given")
    path.write_bytes(b"\xff\xfe")
    fails(hf, r"chat_template\.jinja is not UTF-8 text")


def test_refused_files(hf: Path, original: Path) -> None:
    (original / "tokenizer.model").write_bytes(b"x")
    fails(original, r"tokenizer\.model is not a usable sentencepiece model")
    (original / "tokenizer.model").unlink()
    fails(original, r"holds neither tokenizer\.json nor tokenizer\.model; copy one")
    (hf / "generation_config.json").write_text("{")
    fails(hf, r"generation_config\.json is not valid JSON .*; fetch the file again")
    (hf / "generation_config.json").write_text("[]")
    fails(hf, r"generation_config\.json holds a list; expected a JSON object")
    (hf / "generation_config.json").unlink()
    (hf / "tokenizer.json").write_text("{}")
    fails(hf, r"tokenizer\.json is not a usable tokenizer\.json")


def test_an_image_token_that_the_tokenizer_lacks(hf: Path) -> None:
    change(hf / "config.json", image_token_index=388)
    fails(hf, r"tokenizer\.json has no added token with id 388, which config\.json names as image token; take the tokenizer")
    change(hf / "config.json", image_token_index=300)  # an ordinary piece is no mark
    fails(hf, "has no added token with id 300")


def test_refused_added_tokens(hf: Path, original: Path) -> None:
    folder, flags = sentencepiece_only(hf, original)
    for name, what in (
        ("lstrip", "lstrip"),
        ("rstrip", "rstrip"),
        ("single_word", "single_word"),
        ("special", "special false"),
    ):
        entry = {"content": "<image>", **flags, name: name != "special"}
        change(folder / "tokenizer_config.json", added_tokens_decoder={"389": entry})
        fails(
            folder, f"the added token '<image>' has {what}, which is not supported with tokenizer.model; save the tokenizer as"
        )
    change(folder / "tokenizer_config.json", added_tokens_decoder={"391": {"content": "<image>", **flags}})
    fails(folder, r"added_tokens\.json: '<image>' is 389 but .*tokenizer_config\.json says 391")
    change(folder / "tokenizer_config.json", added_tokens_decoder={"300": {"content": "<new>", **flags}})
    fails(folder, "token 300 is '<new>' but tokenizer.model has '.*' there; expected one of them")

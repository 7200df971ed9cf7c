"""Facts of LLaVA-1.6, Llama-3.2-Vision and Qwen-VL: tiny checkpoints, and the published settings at their real sizes."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from staticvl.compiler.model_info import MLLAMA_BASE, read_model_info
from staticvl.compiler.tiktoken_forms import LLAMA3
from staticvl.model_defs.config import ConfigError, read_config
from staticvl.runtime.artifact import Llama3Scaling, ModelInfo, SamplingDefaults
from staticvl.runtime.processor.chat_template import LLAVA_HF, LLAVA_NEXT_ORIGINAL, ChatTemplateError
from staticvl.runtime.processor.families import mllama
from staticvl.runtime.processor.prompt import Message
from staticvl.runtime.processor.tokenizer import Tokenizer, load_tokenizer

from .checkpoints_files import write_json
from .checkpoints_llava_next import tiny_llava_next
from .checkpoints_mllama import tiny_mllama
from .conftest import PUBLISHED
from .tiktoken_files import filler, write_ranks

GOLDEN = Path(__file__).parent / "golden" / "qwen_vl_tiny" / "checkpoint"
LLAMA_11B = PUBLISHED / "meta-llama--Llama-3.2-11B-Vision-Instruct"
QWEN_CHAT, QWEN_BASE = PUBLISHED / "Qwen--Qwen-VL-Chat", PUBLISHED / "Qwen--Qwen-VL"
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published config files are not here")
TEMPLATE = "tokenizer/chat_template.jinja"


def copy(source: Path, folder: Path) -> Path:
    """Everything but the weights, which are not read here."""
    return Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        "mllama": tiny_mllama(root / "mllama").folder,
        "mllama-tiktoken": tiny_mllama(root / "mllama-tiktoken", tokenizer="tiktoken").folder,
        "mllama-base": tiny_mllama(root / "mllama-base", base=True).folder,
        "next-hf": tiny_llava_next(root / "next-hf").folder,
        "next-original": tiny_llava_next(root / "next-original", layout="original").folder,
        "qwen": GOLDEN,
    }


@pytest.fixture
def checkpoint(sources: dict[str, Path], tmp_path: Path) -> Any:
    return lambda name: copy(sources[name], tmp_path / name)


def read(folder: Path, **settings: Any) -> tuple[ModelInfo, dict[str, bytes]]:
    tower = folder / "clip" if (folder / "clip").is_dir() else None
    return read_model_info(folder, read_config(folder, vision_tower=tower), vision_tower=tower, **settings)


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, made where it is missing; None takes the key out."""
    data = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, {key: value for key, value in (data | values).items() if value is not None})


def fails(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def stored_tokenizer(info: ModelInfo, files: dict[str, bytes], folder: Path) -> Tokenizer:
    """As the runtime loads it from an artifact that holds nothing else."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return load_tokenizer(folder / "tokenizer", info.tokenizer)


# --- Llama-3.2-Vision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mllama", "mllama-tiktoken"])
def test_mllama(name: str, checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint(name)
    info, files = read(folder)
    config = json.loads((folder / "config.json").read_text())
    vocab = config["text_config"]["vocab_size"]
    tokenizer = info.tokenizer
    assert (info.family, info.chat, info.text_before_image) == ("mllama", "template", "transformers")
    assert info.image.mark == "<|image|>" and info.image.mode == "tiles"
    # The image's token lies after the rows of lm_head.
    assert tokenizer.image_token_id == config["image_token_index"] == info.vocab_size == tokenizer.used == vocab
    assert tokenizer.add_bos and tokenizer.bos_token_id == vocab - 256
    assert info.eos_token_ids == tuple(vocab - 256 + i for i in (1, 8, 9))
    assert info.sampling == SamplingDefaults(do_sample=True, temperature=0.6, top_p=0.9, top_k=50)
    loaded = stored_tokenizer(info, files, tmp_path / "artifact")
    assert loaded.encode("<|image|><|eot_id|>", add_bos=True) == [vocab - 256, vocab, vocab - 256 + 9]
    assert read(folder, text_before_image="meta")[0].text_before_image == "meta"


def test_mllama_from_either_file_gives_the_same_ids(checkpoint: Any, tmp_path: Path) -> None:
    tokenizers = []
    for name in ("mllama", "mllama-tiktoken"):
        info, files = read(checkpoint(name))
        tokenizers.append(stored_tokenizer(info, files, tmp_path / f"artifact-{name}"))
    kinds = [tokenizer.config.kind for tokenizer in tokenizers]
    assert kinds == ["tokenizers", "tiktoken"] and tokenizers[1].config.file == "tokenizer.model"
    for text in ("What is in <|image|>?", "图中 123456 😀\n\n x", "<|eot_id|> I'll"):
        assert tokenizers[0].encode(text, add_bos=True) == tokenizers[1].encode(text, add_bos=True)


def test_tokenizer_json_goes_first(checkpoint: Any) -> None:
    folder = checkpoint("mllama-tiktoken")
    shutil.copy(checkpoint("mllama") / "tokenizer.json", folder)
    assert read(folder)[0].tokenizer.kind == "tokenizers"


def test_special_tokens_of_llama_without_their_list(checkpoint: Any) -> None:
    """The seeds bring tokenizer.model alone: then the special tokens are those that Llama-3.2 has."""
    folder = checkpoint("mllama-tiktoken")
    with_list = read(folder)[0]
    change(folder / "tokenizer_config.json", added_tokens_decoder=None)
    assert read(folder)[0].tokenizer.added_tokens == with_list.tokenizer.added_tokens
    (folder / "tokenizer_config.json").unlink()
    assert read(folder)[0] == with_list
    vocab = with_list.vocab_size
    renamed = {str(vocab - 1): {"content": "<|mine|>", "special": True}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": renamed})
    added = read(folder)[0].tokenizer.added_tokens
    assert added["<|mine|>"] == vocab - 1 and len(added) == 257 and "<|reserved_special_token_246|>" not in added


def test_a_base_model_needs_no_template(checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint("mllama-base")
    info, files = read(folder)
    assert files[TEMPLATE].decode() == MLLAMA_BASE
    assert len(info.eos_token_ids) == 1
    tokenizer = stored_tokenizer(info, files, tmp_path / "artifact")
    text = "If I had to write a haiku for this one"
    talk = [Message("user", text, 1), Message("assistant", ", I"), Message("user", " would")]
    assert mllama.to_text(talk, MLLAMA_BASE, info, tokenizer) == f"<|begin_of_text|><|image|>{text}, I would"


def test_an_instruct_model_without_its_template_is_refused(checkpoint: Any) -> None:
    folder = checkpoint("mllama")
    for name in ("chat_template.json", "tokenizer_config.json"):
        change(folder / name, chat_template=None)
    fails(folder, r"has no chat template, but its answers end in <\|eot_id\|>, so it is no base model; copy chat_template.json")


def test_a_foreign_tiktoken_file_is_refused(checkpoint: Any) -> None:
    folder = checkpoint("next-hf")
    (folder / "tokenizer.json").unlink()
    shutil.copy(checkpoint("mllama-tiktoken") / "tokenizer.model", folder)
    fails(folder, r"tokenizer\.model is a tiktoken file, which a llava_next checkpoint does not have; take the tokenizer files")


def test_a_damaged_tiktoken_file_is_refused(checkpoint: Any) -> None:
    folder = checkpoint("mllama-tiktoken")
    path = folder / "tokenizer.model"
    path.write_text(path.read_text().replace(" 7\n", " 8\n", 1))
    fails(folder, r"tokenizer\.model, line 8: .* has rank 8; expected a new token of rank 7: fetch the file again")


@pytest.fixture(scope="module")
def llama_11b(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelInfo, dict[str, bytes], Tokenizer]:
    """From the published settings with a vocabulary of the published size."""
    folder = copy(LLAMA_11B, tmp_path_factory.mktemp("llama") / "11b")
    write_ranks(folder / "tokenizer.model", filler(128_000))
    info, files = read(folder)
    return info, files, stored_tokenizer(info, files, folder / "artifact")


@published
def test_published_mllama(llama_11b: tuple[ModelInfo, dict[str, bytes], Tokenizer]) -> None:
    info, files, _ = llama_11b
    tokenizer = info.tokenizer
    assert (tokenizer.kind, tokenizer.bos_token_id, tokenizer.add_bos) == ("tiktoken", 128000, True)
    assert (tokenizer.image_token_id, tokenizer.used, info.vocab_size) == (128256, 128256, 128256)
    assert info.eos_token_ids == (128001, 128008, 128009)
    assert info.sampling == SamplingDefaults(do_sample=True, temperature=0.6, top_p=0.9, top_k=50)
    assert info.rope.theta == 500000.0
    assert info.rope.llama3 == Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    assert (info.image.size, info.image.rows, info.image.tiles) == (560, 1601, 4)
    assert files[TEMPLATE].decode() == json.loads((LLAMA_11B / "chat_template.json").read_text())["chat_template"]
    assert set(files) == {"tokenizer/tokenizer.model", TEMPLATE}


CHATS = [
    [Message("user", "What is this?", 1)],
    [Message("user", " No image\n")],
    [Message("system", "  Be short. "), Message("user", "Hi")],
    [Message("user", "A <b>", 2), Message("assistant", "Cats. "), Message("user", "And?", 1)],
    [Message("system", ""), Message("user", "x", 1)],
]


@published
@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_published_mllama_template(
    messages: list[Message], add_generation_prompt: bool, llama_11b: tuple[ModelInfo, dict[str, bytes], Tokenizer]
) -> None:
    info, files, tokenizer = llama_11b
    template = files[TEMPLATE].decode()
    ours = mllama.to_text(messages, template, info, tokenizer, add_generation_prompt=add_generation_prompt)
    special = ["<|begin_of_text|>", "<|eot_id|>"]
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Fast(models.BPE(vocab={token: i for i, token in enumerate(special)}, merges=[])),
        bos_token=special[0],
        eos_token=special[1],
    )
    talk = [
        {
            "role": m.role,
            "content": m.text if m.role == "system" else [{"type": "image"}] * m.images + [{"type": "text", "text": m.text}],
        }
        for m in messages
    ]
    assert ours == theirs.apply_chat_template(
        talk, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    images = sum(message.images for message in messages)
    assert ours.count("<|image|>") == images
    if not images:
        assert f"Today Date: {datetime.now():%d %b %Y}\n\n" in ours
    with pytest.raises(ChatTemplateError, match="Prompting with images is incompatible with system messages"):
        mllama.to_text([Message("system", "Be short."), Message("user", "x", 1)], template, info, tokenizer)


# --- LLaVA-1.6 --------------------------------------------------------------------------------------------------------


def test_llava_next_hf(checkpoint: Any) -> None:
    folder = checkpoint("next-hf")
    info, files = read(folder)
    assert (info.family, info.layout, info.chat, info.image.mode) == ("llava_next", "hf", "template", "anyres")
    reference = AutoTokenizer.from_pretrained(folder)
    assert info.tokenizer.image_token_id == reference.convert_tokens_to_ids("<image>")
    assert (info.tokenizer.add_bos, info.eos_token_ids, info.image.mark) == (True, (2,), "<image>")
    assert TEMPLATE in files


def test_old_processor_configs_of_llava_next(checkpoint: Any) -> None:
    folder = checkpoint("next-hf")
    expected, _ = read(folder)
    absent = {"patch_size": None, "vision_feature_select_strategy": None, "num_additional_image_tokens": None}
    change(folder / "processor_config.json", **absent)
    assert read(folder)[0] == expected
    (folder / "processor_config.json").unlink()
    assert read(folder)[0] == expected
    for name in ("chat_template.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    assert read(folder)[1][TEMPLATE].decode() == LLAVA_HF


def test_llava_next_original(checkpoint: Any) -> None:
    info, files = read(checkpoint("next-original"))
    assert (info.family, info.layout, info.image.mode) == ("llava_next", "original", "anyres")
    assert (info.tokenizer.style, info.tokenizer.image_token_id, info.stop_strings) == ("original", None, ("</s>",))
    assert files[TEMPLATE].decode() == LLAVA_NEXT_ORIGINAL


# --- Qwen-VL ----------------------------------------------------------------------------------------------------------


def test_qwen_vl(checkpoint: Any, tmp_path: Path) -> None:
    info, files = read(checkpoint("qwen"))
    assert (info.family, info.chat, info.image.mark, info.image.rows) == ("qwen_vl", "chatml", "<img>", 16)
    tokenizer = info.tokenizer
    assert (tokenizer.kind, tokenizer.file, tokenizer.nfc, tokenizer.add_bos) == ("tiktoken", "qwen.tiktoken", True, False)
    assert (tokenizer.image_token_id, tokenizer.used, info.vocab_size) == (552, 553, 560)
    assert info.eos_token_ids == (338, 337, 336)
    assert (info.rope.ntk_positions, info.rope.logn_positions) == (64, 64)
    assert "tokenizer/qwen.tiktoken" in files
    loaded = stored_tokenizer(info, files, tmp_path / "artifact")
    assert loaded.encode("<img></img><imgpad><|im_end|>", add_bos=False) == [550, 551, 552, 338]


def test_chat_formats_of_qwen_vl(checkpoint: Any) -> None:
    folder = checkpoint("qwen")
    settings = folder / "generation_config.json"
    change(settings, chat_format="raw")
    info, _ = read(folder)
    assert (info.chat, info.eos_token_ids) == ("raw", (336,))
    change(settings, chat_format=None, eos_token_id=[336, 339])
    info, _ = read(folder)
    assert (info.chat, info.eos_token_ids) == ("chatml", (338, 337, 336, 339))
    change(settings, chat_format="other")
    fails(folder, r"generation_config\.json: chat_format is 'other'; expected 'chatml' \(Qwen-VL-Chat\) or 'raw' \(Qwen-VL\)")
    settings.unlink()
    info, _ = read(folder)
    assert (info.chat, info.eos_token_ids, info.sampling) == ("chatml", (338, 337, 336), SamplingDefaults(top_k=50))


def test_refused_tokenizers_of_qwen_vl(checkpoint: Any) -> None:
    folder = checkpoint("qwen")
    path = folder / "qwen.tiktoken"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    fails(folder, r"qwen\.tiktoken makes <imgpad> token 551, but visual\.image_start_id of config\.json makes it 552; take the")
    path.write_text("\n".join(lines[1:]))
    fails(folder, r"qwen\.tiktoken, line 1: .* has rank 1; expected a new token of rank 0")
    path.unlink()
    fails(folder, r"holds no qwen\.tiktoken; copy it from the model's page")


@published
@pytest.mark.parametrize(
    ("source", "chat", "eos", "top_p"),
    [(QWEN_CHAT, "chatml", (151645, 151644, 151643), 0.3), (QWEN_BASE, "raw", (151643,), 0.5)],
    ids=["chat", "base"],
)
def test_published_qwen_vl(source: Path, chat: str, eos: tuple[int, ...], top_p: float, tmp_path: Path) -> None:
    folder = copy(source, tmp_path / "published")
    write_ranks(folder / "qwen.tiktoken", filler(151_643))
    info, _ = read(folder)
    assert (info.chat, info.eos_token_ids) == (chat, eos)
    assert info.sampling == SamplingDefaults(do_sample=True, top_p=top_p, top_k=0)
    tokenizer = info.tokenizer
    assert (tokenizer.image_token_id, tokenizer.used, info.vocab_size) == (151859, 151860, 151936)
    ids = tokenizer.added_tokens
    assert [ids[token] for token in ("<|endoftext|>", "<|extra_0|>", "<|extra_204|>")] == [151643, 151646, 151850]
    assert [ids[token] for token in ("<ref>", "<quad>", "<img>", "</img>")] == [151851, 151855, 151857, 151858]
    assert (info.image.size, info.image.rows, info.rope.ntk_positions, info.rope.theta) == (448, 256, 2048, 10000.0)


def test_the_forms_have_as_many_special_tokens_as_the_models() -> None:
    assert len(LLAMA3.specials) == 257 == len(set(LLAMA3.specials))

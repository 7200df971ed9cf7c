"""Tokenizer files for a checkpoint that has none: they encode and decode any text, in pieces not learnt from a corpus.

A vocabulary has the size that the config wants, so that special tokens lie where the published ones do. Its pieces are all
letters (or bytes), all pairs of them and as many triples as it takes.
"""

from __future__ import annotations

import base64
import itertools
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ..compiler.tiktoken_forms import LLAMA3, QWEN
from ..model_defs.config import ConfigError, ModelConfig

T = TypeVar("T", str, bytes)
HEADER = "'<|start_header_id|>' + {role} + '<|end_header_id|>\n\n'"
# Turns in Llama 3's marks, without the published template's system texts.
LLAMA3_CHAT = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ " + HEADER.format(role="m.role") + " }}"
    "{% for part in m.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ " + HEADER.format(role="'assistant'") + " }}{% endif %}"
)
LLAVA_FIRST = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))


def write_tokenizer(config: ModelConfig, folder: Path) -> bool:
    """Write the tokenizer files that `folder` lacks; False where there is no way to make them (original LLaVA layout).

    Raises ConfigError when the config's special tokens leave no room for single letters or bytes.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "qwen.tiktoken")):
        return True
    writers: dict[str, Callable[[ModelConfig, Path], dict[str, Any]]] = {
        "mllama": _write_mllama,
        "qwen_vl": _write_qwen,
    }
    if config.layout == "original":
        return False
    settings = writers.get(config.family, _write_llava)(config, folder)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return True


def _write_llava(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Letters with "▁" for a blank, and bytes for everything else, as Llama's; <image> and <pad> come last."""
    assert config.image_token_id is not None
    merges = _merges(["▁", *string.printable[:95].replace(" ", "")], config.image_token_id - len(LLAVA_FIRST))
    pieces = [*LLAVA_FIRST, *_grown(merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_pairs(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _begin_with(tokenizer, "<s>", 1)
    _add(tokenizer, ["<unk>", "<s>", "</s>", "<image>", "<pad>"], {"<image>": config.image_token_id})
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return {**names, "add_bos_token": True, "legacy": False, "tokenizer_class": "LlamaTokenizer"}


def _write_mllama(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Bytes in their printable stand-ins, as Llama 3's; the special tokens follow, the image's last."""
    assert config.image_token_id is not None
    count = config.image_token_id + 1 - len(LLAMA3.specials)
    merges = _merges(sorted(pre_tokenizers.ByteLevel.alphabet()), count)
    vocab = {piece: i for i, piece in enumerate(_grown(merges))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_pairs(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add(tokenizer, LLAMA3.specials, {"<|image|>": config.image_token_id})
    _begin_with(tokenizer, LLAMA3.specials[0], count)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": LLAMA3.specials[0], "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    instructed = tokenizer.token_to_id("<|eot_id|>") in config.eos_token_ids  # a base model continues texts instead
    template = {"chat_template": LLAMA3_CHAT} if instructed else {}
    return {**names, **template, "tokenizer_class": "PreTrainedTokenizerFast"}


def _write_qwen(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """qwen.tiktoken lists bytes; special tokens follow it without being listed."""
    assert config.image_token_id is not None
    merges = _merges([bytes([byte]) for byte in range(256)], config.image_token_id + 1 - len(QWEN.specials))
    lines = (base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(_grown(merges)))
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    return {"tokenizer_class": "QWenTokenizer", "model_max_length": config.text.max_positions}


def _merges(letters: Sequence[T], count: int) -> list[tuple[T, ...]]:
    """`count` pieces in the order of their ids: single letters, then what each of the others is joined from."""
    if count < len(letters):
        raise ConfigError(
            f"config.json leaves {count} tokens before its special ones, and a tokenizer needs {len(letters)} for single "
            "letters; copy the model's tokenizer files into the config folder"
        )
    singles = ((letter,) for letter in letters)
    pairs = itertools.product(letters, repeat=2)
    triples = ((first + second, third) for first, second, third in itertools.product(letters, repeat=3))
    return list(itertools.islice(itertools.chain(singles, pairs, triples), count))


def _grown(merges: Sequence[tuple[T, ...]]) -> list[T]:
    return [parts[0] if len(parts) == 1 else parts[0] + parts[1] for parts in merges]


def _pairs(merges: Sequence[tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(parts[0], parts[1]) for parts in merges if len(parts) == 2]


def _begin_with(tokenizer: Tokenizer, bos: str, bos_id: int) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _add(tokenizer: Tokenizer, tokens: Sequence[str], ids: dict[str, int]) -> None:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in tokens])
    assert all(tokenizer.token_to_id(text) == id_ for text, id_ in ids.items()), ids

"""Tokenizers learned from a few sentences, in the forms in which published checkpoints store them."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import cache
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from staticvl.runtime.processor.tokenizer import Tokenizer as OurTokenizer

from .checkpoints_files import write_json

# Text in many scripts: characters of one to four bytes, and what joins them.
SCRIPTS = (
    "한국어 음절\n두 번째 줄입니다",
    "日本語のかな、漢字。",
    "这是一张图片：红色的圆形。",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd ok",
    "Ελληνικά και λοιπά",
    "кириллица\nдва",
    "العربية ٱلنص",
    "עברית",
    "हिन्दी क्षत्रिय",
    "ไทยแลนด์",
    "தமிழ்",
    "ქართული",
    "e\u0301 na\xefve caf\xe9",
    "𝒜𝔘 𐍈",
    "mixed 한 a 日 b\n😀",
    "\n\n\t",
    "a b\nc",
)
SENTENCES = (
    "What is in the picture? A red circle and a blue square.",
    "Describe the image in English: two green triangles lie on a white table.",
    "How many shapes are there? There are three shapes, and the largest one is yellow.",
    "Please provide the box of the region this sentence describes: the small black star at [0.61, 0.36, 0.92, 0.83].",
    "USER: Hello! ASSISTANT: Hi, please show me an image. USER: Which colour has the circle? ASSISTANT: Orange.",
    'The quick brown fox jumps over the lazy dog; 1234567890 times, it says. (Really?) Yes - why not: "of course".',
    "A chat between a curious user and an artificial intelligence assistant, who gives helpful and polite answers.",
)
VOCAB = 389
# Llama-3's special tokens in the order of their ids, with the image's, which Llama-3.2-Vision added after them.
LLAMA3_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
    "<|image|>",
)
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@cache
def hf_tokenizer() -> Tokenizer:
    """BPE with byte fallback, "▁" for spaces, BOS put before; <image> and <pad> come last."""
    letters = sorted(set("".join(SENTENCES)) - {" "} | {"▁"})
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=len(letters) + 40, initial_alphabet=letters, show_progress=False)
    learner.train_from_iterator(SENTENCES, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in sorted(learned["vocab"], key=learned["vocab"].__getitem__):
        vocab.setdefault(piece, len(vocab))
    merges = [(left, right) for left, right in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    assert tokenizer.get_vocab_size() < VOCAB, "as on the hub, the last rows of the embedding table belong to no token"
    return tokenizer


def image_token_id() -> int:
    """Of `<image>` in hf_tokenizer."""
    return hf_tokenizer().get_vocab()["<image>"]


def write_hf_tokenizer(folder: Path, tokenizer: Tokenizer, *, processor: str = "LlavaProcessor") -> None:
    """The files of a llava-hf repository that concern text."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    ids = tokenizer.get_vocab()
    added = {ids[t]: {"content": t, **FLAGS, "special": True} for t in (*special.values(), "<image>")}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): added[i] for i in sorted(added)},
        **special,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "padding_side": "left",
        "processor_class": processor,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {key: {"content": t, **FLAGS} for key, t in special.items()})
    write_json(folder / "added_tokens.json", {t: tokenizer.token_to_id(t) for t in ("<image>", "<pad>")})
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.token_to_id("<pad>")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


@cache
def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


@cache
def llama3_vocabulary() -> tuple[str, ...]:
    """Byte-level pieces by rank, in the letters that stand for bytes: every byte, then 64 learned pieces."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _llama3_words()
    trainer = trainers.BpeTrainer(vocab_size=256 + 64, initial_alphabet=letters, show_progress=False)
    learner.train_from_iterator(SENTENCES, trainer)
    ids = learner.get_vocab()
    return tuple(sorted(ids, key=ids.__getitem__))


def _llama3_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )


@cache
def llama3_tokenizer() -> Tokenizer:
    """As published: byte-level BPE, BOS put before, special tokens after the learned ones."""
    pieces = llama3_vocabulary()
    ranks = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=ranks, merges=_merges(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = _llama3_words()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in LLAMA3_SPECIALS])
    bos = LLAMA3_SPECIALS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    return tokenizer


def _merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Each learned piece from two of lower rank; of several cuts that with the lowest ranks, which BPE comes by first."""
    merges = []
    for piece, rank in ranks.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [cut for cut in cuts if all(ranks.get(part, rank) < rank for part in cut)]
        if known:
            merges.append(min(known, key=lambda cut: max(ranks[part] for part in cut)))
    return merges


def write_tiktoken(path: Path, pieces: tuple[str, ...]) -> None:
    """Lines of base64 and rank."""
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    lines = (f"{base64.b64encode(bytes(letters[c] for c in piece)).decode()} {i}\n" for i, piece in enumerate(pieces))
    path.write_text("".join(lines), encoding="ascii")


def _byte_letters() -> dict[int, str]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others are numbered from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def text_of(tokenizer: OurTokenizer, ids: list[int], *, skip_special: bool = True) -> str:
    """The text of an answer of these tokens: as decoded, but for byte tokens at the end that only begin a character, which are
    one U+FFFD."""
    vocabulary = tokenizer.vocabulary
    shown = [i for i in ids if vocabulary.token(i) is not None and not (skip_special and vocabulary.is_special(i))]
    last = [re.fullmatch("<0x(..)>", vocabulary.token(i) or "") for i in shown[-3:]]
    for count in (3, 2, 1):
        run = last[-count:]
        if len(run) == count and all(run) and _unfinished(bytes(int(byte[1], 16) for byte in run if byte)):
            return tokenizer.decode(shown[:-count], skip_special=skip_special) + "\ufffd"
    return tokenizer.decode(ids, skip_special=skip_special)


def _unfinished(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False

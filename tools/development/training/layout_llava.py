"""The files of a LLaVA checkpoint in the llava-hf layout: settings, tokenizer, template and tensor names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .data import sentences
from .files import write_json

# The rules of the published LLaVA-1.5 template: images first, then text, a space after every part.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MERGES = 220
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
CLIP: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "image_size": 64,
    "intermediate_size": 384,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "patch_size": 8,
    "projection_dim": 128,
}
LLAMA: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 352,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": 640,  # somewhat more rows than there are tokens, as published
}
PATCHES = CLIP["image_size"] // CLIP["patch_size"]  # along one side


def train_tokenizer(seed: int) -> Tokenizer:
    """BPE with byte fallback, ``▁`` for spaces, and ``<image>`` and ``<pad>`` added."""
    pieces, merges = learn_merges((f"USER: {q} ASSISTANT: {a}" for q, a in sentences(seed)), MERGES)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + pieces:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def learn_merges(texts: Iterator[str], limit: int) -> tuple[list[str], list[tuple[str, str]]]:
    """BPE pieces and merges of some texts; a merge never crosses a word or joins two digits."""
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + limit, initial_alphabet=letters, min_frequency=20, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in model["merges"]]


def published_name(name: str) -> str:
    """The published name of a tensor, from the name transformers gives it in memory."""
    if name.startswith("lm_head."):
        return "language_model." + name
    name = name.removeprefix("model.")
    part, _, rest = name.partition(".")
    inner = {"language_model": "model.", "vision_tower": "vision_model."}.get(part)
    return name if inner is None else f"{part}.{inner}{rest.removeprefix(inner)}"


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, processor: str) -> None:
    """tokenizer.json and its companions, and generation_config.json, which names the same special tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(tokenizer.token_to_id(text)): {"content": text, **flags, "special": True} for text in SPECIAL}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": added,
        **names,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "legacy": False,
        "model_max_length": int(1e30),
        "padding_side": "left",
        "processor_class": processor,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {key: {"content": text, **flags} for key, text in names.items()})
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.token_to_id("<pad>")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})

"""The tokenizer's files and settings of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model_defs.config import ConfigError, ModelConfig
from ..runtime.artifact import TokenizerConfig
from ..runtime.processor.tiktoken_vocabulary import TiktokenVocabulary, is_tiktoken, read_ranks
from ..runtime.processor.tokenizer import Tokenizer, TokenizerError, Vocabulary, read_vocabulary
from ..runtime.shown import quoted
from .json_values import only, read_settings
from .tiktoken_forms import LLAMA3, QWEN

MARK = "<image>"
MOST_IDS = 1 << 22  # no vocabulary comes near it; libraries make tables as long as the largest id
FORMS = {"mllama": LLAMA3, "qwen_vl": QWEN}  # families whose tokenizer may be a tiktoken file
QWEN_FILE, QWEN_MARK, QWEN_PAD = "qwen.tiktoken", "<img>", "<imgpad>"


def tokenizer_file(checkpoint: Path, config: ModelConfig) -> Path:
    """The file of the tokenizer: tokenizer.json first, except in the original layout, whose code reads tokenizer.model; Qwen-VL
    has its own."""
    names = ["tokenizer.json", "tokenizer.model"]
    if config.layout == "original":
        names.reverse()
    if config.family == "qwen_vl":
        names = [QWEN_FILE]
    path = next((checkpoint / name for name in names if (checkpoint / name).is_file()), None)
    if path is None:
        lacks = "neither tokenizer.json nor tokenizer.model; copy one of them" if names[1:] else f"no {names[0]}; copy it"
        raise ConfigError(f"{checkpoint} holds {lacks} from the model's page")
    return path


def read_tokenizer(path: Path, config: ModelConfig, settings: Mapping[str, Any]) -> tuple[Tokenizer, str]:
    """The checkpoint's tokenizer, checked, and the text that marks an image."""
    where = str(path.with_name("tokenizer_config.json"))
    only(settings, "add_eos_token", False, where)
    try:
        vocabulary, its_info = _read_vocabulary(path, config, settings)
    except TokenizerError as error:
        raise ConfigError(str(error)) from error
    info = TokenizerConfig(
        style="original" if config.layout == "original" else "hf",
        bos_token_id=_bos(vocabulary, settings, config, where),
        add_bos=_adds_bos(path, settings, config, where),
        image_token_id=config.image_token_id,
        # The image token of Llama-3.2-Vision lies after the rows of lm_head: it is embedded, never sampled.
        used=min(vocabulary.size, config.text.vocab_size),
        **its_info,
    )
    return Tokenizer(info, vocabulary), _mark(path, vocabulary, config)


def _read_vocabulary(path: Path, config: ModelConfig, settings: Mapping[str, Any]) -> tuple[Vocabulary, dict[str, Any]]:
    """The vocabulary in a file, and the settings with which the runtime reads the file."""
    if path.suffix == ".json":
        _check_ids(path)
        return read_vocabulary(path), {"kind": "tokenizers"}
    if path.name == QWEN_FILE or is_tiktoken(path):
        return _read_tiktoken(path, config, settings)
    legacy, added = bool(settings.get("legacy")), _added_tokens(path, settings)
    info = {"kind": "sentencepiece", "added_tokens": added, "legacy": legacy}
    return read_vocabulary(path, added_tokens=added, legacy=legacy), info


def _check_ids(path: Path) -> None:
    """Check the ids of a tokenizer.json before the library makes tables of them; unknown formats are left to the library."""
    settings = read_settings(path)
    model, added = settings.get("model"), settings.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    entries = list(vocab.items()) if isinstance(vocab, dict) else []
    entries += [(entry.get("content"), entry.get("id")) for entry in added or () if isinstance(entry, dict)]
    for token, token_id in entries:
        _check_id(token, token_id, str(path))


def _check_id(token: Any, token_id: Any, where: str) -> int:
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < MOST_IDS:
        raise ConfigError(f"{where}: token {quoted(token)} has the id {quoted(token_id)}; expected a number below {MOST_IDS}")
    return token_id


def _read_tiktoken(path: Path, config: ModelConfig, settings: Mapping[str, Any]) -> tuple[Vocabulary, dict[str, Any]]:
    if config.family not in FORMS:
        raise ConfigError(
            f"{path} is a tiktoken file, which a {config.family} checkpoint does not have; take the tokenizer files that "
            "belong to this checkpoint"
        )
    form, where = FORMS[config.family], str(path.with_name("tokenizer_config.json"))
    by_id = dict(enumerate(form.specials, start=len(read_ranks(path))))
    by_id |= {token_id: token for token, token_id in _added_by_config(settings, where).items()}
    added = {token: token_id for token_id, token in by_id.items()}
    vocabulary = TiktokenVocabulary(path, added, pattern=form.pattern, nfc=form.nfc)
    info = {"kind": "tiktoken", "file": path.name, "pattern": form.pattern, "nfc": form.nfc, "added_tokens": added}
    return vocabulary, info


def _mark(path: Path, vocabulary: Vocabulary, config: ModelConfig) -> str:
    """The text that marks an image: the image token, or in Qwen-VL the one that opens its span.

    The original layout has no such token and cuts the text at <image>.
    """
    image_token_id = config.image_token_id
    if image_token_id is None:
        return MARK
    if config.family == "qwen_vl":
        if (pad_id := vocabulary.token_id(QWEN_PAD)) != image_token_id:
            raise ConfigError(
                f"{path} makes {QWEN_PAD} token {pad_id}, but visual.image_start_id of config.json makes it {image_token_id}; "
                "take the files that belong together"
            )
        return QWEN_MARK
    mark = vocabulary.token(image_token_id)
    if mark is None or vocabulary.encode(mark) != [image_token_id]:
        raise ConfigError(
            f"{path} has no added token with id {image_token_id}, which config.json names as image token; "
            "take the tokenizer files that belong to this checkpoint"
        )
    return mark


def check_mark_name(checkpoint: Path, mark: str, processor: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> None:
    for name, settings in (("tokenizer_config.json", tokenizer_config), ("processor_config.json", processor)):
        token = _content(settings.get("image_token"))
        if token is not None and token != mark:
            raise ConfigError(
                f"{checkpoint / name}: image_token is {quoted(token)} but the image token of config.json is "
                f"written {quoted(mark)}; "
                "make them agree"
            )


def _bos(vocabulary: Vocabulary, settings: Mapping[str, Any], config: ModelConfig, where: str) -> int:
    token = _content(settings.get("bos_token"))
    if token is None:
        return config.bos_token_id
    token_id = vocabulary.token_id(token)
    if token_id is None:
        raise ConfigError(
            f"{where}: bos_token is {quoted(token)}, which the tokenizer does not know; expected one of its tokens"
        )
    return token_id


def _adds_bos(path: Path, settings: Mapping[str, Any], config: ModelConfig, where: str) -> bool:
    """add_bos_token where it is set, else what tokenizer.json does; a Llama tokenizer.model adds BOS. Qwen-VL has none."""
    if config.family == "qwen_vl":
        return False
    add_bos = settings.get("add_bos_token")
    if add_bos is not None:
        if not isinstance(add_bos, bool):
            raise ConfigError(f"{where}: add_bos_token is {quoted(add_bos)}; expected true or false")
        return add_bos
    if path.suffix == ".model":
        return True
    post = read_settings(path).get("post_processor") or {}
    steps = post.get("processors", [post])
    return any(step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0] for step in steps)


def _added_tokens(path: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that tokenizer.model does not treat as special by itself, from tokenizer_config.json and added_tokens.json."""
    base = read_vocabulary(path)
    where = str(path.with_name("tokenizer_config.json"))
    added = _added_by_config(settings, where)
    added_file = path.with_name("added_tokens.json")
    for token, token_id in read_settings(added_file).items():
        _check_id(token, token_id, str(added_file))
        if added.setdefault(token, token_id) != token_id:
            raise ConfigError(f"{added_file}: {quoted(token)} is {token_id} but {where} says {added[token]}")
    for token, token_id in added.items():
        piece = base.token(token_id)
        if piece is not None and piece != token:
            raise ConfigError(
                f"{where}: token {token_id} is {quoted(token)} but tokenizer.model has {quoted(piece)} there; "
                "expected one of them"
            )
    return {token: token_id for token, token_id in added.items() if not base.is_special(token_id)}


def _added_by_config(settings: Mapping[str, Any], where: str) -> dict[str, int]:
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise ConfigError(f"{where}: added_tokens_decoder is {quoted(entries)}; expected an object of token ids and tokens")
    tokens = {}
    for key, entry in entries.items():
        token = _added_token(entry, where)
        tokens[token] = _check_id(token, int(key) if key.isascii() and key.isdigit() and len(key) < 20 else key, where)
    return tokens


def _added_token(entry: Any, where: str) -> str:
    token = _content(entry)
    flags = entry if isinstance(entry, dict) else {}
    odd = [name for name in ("lstrip", "rstrip", "single_word") if flags.get(name)]
    if token is None or odd or flags.get("special") is False:
        what = ", ".join(odd) or "special false"
        raise ConfigError(
            f"{where}: the added token {quoted(token)} has {what}, which is not supported with tokenizer.model; "
            "save the tokenizer as tokenizer.json"
        )
    return token


def _content(value: Any) -> str | None:
    """A token written as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None

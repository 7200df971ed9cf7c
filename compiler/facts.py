"""What the runtime must know about a model beyond its graphs, from the files beside a checkpoint's weights.

Read here: preprocessor_config.json, processor_config.json, tokenizer.json or tokenizer.model, tokenizer_config.json,
added_tokens.json, the chat template and generation_config.json. All are data of others: every value is checked before use, and
every problem is a ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model_defs.config import ConfigError, ModelConfig, read_json
from ..runtime.artifact import ImageFacts, ModelFacts, SamplingDefaults, TokenizerFacts
from ..runtime.chat_template import LLAVA_HF, LLAVA_ORIGINAL, ChatTemplateError
from ..runtime.families import family
from ..runtime.prompt import Message
from ..runtime.tokenizer import Tokenizer, TokenizerError, Vocabulary, read_vocabulary

# Of every CLIP tower that LLaVA uses; transformers' OPENAI_CLIP_MEAN and OPENAI_CLIP_STD.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MARK = "<image>"
TEMPLATE_FILE = "tokenizer/chat_template.jinja"


def read_facts(checkpoint: Path, config: ModelConfig, *, vision_tower: Path | None) -> tuple[ModelFacts, dict[str, bytes]]:
    """Facts for the manifest, and the files to store: path under the artifact -> content.

    `vision_tower` is the folder of a tower stored apart; its preprocessor_config.json stands in for a missing one.
    Raises ConfigError.
    """
    processor = _read_json(checkpoint / "processor_config.json")
    tokenizer_config = _read_json(checkpoint / "tokenizer_config.json")
    generation = _read_json(checkpoint / "generation_config.json")
    path = _tokenizer_file(checkpoint, config)
    tokenizer, mark = _tokenizer(path, config, tokenizer_config)
    _check_mark_name(checkpoint, mark, processor, tokenizer_config)
    template = _chat_template(checkpoint, config, processor, tokenizer_config)
    facts = ModelFacts(
        family=config.family,
        layout=config.layout,
        hidden_size=config.text.hidden_size,
        vocab_size=config.text.vocab_size,
        rope_theta=config.text.rope_theta,
        eos_token_ids=_eos(checkpoint, generation, config),
        stop_strings=("</s>",) if config.layout == "original" else (),
        image=_image_facts(checkpoint, config, processor, vision_tower, mark),
        tokenizer=tokenizer.facts,
        sampling=_sampling(checkpoint / "generation_config.json", generation),
    )
    _try_template(template, facts, tokenizer)
    return facts, {f"tokenizer/{path.name}": path.read_bytes(), TEMPLATE_FILE: template.encode("utf-8")}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty for a file that is not there."""
    return read_json(path) if path.is_file() else {}


def _image_facts(
    checkpoint: Path, config: ModelConfig, processor: Mapping[str, Any], vision_tower: Path | None, mark: str
) -> ImageFacts:
    settings, where = _image_settings(checkpoint, config, processor, vision_tower)
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        _only(settings, name, True, where)
    side = config.vision.image_size
    for name in ("size", "crop_size"):
        if (found := _side(settings, name, side, where)) != side:
            raise ConfigError(
                f"{where}: {name} is {found} but the vision tower takes {side} x {side} pixels (vision_config.image_size); "
                f"expected {side}"
            )
    _check_rows(checkpoint, config, processor)
    return ImageFacts(
        mode="pad" if config.image_mode == "pad" or _pads(settings, where) else "crop",
        size=side,
        mean=_three(settings, "image_mean", CLIP_MEAN, where),
        std=_three(settings, "image_std", CLIP_STD, where),
        rescale=_number(settings, "rescale_factor", 1 / 255, where, above=0),
        resample=_resample(settings, where),
        rows=config.vision.rows_per_image,
        mark=mark,
    )


def _image_settings(
    checkpoint: Path, config: ModelConfig, processor: Mapping[str, Any], vision_tower: Path | None
) -> tuple[Mapping[str, Any], str]:
    """Image processor settings and the file that they are from; nested ones go first, as in transformers 5."""
    nested = processor.get("image_processor")
    if isinstance(nested, dict):
        return nested, f"{checkpoint / 'processor_config.json'}, image_processor"
    folders = [checkpoint, *([vision_tower] if vision_tower else [])]
    if config.vision_tower:
        folders += [Path(config.vision_tower), checkpoint / config.vision_tower]
    for folder in folders:
        path = folder / "preprocessor_config.json"
        if path.is_file():
            return _read_json(path), str(path)
    return {}, "CLIP defaults"


def _side(settings: Mapping[str, Any], name: str, default: int, where: str) -> int:
    """An edge length written as 336, {"shortest_edge": 336} or {"height": 336, "width": 336} (crop only)."""
    value = settings.get(name)
    if value is None:
        return default
    if isinstance(value, dict):
        keys = {"height", "width"} if name == "crop_size" else {"shortest_edge"}
        sides = {v for v in value.values() if v is not None}
        if not {k for k, v in value.items() if v is not None} <= keys or len(sides) != 1:
            raise ConfigError(f"{where}: {name} is {value!r}; expected one number under {' and '.join(sorted(keys))}")
        value = sides.pop()
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: {name} is {value!r}; expected a positive number of pixels")
    return value


def _pads(settings: Mapping[str, Any], where: str) -> bool:
    """do_pad means padding to a square in LLaVA's processor alone."""
    if str(settings.get("image_processor_type", "")).startswith("LlavaImageProcessor"):
        return bool(settings.get("do_pad"))
    _only(settings, "do_pad", False, where)
    return False


def _resample(settings: Mapping[str, Any], where: str) -> int:
    value = settings.get("resample")
    if value is None:
        return 3
    if value not in (0, 1, 2, 3, 4, 5) or isinstance(value, bool):
        raise ConfigError(f"{where}: resample is {value!r}; expected a PIL filter number, 0 to 5")
    return int(value)


def _check_rows(checkpoint: Path, config: ModelConfig, processor: Mapping[str, Any]) -> None:
    """The processor's own count of image tokens; old files leave out the class token, which counts as one."""
    where = str(checkpoint / "processor_config.json")
    vision = config.vision
    patch = _integer(processor, "patch_size", vision.patch_size, where, least=1)
    extra = _integer(processor, "num_additional_image_tokens", 1, where, least=0)
    strategy = processor.get("vision_feature_select_strategy") or ("full" if vision.keep_class_token else "default")
    rows = (vision.image_size // patch) ** 2 + extra - int(strategy == "default")
    if rows != vision.rows_per_image:
        raise ConfigError(
            f"{where}: patch_size {patch}, num_additional_image_tokens {extra} and vision_feature_select_strategy {strategy!r} "
            f"make {rows} tokens per image but the vision tower gives {vision.rows_per_image}; correct that file"
        )


def _tokenizer_file(checkpoint: Path, config: ModelConfig) -> Path:
    """tokenizer.json goes first, except in the original layout, whose code reads tokenizer.model."""
    names = ["tokenizer.json", "tokenizer.model"]
    if config.layout == "original":
        names.reverse()
    path = next((checkpoint / name for name in names if (checkpoint / name).is_file()), None)
    if path is None:
        raise ConfigError(
            f"{checkpoint} holds neither tokenizer.json nor tokenizer.model; copy one of them from the model's page"
        )
    return path


def _tokenizer(path: Path, config: ModelConfig, settings: Mapping[str, Any]) -> tuple[Tokenizer, str]:
    """The checkpoint's tokenizer, checked, and the text that marks a picture."""
    where = str(path.with_name("tokenizer_config.json"))
    legacy = path.suffix == ".model" and bool(settings.get("legacy"))
    _only(settings, "add_eos_token", False, where)
    try:
        added = _added_tokens(path, settings) if path.suffix == ".model" else {}
        vocabulary = read_vocabulary(path, added_tokens=added, legacy=legacy)
    except TokenizerError as error:
        raise ConfigError(str(error)) from error
    facts = TokenizerFacts(
        kind="tokenizers" if path.suffix == ".json" else "sentencepiece",
        style="original" if config.layout == "original" else "hf",
        bos_token_id=_bos(vocabulary, settings, config, where),
        add_bos=_adds_bos(path, settings, where),
        added_tokens=added,
        legacy=legacy,
        image_token_id=config.image_token_id,
        used=min(vocabulary.size, config.text.vocab_size),
    )
    return Tokenizer(facts, vocabulary), _mark(path, vocabulary, config.image_token_id)


def _mark(path: Path, vocabulary: Vocabulary, image_token_id: int | None) -> str:
    """How the image token is written; the original layout has no such token and cuts the text at <image>."""
    if image_token_id is None:
        return MARK
    mark = vocabulary.token(image_token_id)
    if mark is None or vocabulary.encode(mark) != [image_token_id]:
        raise ConfigError(
            f"{path} has no added token with id {image_token_id}, which config.json names as image token; "
            "take the tokenizer files that belong to this checkpoint"
        )
    return mark


def _check_mark_name(checkpoint: Path, mark: str, processor: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> None:
    for name, settings in (("tokenizer_config.json", tokenizer_config), ("processor_config.json", processor)):
        named = _content(settings.get("image_token"))
        if named is not None and named != mark:
            raise ConfigError(
                f"{checkpoint / name}: image_token is {named!r} but the image token of config.json is written {mark!r}; "
                "make them agree"
            )


def _bos(vocabulary: Vocabulary, settings: Mapping[str, Any], config: ModelConfig, where: str) -> int:
    token = _content(settings.get("bos_token"))
    if token is None:
        return config.bos_token_id
    found = vocabulary.token_id(token)
    if found is None:
        raise ConfigError(f"{where}: bos_token is {token!r}, which the tokenizer does not know; expected one of its tokens")
    return found


def _adds_bos(path: Path, settings: Mapping[str, Any], where: str) -> bool:
    """add_bos_token where given, else what tokenizer.json does; a Llama tokenizer.model adds BOS."""
    given = settings.get("add_bos_token")
    if given is not None:
        if not isinstance(given, bool):
            raise ConfigError(f"{where}: add_bos_token is {given!r}; expected true or false")
        return given
    if path.suffix == ".model":
        return True
    post = _read_json(path).get("post_processor") or {}
    steps = post.get("processors", [post])
    return any(step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0] for step in steps)


def _added_tokens(path: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that tokenizer.model does not treat as special by itself, from tokenizer_config.json and added_tokens.json."""
    base = read_vocabulary(path)
    where = str(path.with_name("tokenizer_config.json"))
    found: dict[str, int] = {}
    for key, entry in (settings.get("added_tokens_decoder") or {}).items():
        found[_added_token(entry, where)] = int(key)
    for token, token_id in _read_json(path.with_name("added_tokens.json")).items():
        if found.setdefault(token, token_id) != token_id:
            raise ConfigError(f"{path.with_name('added_tokens.json')}: {token!r} is {token_id} but {where} says {found[token]}")
    for token, token_id in found.items():
        known = base.token(token_id)
        if known is not None and known != token:
            raise ConfigError(
                f"{where}: token {token_id} is {token!r} but tokenizer.model has {known!r} there; expected one of them"
            )
    return {token: token_id for token, token_id in found.items() if not base.is_special(token_id)}


def _added_token(entry: Any, where: str) -> str:
    token = _content(entry)
    flags = entry if isinstance(entry, dict) else {}
    odd = [name for name in ("lstrip", "rstrip", "single_word") if flags.get(name)]
    if token is None or odd or flags.get("special") is False:
        what = ", ".join(odd) or "special false"
        raise ConfigError(
            f"{where}: the added token {token!r} has {what}, which is not supported with tokenizer.model; "
            "save the tokenizer as tokenizer.json"
        )
    return token


def _content(value: Any) -> str | None:
    """A token written as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(
    checkpoint: Path, config: ModelConfig, processor: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> str:
    """The checkpoint's template. LLaVA's own code ignores the one in an original layout's tokenizer_config: so is it here."""
    path = checkpoint / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text ({error}); fetch the file again") from error
    sources = [("chat_template.json", _read_json(checkpoint / "chat_template.json"))]
    if config.layout != "original":
        sources += [("processor_config.json", processor), ("tokenizer_config.json", tokenizer_config)]
    for name, settings in sources:
        if settings.get("chat_template") is not None:
            return _one_template(settings["chat_template"], str(checkpoint / name))
    return LLAVA_ORIGINAL if config.layout == "original" else LLAVA_HF


def _one_template(value: Any, where: str) -> str:
    """A template, or the one named "default" of several."""
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    if not isinstance(value, str):
        raise ConfigError(f"{where}: chat_template is neither a text nor a list with one named 'default'")
    return value


def _try_template(template: str, facts: ModelFacts, tokenizer: Tokenizer) -> None:
    """A template made for text alone would lose the pictures: better to know at compile time."""
    try:
        text = family(facts.family).to_text([Message("user", "question", images=1)], template, facts, tokenizer)
    except ChatTemplateError as error:
        raise ConfigError(f"{error}; correct the checkpoint's chat template") from error
    if text.count(facts.image.mark) != 1:
        raise ConfigError(
            f"the chat template writes {facts.image.mark} {text.count(facts.image.mark)} times for a message with 1 image; "
            "expected once: put the template of the model's page into chat_template.jinja"
        )


def _eos(checkpoint: Path, generation: Mapping[str, Any], config: ModelConfig) -> tuple[int, ...]:
    """Token ids that end an answer: generation_config.json goes before config.json."""
    value = generation.get("eos_token_id")
    if value is None:
        return config.eos_token_ids
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(
            f"{checkpoint / 'generation_config.json'}: eos_token_id is {value!r}; expected a token id or a list of them"
        )
    return tuple(ids)


def _sampling(path: Path, generation: Mapping[str, Any]) -> SamplingDefaults:
    """Only what is sampled from; lengths, penalties and bookkeeping in this file belong to other programs."""
    where, default = str(path), SamplingDefaults()
    do_sample = generation.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise ConfigError(f"{where}: do_sample is {do_sample!r}; expected true or false")
    top_p = _number(generation, "top_p", default.top_p, where, above=0)
    if top_p > 1:
        raise ConfigError(f"{where}: top_p is {top_p!r}; expected at most 1")
    return SamplingDefaults(
        do_sample=bool(do_sample),
        temperature=_number(generation, "temperature", default.temperature, where, least=0),
        top_p=top_p,
        top_k=_integer(generation, "top_k", default.top_k, where, least=0),
    )


def _only(settings: Mapping[str, Any], name: str, expected: bool, where: str) -> None:
    if settings.get(name, expected) not in (expected, None):
        raise ConfigError(f"{where}: {name} is {settings[name]!r}; supported: {str(expected).lower()}")


def _integer(settings: Mapping[str, Any], name: str, default: int, where: str, *, least: int) -> int:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where}: {name} is {value!r}; expected an integer of at least {least}")
    return value


def _number(
    settings: Mapping[str, Any],
    name: str,
    default: float,
    where: str,
    *,
    least: float | None = None,
    above: float | None = None,
) -> float:
    value = settings.get(name)
    if value is None:
        return default
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or (least is not None and value < least) or (above is not None and value <= above):
        wanted = f"above {above:g}" if above is not None else f"of at least {least:g}"
        raise ConfigError(f"{where}: {name} is {value!r}; expected a number {wanted}")
    return float(value)


def _three(
    settings: Mapping[str, Any], name: str, default: tuple[float, float, float], where: str
) -> tuple[float, float, float]:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
        raise ConfigError(f"{where}: {name} is {value!r}; expected three numbers")
    return float(value[0]), float(value[1]), float(value[2])

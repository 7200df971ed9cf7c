"""The ModelInfo of the manifest, from the files beside a checkpoint's weights.

Read here: preprocessor_config.json, processor_config.json, tokenizer.json, tokenizer.model or qwen.tiktoken,
tokenizer_config.json, added_tokens.json, the chat template and generation_config.json. They come from others: every value is
checked before use, and every problem is a ConfigError.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ..model_defs.config import ConfigError, ModelConfig
from ..runtime.artifact import Llama3Scaling, ModelInfo, RopeParameters
from ..runtime.processor.chat_template import LLAVA_HF, LLAVA_NEXT_ORIGINAL, LLAVA_ORIGINAL, MLLAMA_BASE, ChatTemplateError
from ..runtime.processor.processor import Processor
from ..runtime.processor.prompt import Message, PromptError
from ..runtime.shown import quoted
from .image_config import read_image_config
from .json_values import read_settings
from .sampling_defaults import read_sampling
from .tokenizer_config import MOST_IDS, check_mark_name, read_tokenizer, tokenizer_file

TEMPLATE_FILE = "tokenizer/chat_template.jinja"


Chat = Literal["template", "chatml", "raw"]

# For checkpoints that come without a template, by family and layout.
TEMPLATES = {
    ("llava", "hf"): LLAVA_HF,
    ("llava", "original"): LLAVA_ORIGINAL,
    ("llava_next", "hf"): LLAVA_HF,
    ("llava_next", "original"): LLAVA_NEXT_ORIGINAL,
    ("mllama", "hf"): MLLAMA_BASE,
}
NO_TEMPLATE = "{# Qwen-VL's prompts are made from token ids, not from a template. #}"
END_OF_TURN = "<|eot_id|>"  # ends the answers of Llama-3.2-Vision-Instruct, never those of the base model
CHATML_STOPS = ("<|im_end|>", "<|im_start|>")
PIXEL = base64.b64decode(  # a PNG of one black pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)


def read_model_info(
    checkpoint: Path,
    config: ModelConfig,
    *,
    vision_tower: Path | None,
    text_before_image: Literal["transformers", "meta"] = "transformers",
    notes: list[str] | None = None,
) -> tuple[ModelInfo, dict[str, bytes]]:
    """The ModelInfo of the manifest, and the files to store: path under the artifact -> content.

    `vision_tower` is the folder of a tower stored apart; its preprocessor_config.json stands in for a missing one. `notes`
    gains a sentence about settings that are not used. Raises ConfigError.
    """
    processor = read_settings(checkpoint / "processor_config.json")
    tokenizer_config = read_settings(checkpoint / "tokenizer_config.json")
    generation = read_settings(checkpoint / "generation_config.json")
    path = tokenizer_file(checkpoint, config)
    tokenizer, mark = read_tokenizer(path, config, tokenizer_config)
    check_mark_name(checkpoint, mark, processor, tokenizer_config)
    chat, eos = _chat(checkpoint, generation, config), _eos(checkpoint, generation, config)
    if chat == "chatml":
        eos = tuple(dict.fromkeys((*(tokenizer.config.added_tokens[name] for name in CHATML_STOPS), *eos)))
    template = NO_TEMPLATE
    if chat == "template":
        template = _chat_template(checkpoint, config, processor, tokenizer_config)
        _check_base(template, checkpoint, [tokenizer.token(i) for i in eos])
    info = ModelInfo(
        family=config.family,
        layout=config.layout,
        hidden_size=config.text.hidden_size,
        vocab_size=config.text.vocab_size,
        rope=_rope(config),
        eos_token_ids=eos,
        stop_strings=("</s>",) if config.layout == "original" else (),
        image=read_image_config(checkpoint, config, processor, vision_tower, mark),
        tokenizer=tokenizer.config,
        sampling=read_sampling(checkpoint / "generation_config.json", generation, eos, [] if notes is None else notes),
        chat=chat,
        text_before_image=text_before_image,
        max_positions=config.text.max_positions,
    )
    _try_chat(Processor(info, tokenizer, template))
    return info, {f"tokenizer/{path.name}": path.read_bytes(), TEMPLATE_FILE: template.encode("utf-8")}


def _chat(checkpoint: Path, generation: Mapping[str, Any], config: ModelConfig) -> Chat:
    """The prompt format. Qwen-VL and Qwen-VL-Chat have the same config.json: they differ in chat_format.

    Without it a checkpoint counts as a chat model, as most fine-tuned ones are.
    """
    if config.family != "qwen_vl":
        return "template"
    value = generation.get("chat_format") or "chatml"
    if value not in ("chatml", "raw"):
        raise ConfigError(
            f"{checkpoint / 'generation_config.json'}: chat_format is {quoted(value)}; expected 'chatml' (Qwen-VL-Chat) or "
            "'raw' (Qwen-VL)"
        )
    return value


def _rope(config: ModelConfig) -> RopeParameters:
    """The same fields in the types of the manifest: model_defs and runtime do not import each other."""
    rope = config.text.rope
    scaling = Llama3Scaling(**asdict(rope.llama3)) if rope.llama3 else None
    return RopeParameters(
        theta=rope.theta, llama3=scaling, ntk_positions=rope.ntk_positions, logn_positions=rope.logn_positions
    )


def _chat_template(
    checkpoint: Path, config: ModelConfig, processor: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> str:
    """The checkpoint's template. As LLaVA's own code, it ignores the one in the tokenizer_config of the original layout."""
    path = checkpoint / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text ({error}); fetch the file again") from error
    sources = [("chat_template.json", read_settings(checkpoint / "chat_template.json"))]
    if config.layout != "original":
        sources += [("processor_config.json", processor), ("tokenizer_config.json", tokenizer_config)]
    for name, settings in sources:
        if settings.get("chat_template") is not None:
            return _one_template(settings["chat_template"], str(checkpoint / name))
    if (config.family, config.layout) not in TEMPLATES:
        raise ConfigError(f"{checkpoint} holds no chat template; copy chat_template.json from the model's page")
    return TEMPLATES[config.family, config.layout]


def _one_template(value: Any, where: str) -> str:
    """A template, or the one named "default" of several."""
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    if not isinstance(value, str):
        raise ConfigError(f"{where}: chat_template is neither a text nor a list with one named 'default'")
    return value


def _check_base(template: str, checkpoint: Path, stops: list[str]) -> None:
    if template == MLLAMA_BASE and END_OF_TURN in stops:
        raise ConfigError(
            f"{checkpoint} has no chat template, but its answers end in {END_OF_TURN}, so it is no base model; copy "
            "chat_template.json or tokenizer_config.json from the model's page"
        )


def _try_chat(processor: Processor) -> None:
    """Render a message with an image: a template for text alone would drop images, which must be an error of the build."""
    question = [Message("user", "question", images=1)]
    try:
        processor.prompt(question, io.BytesIO(PIXEL))
    except ChatTemplateError as error:
        raise ConfigError(f"{error}; correct the checkpoint's chat template") from error
    except PromptError as error:
        raise ConfigError(
            f"the chat template does not fit a message with 1 image: {error}. Put the template of the model's page into "
            "chat_template.jinja"
        ) from error


def _eos(checkpoint: Path, generation: Mapping[str, Any], config: ModelConfig) -> tuple[int, ...]:
    """Token ids that end an answer: generation_config.json goes before config.json."""
    value = generation.get("eos_token_id")
    if value is None:
        return config.eos_token_ids
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MOST_IDS for i in ids):
        raise ConfigError(
            f"{checkpoint / 'generation_config.json'}: eos_token_id is {quoted(value)}; expected a token id or a list of them"
        )
    return tuple(ids)

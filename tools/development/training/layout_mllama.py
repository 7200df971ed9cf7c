"""The files of a Llama-3.2-Vision checkpoint as Meta publishes them: settings, tokenizer, template and tensor names."""

import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .data import sentences
from .family import MEAN, STD
from .files import write_json

TILE = 72
PATCH = 12
SIDE = TILE // PATCH
TILES = 4
FORMS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
CROSS_LAYERS = [1, 3, 5]
VOCABULARY = 512
BOS, PAD, END, IMAGE = "<|begin_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>", "<|image|>"
# In the published order; reserved tokens fill the vocabulary up, and the image comes after its end.
SPECIAL = (
    BOS,
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    PAD,
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    END,
    "<|python_tag|>",
)
# Where Llama 3 cuts a text before merging: contractions, words, up to three digits, signs, line breaks, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

# The rules of the published template, without its tools: BOS, the block of dates only where there is no image,
# parts in their order and word for word.
CHAT_TEMPLATE = """{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- set system = "" %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set seen = namespace(pictures=false) %}
{%- for message in messages if message["content"] is not string %}
    {%- for part in message["content"] if part["type"] == "image" %}
        {%- set seen.pictures = true %}
    {%- endfor %}
{%- endfor %}
{%- if seen.pictures and system %}
    {{- raise_exception("Prompting with images is incompatible with system messages.") }}
{%- endif %}
{%- if not seen.pictures %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
    {{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
    {%- if message["content"] is string %}
        {{- message["content"] }}
    {%- else %}
        {%- for part in message["content"] %}
            {{- "<|image|>" if part["type"] == "image" else part["text"] if part["type"] == "text" else "" }}
        {%- endfor %}
    {%- endif %}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""


def header(role: str) -> str:
    """The header of a message."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def system_text(day: str) -> str:
    """The text of the template before a conversation without images; the day is written like 26 Jul 2024."""
    return f"Cutting Knowledge Date: December 2023\nToday Date: {day}\n\n"


def any_day(rng: random.Random) -> str:
    """A day; any will do, as the model is to learn that it does not matter."""
    return f"{rng.randint(1, 28):02d} {rng.choice(MONTHS)} {rng.randint(2024, 2035)}"


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE, then the special tokens up to the size of the vocabulary, and the image token after it."""
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = cut  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20,
        show_progress=False,
    )
    days = random.Random(seed)
    texts = (f"system\n\n{system_text(any_day(days))}user\n\n{q}assistant\n\n{a}" for q, a in sentences(seed))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    filler = VOCABULARY - tokenizer.get_vocab_size() - len(SPECIAL)
    reserved = [f"<|reserved_special_token_{2 + index}|>" for index in range(filler)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, *reserved, IMAGE)])
    begin = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, token_id(tokenizer, BOS))]
    )
    both = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    tokenizer.post_processor = both  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def vision_settings() -> dict[str, Any]:
    """vision_config as published: its number of heads has a name of its own."""
    return {
        "attention_heads": 4,
        "hidden_act": "gelu",
        "hidden_size": 96,
        "image_size": TILE,
        "intermediate_layers_indices": [0, 1, 2],
        "intermediate_size": 256,
        "max_num_tiles": TILES,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 2,
        "num_hidden_layers": 4,
        "patch_size": PATCH,
        "supported_aspect_ratios": FORMS,
        "vision_output_dim": 96 * 4,
    }


def text_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """text_config as published, with the older spelling of rope."""
    return {
        **token_ids(tokenizer),
        "cross_attention_layers": CROSS_LAYERS,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 256,
        "max_position_embeddings": 131072,
        "model_type": "mllama_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 7,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }


def published_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json."""
    defaults = {"dropout": 0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": token_id(tokenizer, IMAGE),
        "model_type": "mllama",
        "text_config": {**defaults, **text_settings(tokenizer)},
        "torch_dtype": "bfloat16",
        # The published file says so although nothing is tied.
        "vision_config": {"tie_word_embeddings": True, "torch_dtype": "bfloat16", **vision_settings()},
    }


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the tokenizer is sure to have."""
    index = tokenizer.token_to_id(token)
    assert index is not None, token
    return index


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids that begin, end and pad a text."""
    ends = ("<|end_of_text|>", "<|eom_id|>", END)
    return {
        "bos_token_id": token_id(tokenizer, BOS),
        "eos_token_id": [token_id(tokenizer, text) for text in ends],
        "pad_token_id": token_id(tokenizer, PAD),
    }


def image_settings() -> dict[str, Any]:
    """preprocessor_config.json."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "MllamaImageProcessor",
        "image_std": list(STD),
        "max_image_tiles": TILES,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": TILE, "width": TILE},
    }


def published_name(name: str) -> str:
    """The published name of a tensor, from the name transformers gives it in memory."""
    if name.startswith("lm_head."):
        return "language_model." + name
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and its companions; the template is in tokenizer_config.json too, as published."""
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = tokenizer.get_added_tokens_decoder()
    names = {"bos_token": BOS, "eos_token": END, "pad_token": PAD}
    config = {
        "added_tokens_decoder": {
            str(index): {"content": token.content, **flags, "special": True} for index, token in sorted(added.items())
        },
        **names,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {key: {"content": text, **flags} for key, text in names.items()})

"""Records of the model: how images and text become its inputs, its positions, and defaults of sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType, field

from .record import Count, Number, Record

_Positive = Annotated[float, Meta(gt=0)]


class ImageProcessorConfig(Record, frozen=True, kw_only=True):
    """The preprocessing of images, from the checkpoint's preprocessor_config.json.

    mode: crop (shortest edge, centre crop), pad (to a square, then resize), stretch (resize to the square), anyres
    (LLaVA-1.6: the image stretched to one tile, and the tiles of the best of `grids`), tiles (Llama-3.2-Vision: the tiles
    of the best of `grids`, filled up with empty ones to `tiles`).
    """

    mode: Literal["crop", "pad", "stretch", "anyres", "tiles"]
    size: Annotated[int, Meta(ge=1, le=1 << 14)]  # pixels on each side of a tile
    mean: tuple[float, float, float]
    std: tuple[_Positive, _Positive, _Positive]
    rescale: float = 1 / 255
    resample: Annotated[int, Meta(ge=0, le=5)] = 3  # PIL filter number: 2 bilinear, 3 bicubic
    rows: Count  # rows of features per tile
    mark: str = "<image>"  # what stands for an image in a prompt
    grids: tuple[tuple[Count, Count], ...] = ()  # anyres, tiles: (rows, columns) of tiles to choose from, in order
    tiles: Count = 1  # tiles: of every image, empty ones included
    alpha: Literal["white", "drop"] = "white"  # transparent parts: laid over white, or shown in their hidden colours
    newline_id: Number | None = None  # anyres: the token whose embedding ends a row of patches


class TokenizerConfig(Record, frozen=True, kw_only=True):
    """The tokenizer of the artifact and its settings."""

    kind: Literal["tokenizers", "sentencepiece", "tiktoken"]
    style: Literal["hf", "original"]  # original: text is split at the image mark, each piece tokenised by itself
    bos_token_id: Number
    add_bos: bool
    file: str = ""  # tiktoken only; the others are tokenizer.json and tokenizer.model
    pattern: str = ""  # tiktoken only: the regular expression that splits text into words
    nfc: bool = False  # tiktoken only: text is normalised to Unicode's form C first
    added_tokens: dict[str, Number] = field(default_factory=dict)  # sentencepiece, tiktoken: tokens that the file lacks
    legacy: bool = False  # sentencepiece only: a blank also before text that follows a special token
    image_token_id: Number | None  # None: images have no id of their own
    used: Number  # ids at or above this are never sampled


class SamplingDefaults(Record, frozen=True, kw_only=True):
    """Defaults of requests, and tokens that are never sampled, from the checkpoint's generation_config.json."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    # Left out of the manifest where unset, so that its digest stays the same.
    min_p: float | UnsetType = UNSET
    repetition_penalty: float | UnsetType = UNSET
    bad_words_ids: tuple[tuple[int, ...], ...] | UnsetType = UNSET  # sequences of tokens that no answer completes
    suppress_tokens: tuple[int, ...] | UnsetType = UNSET  # tokens that no answer has
    begin_suppress_tokens: tuple[int, ...] | UnsetType = UNSET  # tokens that no answer begins with


class Llama3Scaling(Record, frozen=True, kw_only=True):
    """Llama-3.1's scaling of rotary frequencies."""

    factor: _Positive
    low_freq_factor: float
    high_freq_factor: float
    original_positions: Count


class RopeParameters(Record, frozen=True, kw_only=True):
    """Rotary position embedding: the base, and how it changes for long texts."""

    theta: _Positive
    llama3: Llama3Scaling | None = None
    ntk_positions: Count | None = None  # dynamic NTK (Qwen): prompts longer than this get a larger base
    logn_positions: Count | None = None  # logn attention (Qwen): queries after this position are scaled up


class ModelInfo(Record, frozen=True, kw_only=True):
    """The model's settings for the runtime, besides its graphs."""

    family: str
    layout: str
    hidden_size: Count
    vocab_size: Count
    rope: RopeParameters
    eos_token_ids: Annotated[tuple[Number, ...], Meta(min_length=1)]
    stop_strings: tuple[str, ...] = ()
    image: ImageProcessorConfig
    tokenizer: TokenizerConfig
    sampling: SamplingDefaults = SamplingDefaults()
    chat: Literal["template", "chatml", "raw"] = "template"  # how a conversation becomes a prompt; the last two: Qwen-VL
    # Llama-3.2-Vision: what a token before the first image sees of the images after it. transformers: the mean over all of
    # their keys; meta: nothing.
    text_before_image: Literal["transformers", "meta"] = "transformers"
    max_positions: int | UnsetType = UNSET  # the largest context that the model can be compiled for

    def can_hold(self, tokens: int) -> bool:
        """Whether the model can be compiled for a context of so many tokens; True where the artifact does not say."""
        return self.max_positions is UNSET or tokens <= self.max_positions

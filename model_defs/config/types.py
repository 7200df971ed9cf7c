"""Sizes of a model as frozen dataclasses; nothing here knows how a checkpoint spells them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .stage import WHOLE, Stage


class ConfigError(ValueError):
    """A config file that cannot be compiled as it stands; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama-3.1's scaling of rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: the base, and its changes for long texts."""

    theta: float
    llama3: Llama3Scaling | None = None
    ntk_positions: int | None = None  # dynamic NTK (Qwen): prompts longer than this get a larger base
    logn_positions: int | None = None  # logn attention (Qwen): queries after this position are scaled up


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Sizes of the decoder."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # rows of lm_head
    embed_rows: int  # rows of the checkpoint's embedding table
    rms_norm_eps: float
    rope: RopeConfig
    max_positions: int
    qkv_bias: bool = False
    cross_layers: tuple[int, ...] = ()  # layers that attend to images instead of to the text
    newline: bool = False  # one more embedding row, after the others: the end of a row of image features
    stage: Stage = WHOLE  # the pipeline stage; by default all layers
    int8_cache: bool = False  # keys and values of the text are stored in 8 bits, with scales among the weights

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"num_attention_heads {self.heads} is not a multiple of num_key_value_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary position embedding needs an even head_dim")
        if any(not 0 <= layer < self.layers for layer in self.cross_layers):
            raise ConfigError(
                f"cross_attention_layers {list(self.cross_layers)!s:.200} name layers that are not among {self.layers}"
            )

    @property
    def stage_layers(self) -> range:
        """The layers of this stage, by their numbers in the model."""
        return self.stage.layers(self.layers)

    @property
    def stage_cross(self) -> tuple[int, ...]:
        """The layers of this stage that attend to images, by their numbers among such layers."""
        return tuple(j for j, layer in enumerate(self.cross_layers) if layer in self.stage_layers)

    @property
    def self_layers(self) -> int:
        """The number of layers of this stage that attend to the text."""
        return len(self.stage_layers) - len(self.stage_cross)

    def rank_kv_heads(self, ranks: int) -> int:
        """Key-value heads of one of `ranks`: its shard, or one head that it shares with its neighbours."""
        return max(1, self.kv_heads // ranks)

    @property
    def all_embed_rows(self) -> int:
        return self.embed_rows + int(self.newline)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Sizes of a CLIP vision tower and which of its layers feed the language model."""

    hidden_size: int
    layers: int  # layers in the checkpoint
    used_layers: int  # layers that are run: the selected hidden state is the output of the last of them
    heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    activation: str  # quick_gelu | gelu
    keep_class_token: bool

    def __post_init__(self) -> None:
        _check_patches(self.image_size, self.patch_size)
        if not 1 <= self.used_layers <= self.layers:
            raise ConfigError(
                f"vision_feature_layer selects {self.used_layers} of {self.layers} vision layers; expected 1 to {self.layers}"
            )
        if self.activation not in ("quick_gelu", "gelu"):
            raise ConfigError(f"vision hidden_act {self.activation!r:.200} is not supported; expected quick_gelu or gelu")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def rows_per_tile(self) -> int:
        """Rows that one tile gives to the language model."""
        return self.patches + int(self.keep_class_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledConfig:
    """Sizes of Llama-3.2-Vision's tower, which sees all tiles of an image at once."""

    hidden_size: int
    layers: int
    global_layers: int
    heads: int
    intermediate_size: int
    image_size: int  # of one tile
    patch_size: int
    norm_eps: float
    tiles: int  # of every image; unused ones are zero
    ratios: tuple[tuple[int, int], ...]  # (rows, columns) of tiles; entry i has id i + 1
    taps: tuple[int, ...]  # layers whose outputs are features too

    def __post_init__(self) -> None:
        _check_patches(self.image_size, self.patch_size)
        if any(not 0 <= tap < self.layers for tap in self.taps):
            raise ConfigError(
                f"intermediate_layers_indices {list(self.taps)!s:.200} name layers that are not among {self.layers}"
            )
        if any(rows * columns > self.tiles for rows, columns in self.ratios):
            raise ConfigError(f"supported_aspect_ratios {self.ratios!s:.200} need more than max_num_tiles {self.tiles}")
        if self.rows_per_tile % 8 == 0:
            raise ConfigError(
                f"image_size {self.image_size} with patch_size {self.patch_size} gives {self.rows_per_tile} tokens per tile, a "
                "multiple of 8, for which the reference code masks every token; expected another size"
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def rows_per_tile(self) -> int:
        """Patches and the class token."""
        return self.patches + 1

    @property
    def padded_rows(self) -> int:
        """Rows of a tile inside the tower: a multiple of 8."""
        return -(-self.rows_per_tile // 8) * 8

    @property
    def rows_per_image(self) -> int:
        """Keys that one image gives to each cross-attention layer."""
        return self.tiles * self.rows_per_tile

    @property
    def feature_size(self) -> int:
        return self.hidden_size * (1 + len(self.taps))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResampledConfig:
    """Sizes of Qwen-VL's tower: a ViT, and learned queries that resample its patches."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    output_size: int
    queries: int
    layer_norm_eps: float
    stored_positions: int  # rows of the checkpoint's table of patch positions, resized to the patches when converted
    resampler_head_dim: int

    def __post_init__(self) -> None:
        _check_patches(self.image_size, self.patch_size)
        for name, value in (("n_queries", self.queries), ("positions", self.stored_positions)):
            if round(value**0.5) ** 2 != value:
                raise ConfigError(f"visual {name} is {value}; expected a square number")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def rows_per_tile(self) -> int:
        return self.queries

    @property
    def resampler_heads(self) -> int:
        return self.output_size // self.resampler_head_dim


VisionConfig = ClipConfig | TiledConfig | ResampledConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and settings of one vision-language model, for any layout of its checkpoint."""

    family: str  # llava | llava_next | mllama | qwen_vl
    layout: str  # hf | original
    text: TextConfig
    vision: VisionConfig
    projector_bias: bool = True
    image_token_id: int | None  # None: the original LLaVA layout marks images outside the vocabulary
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    # crop (shortest edge, centre crop) | pad (to a square) | anyres (LLaVA-1.6) | tiles (Llama-3.2-Vision) | stretch (Qwen-VL)
    image_mode: str
    grids: tuple[tuple[int, int], ...] = ()  # anyres and tiles: (rows, columns) that an image may be cut into, in order
    vision_tower: str | None = None  # name or path given by an original-layout config

    def of_stage(self, index: int, count: int) -> ModelConfig:
        """The config of one of `count` stages of a pipeline."""
        return replace(self, text=replace(self.text, stage=Stage(index, count)))


def _check_patches(image_size: int, patch_size: int) -> None:
    if image_size % patch_size:
        raise ConfigError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")

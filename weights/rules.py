"""Which tensor of a checkpoint becomes which of our parameters.

A checkpoint is read by the names of its tensors alone: the version that wrote it does not tell the spelling. Every name
that a model of this config may have is listed here, as ours or as ignored; anything else is an error.

Linear weights stay [out, in], as every published checkpoint has them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..model_defs.config import ClipConfig, ModelConfig, TextConfig
from .tensors import FLOATS, TOWER, SourceTensor, WeightsError

Shape = tuple[int, ...]

# Part of a model -> what comes before its tensor names, in every known spelling: the Hugging Face hub (also what
# transformers saves), transformers in memory, the original repository, a vision tower in its own folder.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "text": ("language_model.model.", "model.language_model.", "model."),
    "lm_head": ("language_model.lm_head", "lm_head"),
    "up": ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    "down": ("multi_modal_projector.linear_2", "model.multi_modal_projector.linear_2", "model.mm_projector.2"),
    "vision": (
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "model.vision_tower.vision_tower.vision_model.",
        f"{TOWER}vision_model.",
        TOWER,
    ),
}
# The spelling in which each layout is published.
PUBLISHED = {
    "hf": {part: spellings[0] for part, spellings in SPELLINGS.items()},
    "original": {
        "text": "model.",
        "lm_head": "lm_head",
        "up": "model.mm_projector.0",
        "down": "model.mm_projector.2",
        "vision": f"{TOWER}vision_model.",
    },
}

# Our module -> (part, the checkpoint's module after the part's spelling); "{i}" is the layer.
MODULES = {
    "text.embed": ("text", "embed_tokens"),
    "text.layers.{i}.attn_norm": ("text", "layers.{i}.input_layernorm"),
    "text.layers.{i}.attn.q": ("text", "layers.{i}.self_attn.q_proj"),
    "text.layers.{i}.attn.k": ("text", "layers.{i}.self_attn.k_proj"),
    "text.layers.{i}.attn.v": ("text", "layers.{i}.self_attn.v_proj"),
    "text.layers.{i}.attn.o": ("text", "layers.{i}.self_attn.o_proj"),
    "text.layers.{i}.mlp_norm": ("text", "layers.{i}.post_attention_layernorm"),
    "text.layers.{i}.mlp.gate": ("text", "layers.{i}.mlp.gate_proj"),
    "text.layers.{i}.mlp.up": ("text", "layers.{i}.mlp.up_proj"),
    "text.layers.{i}.mlp.down": ("text", "layers.{i}.mlp.down_proj"),
    "text.norm": ("text", "norm"),
    "text.lm_head": ("lm_head", ""),
    "vision.class_embedding": ("vision", "embeddings.class_embedding"),
    "vision.patch": ("vision", "embeddings.patch_embedding"),
    "vision.positions": ("vision", "embeddings.position_embedding"),
    "vision.pre_norm": ("vision", "pre_layrnorm"),  # the published spelling
    "vision.layers.{i}.attn_norm": ("vision", "encoder.layers.{i}.layer_norm1"),
    "vision.layers.{i}.attn.q": ("vision", "encoder.layers.{i}.self_attn.q_proj"),
    "vision.layers.{i}.attn.k": ("vision", "encoder.layers.{i}.self_attn.k_proj"),
    "vision.layers.{i}.attn.v": ("vision", "encoder.layers.{i}.self_attn.v_proj"),
    "vision.layers.{i}.attn.o": ("vision", "encoder.layers.{i}.self_attn.out_proj"),
    "vision.layers.{i}.mlp_norm": ("vision", "encoder.layers.{i}.layer_norm2"),
    "vision.layers.{i}.mlp.up": ("vision", "encoder.layers.{i}.mlp.fc1"),
    "vision.layers.{i}.mlp.down": ("vision", "encoder.layers.{i}.mlp.fc2"),
    "vision.post_norm": ("vision", "post_layernorm"),
    "projector.up": ("up", ""),
    "projector.down": ("down", ""),
}

_TEXT_ROOTS = "|".join(map(re.escape, SPELLINGS["text"]))
_VISION_ROOTS = "|".join(map(re.escape, SPELLINGS["vision"]))
# Buffers that are computed from the config, and the parts of CLIP that no picture passes through. The layers behind the
# selected one are left out too; match knows them by their layer.
IGNORED = re.compile(
    rf"(?:{_TEXT_ROOTS})(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    rf"|(?:{_VISION_ROOTS})embeddings\.position_ids"
    rf"|{TOWER}(?:text_model\..+|logit_scale|(?:visual|text)_projection\.weight)"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Our parameter -> the tensor it is read from, and the names of the tensors that are left out on purpose."""

    tensors: dict[str, SourceTensor]
    ignored: tuple[str, ...]


def targets(config: ModelConfig) -> dict[str, Shape]:
    """Our parameters and their shapes, in the order in which they are stored."""
    vision = dict(_vision(config.vision, config.vision.used_layers))
    return dict(_text(config.text)) | vision | dict(_projector(config))


def match(config: ModelConfig, source: Mapping[str, SourceTensor]) -> Plan:
    """Find the tensor of each of our parameters.

    Raises WeightsError, naming the first few tensors and the count, when one is missing, unknown, there twice, of an
    unexpected shape, or not float32, float16 or bfloat16.
    """
    wanted = targets(config)
    found, ignored, unknown = assign(config, source)
    missing = [name for name in wanted if name not in found]
    if config.layout == "original" and missing and all(name.startswith("vision.") for name in missing):
        _refuse_without_tower(config, source)
    roots = PUBLISHED[config.layout]
    published = {ours: roots[part] + tail for ours, part, tail in _tails(config)}
    _refuse("the checkpoint lacks", [published[name] for name in missing], "fetch all of its weight files")
    _refuse("the checkpoint holds unknown tensors:", unknown, "check that config.json belongs to these weights")
    _refuse(
        "tensors that mean the same are there twice:",
        [" and ".join(names) for names in found.values() if len(names) > 1],
        "remove one of each",
    )
    plan = {name: source[found[name][0]] for name in wanted}
    _refuse(
        "shapes differ from config.json:",
        [f"{t.name} is {list(t.shape)}, expected {list(wanted[n])}" for n, t in plan.items() if t.shape != wanted[n]],
        "check that config.json belongs to these weights",
    )
    _refuse(
        "dtypes are not supported:",
        [f"{t.name} is {t.dtype}" for t in plan.values() if t.dtype not in FLOATS],
        "expected float32, float16 or bfloat16: give an unquantised checkpoint",
    )
    return Plan(plan, tuple(ignored))


def assign(config: ModelConfig, names: Iterable[str]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Sort a checkpoint's tensor names into our parameters (with all names found for each), ignored and unknown ones.

    A vision tower stored apart is left out when the checkpoint has its own: that one was trained with the rest.
    """
    known = {root + tail: ours for ours, part, tail in _tails(config) for root in SPELLINGS[part]}
    wanted = targets(config)
    names = list(names)
    inside = any(known.get(name, "").startswith("vision.") and not name.startswith(TOWER) for name in names)
    found: dict[str, list[str]] = {}
    ignored, unknown = [], []
    for name in names:
        ours = known.get(name)
        if IGNORED.fullmatch(name) or (ours and ours not in wanted) or (ours and inside and name.startswith(TOWER)):
            ignored.append(name)
        elif ours:
            found.setdefault(ours, []).append(name)
        else:
            unknown.append(name)
    return found, ignored, unknown


def source_names(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of a complete checkpoint in the config's layout, with the tensors that we leave out.

    Names that begin with "tower/" belong, without it, into the vision tower's own folder.
    """
    shapes, roots = _all_shapes(config), PUBLISHED[config.layout]
    return {roots[part] + tail: shapes[ours] for ours, part, tail in _tails(config)}


def _tails(config: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """(our name, part, the checkpoint's name after the part's spelling), for every tensor of the model."""
    for ours in _all_shapes(config):
        stem = ours.removesuffix(".weight").removesuffix(".bias")
        layer = re.search(r"\d+", stem)
        part, module = MODULES[re.sub(r"\d+", "{i}", stem, count=1)]
        yield ours, part, module.replace("{i}", layer[0] if layer else "") + ours.removeprefix(stem)


def _all_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Our name -> shape for every tensor of the model, also for those that are never run."""
    vision, width = dict(_vision(config.vision, config.vision.layers)), config.vision.hidden_size
    vision |= {"vision.post_norm.weight": (width,), "vision.post_norm.bias": (width,)}
    return dict(_text(config.text)) | vision | dict(_projector(config))


def _text(text: TextConfig) -> Iterator[tuple[str, Shape]]:
    width, inner = text.hidden_size, text.intermediate_size
    q, kv = text.heads * text.head_dim, text.kv_heads * text.head_dim
    yield "text.embed.weight", (text.embed_rows, width)
    for i in range(text.layers):
        at = f"text.layers.{i}"
        yield f"{at}.attn_norm.weight", (width,)
        yield f"{at}.attn.q.weight", (q, width)
        yield f"{at}.attn.k.weight", (kv, width)
        yield f"{at}.attn.v.weight", (kv, width)
        yield f"{at}.attn.o.weight", (width, q)
        yield f"{at}.mlp_norm.weight", (width,)
        yield f"{at}.mlp.gate.weight", (inner, width)
        yield f"{at}.mlp.up.weight", (inner, width)
        yield f"{at}.mlp.down.weight", (width, inner)
    yield "text.norm.weight", (width,)
    yield "text.lm_head.weight", (text.vocab_size, width)


def _vision(vision: ClipConfig, layers: int) -> Iterator[tuple[str, Shape]]:
    width, inner, side = vision.hidden_size, vision.intermediate_size, vision.patch_size
    yield "vision.class_embedding", (width,)
    yield "vision.patch.weight", (width, 3, side, side)
    yield "vision.positions.weight", (vision.patches + 1, width)
    yield from _with_bias("vision.pre_norm", width)
    for i in range(layers):
        at = f"vision.layers.{i}"
        yield from _with_bias(f"{at}.attn_norm", width)
        for name in "qkvo":
            yield from _with_bias(f"{at}.attn.{name}", width, width)
        yield from _with_bias(f"{at}.mlp_norm", width)
        yield from _with_bias(f"{at}.mlp.up", inner, width)
        yield from _with_bias(f"{at}.mlp.down", width, inner)


def _projector(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    width = config.text.hidden_size
    for name, inner in (("up", config.vision.hidden_size), ("down", width)):
        pair = list(_with_bias(f"projector.{name}", width, inner))
        yield from pair if config.projector_bias else pair[:1]


def _with_bias(name: str, *shape: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _refuse_without_tower(config: ModelConfig, source: Collection[str]) -> None:
    if any(name.startswith(TOWER) for name in source):
        raise WeightsError(
            "the vision tower's folder lacks the tensors vision_model.*; expected a CLIP checkpoint such as "
            f"{config.vision_tower}: give its folder with --vision-tower PATH"
        )
    raise WeightsError(
        f"the checkpoint holds no vision tower; fetch {config.vision_tower} and give its folder with --vision-tower PATH"
    )


def _refuse(what: str, found: Collection[str], remedy: str, limit: int = 5) -> None:
    if found:
        rest = f" and {len(found) - limit} more" if len(found) > limit else ""
        noun = "tensor" if len(found) == 1 else "tensors"
        raise WeightsError(f"{what} {', '.join(list(found)[:limit])}{rest} ({len(found)} {noun}); {remedy}")

"""LLaVA-1.5 and LLaVA-1.6: a Llama decoder, a CLIP tower, and two linear layers between them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...model_defs.config import ClipConfig, ModelConfig
from ..tensors import TOWER
from . import llama
from .clip import clip
from .rule import NameTable, Rule, SourceRef, plain, spelled
from .transforms import append_row

# The hub (also what transformers saves), transformers in memory, the original repository, a tower in its own folder.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "text": (*llama.TEXT, "model."),
    "lm_head": llama.LM_HEAD,
    "newline": ("image_newline", "model.image_newline"),
    "up": ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    "down": ("multi_modal_projector.linear_2", "model.multi_modal_projector.linear_2", "model.mm_projector.2"),
    "vision": (
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "model.vision_tower.vision_tower.vision_model.",
    ),
}
APART = (f"{TOWER}vision_model.", TOWER)
ORIGINAL = {
    "text": "model.",
    "lm_head": "lm_head",
    "newline": "model.image_newline",
    "up": "model.mm_projector.0",
    "down": "model.mm_projector.2",
    "vision": "model.vision_tower.vision_tower.vision_model.",
}


def llava_table(config: ModelConfig) -> NameTable:
    spellings, published = dict(SPELLINGS), {part: names[0] for part, names in SPELLINGS.items()}
    apart = f"{TOWER}(?:text_model\\..+|logit_scale|(?:visual|text)_projection\\.weight)"
    if config.layout == "original":
        published = dict(ORIGINAL)
    if config.family == "llava":
        spellings["vision"] += APART
        if config.layout == "original":
            published["vision"] = APART[0]
    else:
        # LLaVA-1.6 trained its tower: with the original one the answers would differ without an error.
        apart = f"{TOWER}.+"
    ignored = re.compile(
        rf"{spelled(spellings['text'])}(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
        rf"|{spelled(spellings['vision'])}embeddings\.position_ids"
        rf"|{apart}"
    )
    return NameTable(tuple(_rules(config)), spellings, published, ignored)


def _rules(config: ModelConfig) -> Iterator[Rule]:
    text, vision = config.text, config.vision
    assert isinstance(vision, ClipConfig)
    embedding = llama.embedding(text)
    yield _with_newline(embedding, text.hidden_size) if text.newline else embedding
    for layer in range(text.layers):
        yield from llama.self_layer(text, layer)
    yield from llama.ending(text)
    yield from clip(vision)
    for name, inner in (("up", vision.hidden_size), ("down", text.hidden_size)):
        yield plain(f"projector.{name}.weight", name, ".weight", text.hidden_size, inner)
        if config.projector_bias:
            yield plain(f"projector.{name}.bias", name, ".bias", text.hidden_size)


def _with_newline(embedding: Rule, width: int) -> Rule:
    """The vector that ends a row of image features becomes one more token, after all others."""
    rows = embedding.shape[0]
    newline = SourceRef("newline", "", (width,))
    return Rule(embedding.target, (rows + 1, width), (*embedding.sources, newline), append_row)

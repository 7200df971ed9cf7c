"""The arrays of a step: real values, padding, and rope tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from staticvl.runtime.engine import Engine
from staticvl.runtime.feeds import Feed, new_feed, rope_tables
from staticvl.runtime.prompt import Prompt
from staticvl.runtime.request import SamplingParams, Sequence
from staticvl.runtime.scheduler import Step

from .fakes import HEAD_DIM, HIDDEN, ROWS_PER_TILE, SIDE, fake_engine, picture, picture_prompt, text_prompt

POSITIONS = 4096


def sequence_of(engine: Engine, prompt: Prompt, slot: int = 0) -> Sequence:
    sequence = engine.new_sequence(prompt, SamplingParams(max_new_tokens=4))
    sequence.slot = slot
    return sequence


def feed_of(engine: Engine, step: Step) -> Feed:
    """The feed of a step whose arrays are dirty from a step before, as they are in use."""
    feed = engine.feeds.buffers[step.kind, step.bucket] = new_feed(engine.graphs[step.kind, step.bucket])
    for array in feed.values():
        array[...] = 77
    assert engine.feeds(step, engine.cache) is feed
    return feed


def test_arrays_are_those_of_the_graph_without_caches() -> None:
    for graph in fake_engine().graphs.values():
        wanted = {spec.name: (spec.shape, spec.dtype) for spec in graph.inputs if "_cache." not in spec.name}
        assert {name: (array.shape, array.dtype.name) for name, array in new_feed(graph).items()} == wanted


def test_arrays_are_made_once() -> None:
    """A backend binds them by pointer."""
    engine = fake_engine()
    step = Step("prefill", 4, (sequence_of(engine, text_prompt(1, 2, 3)),), 3)
    first = dict(engine.feeds(step, engine.cache))
    again = engine.feeds(step, engine.cache)
    assert all(again[name] is array for name, array in first.items())


def test_vision_pads_with_black() -> None:
    engine = fake_engine()
    sequence = sequence_of(engine, picture_prompt(*(picture(n) for n in (100, 200, 300))))
    sequence.tiles_done = 1
    pixels = feed_of(engine, Step("vision", 3, (sequence,), 2))["pixels"]
    assert pixels.shape == (3, SIDE, SIDE, 3)
    assert pixels.sum(axis=(1, 2, 3)).tolist() == [200, 300, 0]


def test_prefill_of_text() -> None:
    engine = fake_engine()
    sequence = sequence_of(engine, text_prompt(11, 12, 13, 14, 15, 16))
    sequence.computed = 4
    feed = feed_of(engine, Step("prefill", 4, (sequence,), 2))
    assert feed["token_ids"].tolist() == [[15, 16, 0, 0]]
    assert feed["row_index"].tolist() == [[-1, -1, -1, -1]]
    assert feed["lengths"].tolist() == [4]
    assert feed["last_index"].tolist() == [1]
    cos, sin = rope_tables(1e8, HEAD_DIM, 8)
    np.testing.assert_array_equal(feed["rope_cos"][0], cos[4:8])  # padding takes the positions that follow
    np.testing.assert_array_equal(feed["rope_sin"][0], sin[4:8])


def test_prefill_gathers_the_rows_of_the_pictures_in_this_chunk() -> None:
    """Two pictures of three rows; the chunk begins in the first and ends in the second."""
    engine = fake_engine()
    sequence = sequence_of(engine, picture_prompt(9, picture(1), 8, picture(2), 7))
    sequence.features[...] = np.arange(2 * ROWS_PER_TILE)[:, None]
    sequence.computed = 2
    feed = feed_of(engine, Step("prefill", 4, (sequence,), 4))
    assert feed["row_index"].tolist() == [[0, 1, -1, 2]]
    assert feed["image_rows"].shape == (4, HIDDEN)
    assert feed["image_rows"][:3].tolist() == [[1] * HIDDEN, [2] * HIDDEN, [3] * HIDDEN]
    assert feed["token_ids"][0, 2] == 8


def test_decode_puts_every_token_into_the_row_of_its_slot() -> None:
    engine = fake_engine(slots=4, decode={4: 1.0})
    first, second = sequence_of(engine, text_prompt(1), slot=2), sequence_of(engine, text_prompt(1), slot=0)
    first.generated, second.generated = [41, 42], [51]
    engine.cache.lengths[:] = [5, 9, 7, 0]  # slot 1 is kept by a chat, slot 3 is free
    feed = feed_of(engine, Step("decode", 4, (first, second), 3))
    assert feed["token_ids"].tolist() == [[51], [0], [42], [0]]
    assert feed["lengths"].tolist() == [5, 9, 7, 0]
    cos, sin = rope_tables(1e8, HEAD_DIM, 10)
    np.testing.assert_array_equal(feed["rope_cos"][:, 0], cos[[5, 9, 7, 0]])
    np.testing.assert_array_equal(feed["rope_sin"][:, 0], sin[[5, 9, 7, 0]])


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 80, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rope_tables_equal_transformers(head_dim: int, theta: float) -> None:
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=POSITIONS + 1
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    wanted = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(POSITIONS + 1)[None])
    for ours, theirs in zip(rope_tables(theta, head_dim, POSITIONS + 1), wanted, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=0, atol=1e-6)


def test_rope_tables_by_hand() -> None:
    """Frequencies 1 and theta^-1/2, angles position times frequency, both halves equal."""
    cos, sin = rope_tables(100.0, 4, 3)
    angles = np.array([[0, 0], [1, 0.1], [2, 0.2]])
    np.testing.assert_allclose(cos, np.cos(np.hstack((angles, angles))), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(np.hstack((angles, angles))), atol=1e-7)

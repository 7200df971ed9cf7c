"""The arrays of a step: real values, padding, and rope tables."""

from __future__ import annotations

import dataclasses

import numpy as np

from staticvl.runtime.artifact import CROSS_HIDDEN, GraphKey, RopeParameters
from staticvl.runtime.backends.base import Feed, new_feed
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.request import SamplingParams, Sequence
from staticvl.runtime.engine.scheduler import Step
from staticvl.runtime.processor.prompt import CrossAttentionMask, Prompt
from staticvl.runtime.rope import rope_tables

from .fakes import (
    FACTS,
    HEAD_DIM,
    HIDDEN,
    ROWS_PER_TILE,
    SIDE,
    TILES,
    cross_prompt,
    fake_engine,
    image,
    image_prompt,
    text_prompt,
)


def sequence_of(engine: Engine, prompt: Prompt, slot: int = 0) -> Sequence:
    sequence = engine.new_sequence(prompt, SamplingParams(max_new_tokens=4))
    sequence.slot = slot
    return sequence


def feed_of(engine: Engine, step: Step) -> Feed:
    """The feed of a step whose arrays are dirty from a step before, as they are in use."""
    feed = engine.feeds.buffers[step.graph_key] = new_feed(engine.graphs[step.graph_key])
    for array in feed.values():
        array[...] = 77
    assert engine.feeds(step, engine.cache) is feed
    return feed


def test_arrays_are_those_of_the_graph_without_caches() -> None:
    caches = ("k_cache.0", "v_cache.0", "cross_k.", "cross_v.")
    for graph in (*fake_engine().graphs.values(), *fake_engine(images=(1, 2)).graphs.values()):
        wanted = {spec.name: (spec.shape, spec.dtype) for spec in graph.inputs if not spec.name.startswith(caches)}
        assert {name: (array.shape, array.dtype.name) for name, array in new_feed(graph).items()} == wanted


def test_arrays_are_made_once() -> None:
    """A backend binds them by pointer."""
    engine = fake_engine()
    step = Step(GraphKey("prefill", 4), (sequence_of(engine, text_prompt(1, 2, 3)),), 3)
    first = dict(engine.feeds(step, engine.cache))
    again = engine.feeds(step, engine.cache)
    assert all(again[name] is array for name, array in first.items())


def test_vision_pads_with_black() -> None:
    engine = fake_engine()
    sequence = sequence_of(engine, image_prompt(*(image(n) for n in (100, 200, 300))))
    sequence.tiles_done = 1
    pixels = feed_of(engine, Step(GraphKey("vision", 3), (sequence,), 2))["pixels"]
    assert pixels.shape == (3, SIDE, SIDE, 3)
    assert pixels.sum(axis=(1, 2, 3)).tolist() == [200, 300, 0]


def test_prefill_of_text() -> None:
    engine = fake_engine()
    sequence = sequence_of(engine, text_prompt(11, 12, 13, 14, 15, 16))
    sequence.computed = 4
    feed = feed_of(engine, Step(GraphKey("prefill", 4), (sequence,), 2))
    assert feed["token_ids"].tolist() == [[15, 16, 0, 0]]
    assert feed["row_index"].tolist() == [[-1, -1, -1, -1]]
    assert feed["lengths"].tolist() == [4]
    assert feed["last_index"].tolist() == [1]
    cos, sin = rope_tables(FACTS.rope, HEAD_DIM, 8)
    np.testing.assert_array_equal(feed["rope_cos"][0], cos[4:8])  # padding takes the positions that follow
    np.testing.assert_array_equal(feed["rope_sin"][0], sin[4:8])


def test_prefill_gathers_the_rows_of_the_images_in_this_chunk() -> None:
    """Two images of three rows; the chunk begins in the first and ends in the second."""
    engine = fake_engine()
    sequence = sequence_of(engine, image_prompt(9, image(1), 8, image(2), 7))
    sequence.features[...] = np.arange(2 * ROWS_PER_TILE)[:, None]
    sequence.computed = 2
    feed = feed_of(engine, Step(GraphKey("prefill", 4), (sequence,), 4))
    assert feed["row_index"].tolist() == [[0, 1, -1, 2]]
    assert feed["image_rows"].shape == (4, HIDDEN)
    assert feed["image_rows"][:3].tolist() == [[1] * HIDDEN, [2] * HIDDEN, [3] * HIDDEN]
    assert feed["token_ids"][0, 2] == 8


def test_decode_puts_every_token_into_the_row_of_its_slot() -> None:
    engine = fake_engine(slots=4, decode={4: 1.0})
    first, second = sequence_of(engine, text_prompt(1), slot=2), sequence_of(engine, text_prompt(1), slot=0)
    first.generated, second.generated = [41, 42], [51]
    engine.cache.lengths[:] = [5, 9, 7, 0]  # slot 1 is kept by a chat, slot 3 is free
    feed = feed_of(engine, Step(GraphKey("decode", 4), (first, second), 3))
    assert feed["token_ids"].tolist() == [[51], [0], [42], [0]]
    assert feed["lengths"].tolist() == [5, 9, 7, 0]
    cos, sin = rope_tables(FACTS.rope, HEAD_DIM, 10)
    np.testing.assert_array_equal(feed["rope_cos"][:, 0], cos[[5, 9, 7, 0]])
    np.testing.assert_array_equal(feed["rope_sin"][:, 0], sin[[5, 9, 7, 0]])


# --- Ropes that depend on the prompt -------------------------------------------------------------------------------------

LONG_TEXTS = RopeParameters(theta=1e8, ntk_positions=8, logn_positions=8)


def test_every_row_is_turned_by_the_rope_of_its_own_prompt() -> None:
    engine = fake_engine(slots=3, decode={3: 1.0}, rope=LONG_TEXTS)
    rows = [sequence_of(engine, text_prompt(1, ntk=ntk), slot) for slot, ntk in ((0, 3.0), (2, 7.0))]
    for sequence in rows:
        sequence.generated = [9]
    engine.cache.lengths[:] = [10, 20, 30]
    feed = feed_of(engine, Step(GraphKey("decode", 3), tuple(rows), 3))
    for slot, (ntk, position) in enumerate([(3.0, 10), (1.0, 20), (7.0, 30)]):
        cos, sin = rope_tables(LONG_TEXTS, HEAD_DIM, 31, ntk)
        np.testing.assert_array_equal(feed["rope_cos"][slot, 0], cos[position])
        np.testing.assert_array_equal(feed["rope_sin"][slot, 0], sin[position])
    again = feed_of(engine, Step(GraphKey("decode", 3), (rows[1],), 3))  # slot 0 takes no part: any angle will do, 1.0 is taken
    np.testing.assert_array_equal(again["rope_cos"][0, 0], rope_tables(LONG_TEXTS, HEAD_DIM, 11)[0][10])


def test_a_chunk_is_turned_by_the_rope_of_the_whole_prompt() -> None:
    engine = fake_engine(rope=LONG_TEXTS)
    sequence = sequence_of(engine, text_prompt(*range(20), ntk=7.0))
    sequence.computed = 4
    feed = feed_of(engine, Step(GraphKey("prefill", 16), (sequence,), 16))
    np.testing.assert_array_equal(feed["rope_sin"][0], rope_tables(LONG_TEXTS, HEAD_DIM, 20, 7.0)[1][4:20])


def test_queries_are_scaled_by_their_position() -> None:
    """log_8 of the position counted from 1, from the ninth on."""
    engine = fake_engine(slots=3, decode={3: 1.0}, rope=LONG_TEXTS)
    sequence = sequence_of(engine, text_prompt(*range(20)))
    sequence.computed = 6
    scales = feed_of(engine, Step(GraphKey("prefill", 4), (sequence,), 4))["query_scale"]
    assert scales.shape == (1, 4, 1)
    np.testing.assert_allclose(scales[0, :, 0], [1, 1, np.log(9) / np.log(8), np.log(10) / np.log(8)], rtol=1e-6)
    sequence.generated = [5]
    engine.cache.lengths[:] = [63, 7, 8]
    scales = feed_of(engine, Step(GraphKey("decode", 3), (sequence,), 3))["query_scale"]
    assert scales.shape == (3, 1, 1)
    np.testing.assert_allclose(scales[:, 0, 0], [2, 1, np.log(9) / np.log(8)], rtol=1e-6)


# --- Cross-attention -----------------------------------------------------------------------------------------------------

SEEN = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1]], dtype=bool)
GATES = np.array([[0, 0], [1, 1], [1, 0]], dtype=np.float32)


def looking() -> Prompt:
    """Three tokens, the second of them an image of two tiles."""
    return dataclasses.replace(cross_prompt(5, ((2, 1), 0), 9), cross_attention=CrossAttentionMask(visible=SEEN, gates=GATES))


def hidden(*visible: list[int]) -> np.ndarray:
    return np.where(np.array(visible, dtype=bool), np.float32(0), np.float32(CROSS_HIDDEN))


def test_a_image_comes_with_its_tiles_and_its_shape() -> None:
    engine = fake_engine(images=(2,))
    prompt = cross_prompt(((2, 2), 1), ((2, 1), 2), 5)
    sequence = sequence_of(engine, prompt)
    for image_, (count, aspect_id) in enumerate([(4, 4), (2, 3)]):
        sequence.tiles_done = image_ * TILES
        feed = feed_of(engine, Step(GraphKey("vision", TILES), (sequence,), TILES))
        assert (feed["tile_count"].tolist(), feed["aspect_id"].tolist()) == ([count], [aspect_id])
        np.testing.assert_array_equal(feed["pixels"], prompt.pixels[image_ * TILES :][:TILES])


def test_prefill_of_what_sees_images() -> None:
    """One image in a graph for two: the second is hidden, and padding sees nothing."""
    engine = fake_engine(images=(2,))
    sequence = sequence_of(engine, looking())
    sequence.computed = 1
    feed = feed_of(engine, Step(GraphKey("prefill", 4, 2), (sequence,), 2))
    assert not {"row_index", "image_rows"} & set(feed)
    none = [0] * 8
    np.testing.assert_array_equal(feed["cross_mask"][0], hidden([1, 1, *[0] * 6], [1, 0, 1, 1, *[0] * 4], none, none))
    assert feed["cross_gate"][0].tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]


def test_an_answer_sees_what_the_end_of_its_prompt_sees() -> None:
    """Row by row: nothing in slot 0, which holds text, and in slot 1, which is free."""
    engine = fake_engine(slots=3, decode={3: 1.0}, images=(2,))
    text, sequence = sequence_of(engine, text_prompt(1), slot=0), sequence_of(engine, looking(), slot=2)
    text.generated, sequence.generated = [4], [5]
    feed = feed_of(engine, Step(GraphKey("decode", 3, 2), (text, sequence), 3))
    assert feed["token_ids"].tolist() == [[4], [0], [5]]
    np.testing.assert_array_equal(feed["cross_mask"][:, 0], hidden([0] * 8, [0] * 8, [1, 0, 1, 1, *[0] * 4]))
    assert feed["cross_gate"][:, 0].tolist() == [[0, 0], [0, 0], [1, 0]]

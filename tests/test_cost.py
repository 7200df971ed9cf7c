"""Operations and bytes of graphs against sums written out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from staticvl.compiler.cost import graph_cost
from staticvl.compiler.graphs import GraphContext, define_graph
from staticvl.compiler.model_info import read_model_info
from staticvl.compiler.plan import Buckets, Options, make_plan
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import GraphKey, Kind, is_cached
from staticvl.tools.cards import CARDS, Card

from .conftest import EMBEDDED

# tiny_llava15: width 128, 4 layers, 4 heads of 32 with 2 kv heads, MLP 352;
# CLIP of 65 tokens, width 128, MLP 384, 3 layers used.
C, LAYERS, KV, MLP, VOCAB = 128, 4, 64, 352, 640
LINEAR = LAYERS * (2 * C * C + 2 * C * KV + 3 * C * MLP)  # parameters of the decoder's products
NORMS = (2 * LAYERS + 1) * C
ROWS = 64 + 16


def cost(kind: Kind, bucket: int, dtype: str) -> tuple[int, int]:
    config = read_config(EMBEDDED)
    info, _ = read_model_info(EMBEDDED, config, vision_tower=None)
    buckets = Buckets(prefill=(16,), decode=(2,), vision=(1,), context=64, slots=2)
    plan = make_plan(config, Options(checkpoint=EMBEDDED, out=Path("unused"), buckets=buckets))
    context = GraphContext(config=config, image=info.image, cache=plan.cache)
    found = graph_cost(define_graph(context, GraphKey(kind, bucket)), dtype)
    return found.flops, found.nbytes


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
def test_text_graphs(dtype: str, width: int) -> None:
    config = read_config(EMBEDDED)
    assert (config.text.vocab_size, config.text.hidden_size, config.text.layers) == (VOCAB, C, LAYERS)
    cache = 2 * LAYERS * ROWS * KV * width  # of one row of a batch
    # Two rows of one token: every weight is read once, of the embedding table two rows.
    flops, nbytes = cost("decode", 2, dtype)
    assert flops == 2 * 2 * (LINEAR + C * VOCAB) + LAYERS * 2 * 4 * C * ROWS
    small = 2 * (4 + 4 + 2 * 32 * 4)  # ids, lengths, rope
    assert nbytes == (LINEAR + C * VOCAB + NORMS + 2 * C) * width + 2 * cache + small
    # Sixteen tokens of one sequence: the head works on the last one alone, and so does the last layer after its attention.
    flops, _ = cost("prefill", 16, dtype)
    last = C * C + 3 * C * MLP
    assert flops == 16 * 2 * (LINEAR - last) + 2 * (last + C * VOCAB) + LAYERS * 16 * 4 * C * ROWS


def test_vision_graph() -> None:
    """Patches, three layers of CLIP and the projector."""
    flops, _ = cost("vision", 1, "float32")
    layer = 65 * 2 * (4 * C * C + 2 * C * 384) + 65 * 4 * 65 * C
    assert flops == 64 * 2 * 192 * C + 3 * layer + 64 * 2 * 2 * C * C


def test_the_bound_is_the_larger_of_two() -> None:
    card = Card("", flops=100.0, bandwidth=10.0, memory=0)
    assert card.bound_ms(50, 1) == pytest.approx(500)
    assert card.limit(50, 1) == "arithmetic"
    assert card.bound_ms(50, 20) == pytest.approx(2000)
    assert card.limit(50, 20) == "memory"
    # The published figure: 7B in float16 read once is about 118 tokens a second.
    assert 1e3 / CARDS["910B"].bound_ms(2 * 6_738_415_616, 2 * 6_738_415_616) == pytest.approx(118, abs=1)


def test_what_a_step_brings_is_counted_as_it_comes() -> None:
    """Weights, cache and images' keys halve with the dtype; masks and tables of a step stay float32."""
    checkpoint = EMBEDDED.with_name("tiny_mllama")
    config = read_config(checkpoint)
    info, _ = read_model_info(checkpoint, config, vision_tower=None)
    buckets = Buckets(prefill=(16,), decode=(2,), images=(1,), context=64, slots=2)
    plan = make_plan(config, Options(checkpoint=checkpoint, out=Path("unused"), buckets=buckets))
    graph = define_graph(GraphContext(config=config, image=info.image, cache=plan.cache), GraphKey("prefill", 16, 1))
    brought = sum(4 * math.prod(spec.shape) for spec in graph.inputs if not is_cached(spec.name))
    assert {"cross_mask", "cross_gate"} <= {spec.name for spec in graph.inputs}
    assert 2 * graph_cost(graph, "float16").nbytes - graph_cost(graph, "float32").nbytes == brought

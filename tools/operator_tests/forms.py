"""The calls of operators that an artifact's compiled graphs make: what is computed, and at which sizes.

M rows, C features, B rows of a batch, T tokens, H query heads, K kv heads, D head dim, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...runtime.artifact import Artifact, CacheSpec, GraphSpec, Manifest, Segment
from ...runtime.backends.ascend.kernel import load_graph
from ...runtime.backends.ge_simulator import ge_graph
from ...runtime.backends.ge_simulator.card_rules import attention
from ...runtime.backends.ge_simulator.card_rules.tensors import GraphView, NodeView

MOST_BATCH = 4  # rows of attention over caches: as many as its cases need
MOST_ROWS = 64  # of everything else
MOST_WEIGHT = 2**27  # elements of one weight: larger ones have fewer features here


@dataclass(frozen=True, slots=True)
class Form:
    """A form of call: `kind` names what is computed (a builder of cases.py), `sizes` its sizes."""

    kind: str
    sizes: tuple[tuple[str, int], ...]

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    @property
    def work(self) -> int:
        return math.prod(size for _, size in self.sizes if size)


def form(kind: str, **sizes: int) -> Form:
    return Form(kind, tuple(sizes.items()))


def artifact_forms(artifact: Artifact) -> dict[Form, tuple[str, ...]]:
    """The forms of a whole artifact, those of each kind at its largest sizes, with the kinds of graphs that have the kind; of a
    pipeline, all stages. torchair has to be importable."""
    manifest = artifact.manifest
    forms: list[Form] = []
    used: dict[str, set[str]] = {}
    for graph, parsed, cache in _parsed(artifact.folder, manifest):
        for each in graph_forms(graph, parsed, cache):
            forms.append(each)
            used.setdefault(each.kind, set()).add(graph.kind)
    return {each: tuple(sorted(used[each.kind])) for each in largest(forms)}


def _parsed(folder: Path, manifest: Manifest) -> Iterator[tuple[GraphSpec, ge_graph.GeGraph, CacheSpec]]:
    """The compiled graphs of all stages, each with its stage's cache."""
    for number in range(manifest.pp):
        stage = manifest.of_stage(number)
        for graph in stage.graphs:
            if not graph.eager:
                file = next(step.file for step in graph.plan if isinstance(step, Segment))
                yield graph, ge_graph.parse(load_graph(folder / file, manifest.files[file])), stage.cache


def largest(forms: Iterable[Form]) -> list[Form]:
    """The form of each kind with the most work, in order of their kinds."""
    best: dict[str, Form] = {}
    for each in forms:
        if each.kind not in best or each.work > best[each.kind].work:
            best[each.kind] = each
    return [best[kind] for kind in sorted(best)]


def graph_forms(graph: GraphSpec, parsed: ge_graph.GeGraph, cache: CacheSpec) -> Iterator[Form]:
    """The forms of one graph. What holds no weight and no formula of its own (Add, Cast, Reshape) has none, and neither have
    collectives, which need several cards."""
    for view in GraphView(parsed):
        made = _attention(view, cache) if view.node.type == attention.FIA else _READERS.get(view.node.type, _none)(view)
        if made is not None:
            yield made
    if graph.candidates:
        rows, vocabulary = graph.outputs[0].shape
        yield form("candidates", rows=min(rows, MOST_ROWS), vocabulary=vocabulary, count=graph.candidates)


def _none(_view: NodeView) -> None:
    return None


# ---- attention


def _attention(view: NodeView, cache: CacheSpec) -> Form | None:
    call = attention.sizes(view)
    if call is None:
        return None
    heads = {"batch": min(call.rows, MOST_BATCH), "tokens": call.queries, "heads": call.heads, "kv_heads": call.kv_heads}
    one = "one" if call.queries == 1 else "several"
    if view.source("actual_seq_lengths_kv") is not None:
        stored = "int8_cache" if cache.text_dtype == "int8" else "cache"
        return form(f"{stored}_{one}", **heads, keys=call.keys, width=call.width)
    if view.attribute("input_layout") == "BSH":
        kind = "whole" if view.source("atten_mask") is None else "padded"
        width = round(view.attribute("scale") ** -2)  # without what fills heads up to a multiple of 16
        return form(kind, batch=call.rows, tokens=call.queries, heads=call.heads, width=width)
    if cache.cross is None:
        return None
    # Keys of one image: more are joined in front of the operator.
    return form(f"cross_{one}", **heads, keys=cache.cross.rows, tiles=cache.cross.tiles, width=call.width)


# ---- operators of rows


def _rows(kind: str, name: str = "x") -> Callable[[NodeView], Form | None]:
    """A reader of operators whose work is that of the rows of one input."""

    def read(view: NodeView) -> Form | None:
        shape = view.shape(name)
        return None if not shape else form(kind, rows=min(math.prod(shape[:-1]), MOST_ROWS), width=shape[-1])

    return read


def _rotary(kind: str, query: str, key: str | None = None) -> Callable[[NodeView], Form | None]:
    def read(view: NodeView) -> Form | None:
        q, k = view.shape(query), view.shape(key) if key else None
        if q is None:
            return None
        one = "one" if q[1] == 1 else "several"
        sizes = {"batch": min(q[0], MOST_ROWS), "tokens": min(q[1], MOST_ROWS), "heads": q[2], "width": q[3]}
        return form(f"{kind}_{one}", **sizes, **({"kv_heads": k[2]} if k else {}))

    return read


# ---- products


def _product(view: NodeView) -> Form | None:
    x, weight = view.shape("x1"), view.shape("x2")
    if x is None or weight is None or not view.attribute("transpose_x2", False):
        return None
    return _sized("product" + _with_bias(view), x, *weight)


def _int8_product(view: NodeView) -> Form | None:
    """Those whose results stay whole numbers are part of `swiglu`."""
    x, weight = view.shape("x1"), view.shape("x2")
    if x is None or weight is None or view.source("pertoken_scale") is None:
        return None
    return _sized("int8_product" + _with_bias(view), x, weight[1], weight[0])


def _swiglu_rows(view: NodeView) -> Form | None:
    x, product = view.shape("x"), view.producer("x")
    rows = product.shape("x1") if product else None
    return _sized("swiglu_rows", rows, x[-1], rows[-1]) if x and rows else None


def _stored_product(view: NodeView) -> Form | None:
    """Weights in 8 or 4 bits: the kind says in how many, in blocks of which size (0: one for a column), and whether around zero
    points."""
    x, scales = view.shape("x"), view.shape("antiquant_scale")
    if x is None or scales is None:
        return None
    bits = 8 if view.dtype("weight") == "int8" else 4
    offset = "" if view.source("antiquant_offset") is None else "_asym"
    block = view.attribute("antiquant_group_size", 0)
    return _sized(f"w{bits}_{block}{offset}{_with_bias(view)}", x, scales[-1], x[-1])


def _with_bias(view: NodeView) -> str:
    return "" if view.source("bias") is None else "_bias"


def _sized(kind: str, x: tuple[int, ...], features: int, inputs: int) -> Form:
    """`features` out, `inputs` in; one row and several are different kernels on a card."""
    rows = min(math.prod(x[:-1]), MOST_ROWS)
    fitting = max(MOST_WEIGHT // inputs // 128 * 128, 128)
    one = "one" if rows == 1 else "several"
    return form(f"{kind}_{one}", rows=rows, features=min(features, fitting), inputs=inputs)


_READERS: dict[str, Callable[[NodeView], Form | None]] = {
    "MatMul": _product,
    "QuantBatchMatmulV3": _int8_product,
    "WeightQuantBatchMatmulV2": _stored_product,
    "DequantSwigluQuant": _swiglu_rows,
    "RmsNorm": _rows("rms_norm"),
    "AddRmsNorm": _rows("add_rms_norm", "x1"),
    "AddRmsNormDynamicQuant": _rows("add_rms_norm_rows", "x1"),
    "DynamicQuant": _rows("rows"),
    "LayerNormV4": _rows("layer_norm"),
    "GeluV2": _rows("gelu"),
    "FastGelu": _rows("quick_gelu"),
    "SwiGlu": _rows("swiglu"),
    "ApplyRotaryPosEmb": _rotary("rotary_both", "query", "key"),
    "RotaryMul": _rotary("rotary", "x"),
}

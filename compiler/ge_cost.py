"""What a card does in one run of a GE graph: kernels, bytes that they read and write, and operations.

Counted on the graph as torchair made it. A kernel reads its inputs and writes its outputs, each time from memory: copies count,
and a value that several kernels read counts for each of them. Attention reads the whole cache that it is given.

Nodes that only see a tensor in another shape launch nothing. Nor do transposes that CANN's passes remove: those that move axes
of one element (Dim1TransposeToSqueezePass), and those directly in front of a product with quantised weights, which takes them
either way. What else CANN fuses is counted as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..runtime.artifact import LoweredCost
from ..runtime.backends.ge_simulator.ge_graph import GeGraph, Node, Source, parse
from .ge_sizes import Size, Sizes

# Nodes that launch no kernel.
FREE = ("Data", "RefData", "Const", "NetOutput", "Reshape", "Identity", "Squeeze", "Unsqueeze")
# Inputs of products that a card takes transposed or not, as it is compiled.
_TURNED = {"WeightQuantBatchMatmulV2": ("weight", "antiquant_scale", "antiquant_offset")}


@dataclass(frozen=True, slots=True)
class Moved:
    """Tensors that a kernel reads and writes; None: of unknown size."""

    read: list[Size | None]
    written: list[Size | None]


def serialised_cost(graph: bytes) -> LoweredCost:
    """That of a serialised ModelDef. Raises GeGraphError."""
    return lowered_cost(parse(graph))


def lowered_cost(graph: GeGraph) -> LoweredCost:
    """The work of one run."""
    sizes = Sizes(graph)
    launched = [node for node in graph.nodes if node.type not in FREE]
    readers = _readers(graph)
    kernels = [node for node in launched if not _is_folded(node, sizes, readers)]
    moved = [_MOVED.get(node.type, _everything)(node, sizes) for node in kernels]
    return LoweredCost(
        kernels=len(kernels),
        folded=len(launched) - len(kernels),
        flops=sum(_FLOPS[node.type](node, sizes) for node in kernels if node.type in _FLOPS),
        read=sum(map(_nbytes, (each.read for each in moved))),
        written=sum(map(_nbytes, (each.written for each in moved))),
        unsized=sum((*each.read, *each.written).count(None) for each in moved),
    )


def _nbytes(sizes: Iterable[Size | None]) -> int:
    return sum(size.nbytes for size in sizes if size)


# ---- nodes that CANN's passes remove


def _readers(graph: GeGraph) -> dict[Source, list[tuple[Node, str]]]:
    """Who reads each tensor, as which input."""
    readers: dict[Source, list[tuple[Node, str]]] = {}
    for node in graph.nodes:
        for name, source in zip(node.input_names, node.inputs, strict=True):
            if source:
                readers.setdefault(source, []).append((node, name))
    return readers


def _is_folded(node: Node, sizes: Sizes, readers: dict[Source, list[tuple[Node, str]]]) -> bool:
    if node.type == "TensorMove":  # torchair puts one before each tensor that the operator writes in place
        of = readers.get(Source(node.name, 0), [])
        return bool(of) and all(reader.type == "ApplyRotaryPosEmb" for reader, _ in of)
    return node.type == "Transpose" and _is_folded_transpose(node, sizes, readers)


def _is_folded_transpose(node: Node, sizes: Sizes, readers: dict[Source, list[tuple[Node, str]]]) -> bool:
    size, order = sizes.input(node), sizes.order(node)
    if size and order:
        longer = [axis for axis in order if size.shape[axis] != 1]
        if longer == sorted(longer):
            return True
    of = readers.get(Source(node.name, 0), [])
    return bool(of) and all(name in _TURNED.get(reader.type, ()) for reader, name in of)


# ---- bytes


def _everything(node: Node, sizes: Sizes) -> Moved:
    """All inputs and outputs: elementwise operators, products, copies, and types that are not known here."""
    return Moved(sizes.inputs(node), sizes.outputs(node))


def _part(node: Node, sizes: Sizes) -> Moved:
    """A lookup or a slice: of its first input it reads what it writes."""
    written = sizes.outputs(node)
    return Moved([*written, *sizes.inputs(node)[1:]], written)


def _scatter(node: Node, sizes: Sizes) -> Moved:
    """New rows, which are read, and written into a tensor that stays where it is, in its dtype."""
    into, rows = sizes.input(node, "var"), sizes.input(node, "updates")
    return Moved(sizes.inputs(node)[1:], [Size(into.dtype, rows.shape) if into and rows else None])


def _scatter_pages(node: Node, sizes: Sizes) -> Moved:
    """The same of keys and values, into pages."""
    new = [sizes.input(node, name) for name in ("key", "value")]
    return Moved([*new, sizes.input(node, "slot_mapping")], new)


def _attention(node: Node, sizes: Sizes) -> Moved:
    """All inputs, and where keys and values lie in pages, those that the table names. Its second output, the logarithm of the
    softmax's denominator, is there only on request."""
    read = sizes.inputs(node)
    if table := sizes.input(node, "block_table"):
        named = [name for name, source in zip(node.input_names, node.inputs, strict=True) if source]
        read = [
            _pages(size, table) if size and name in ("key0", "value0") else size for name, size in zip(named, read, strict=True)
        ]
    written = sizes.outputs(node)
    return Moved(read, written if node.attributes.get("softmax_lse_flag") else written[:1])


def _norm_and_quant(node: Node, sizes: Sizes) -> Moved:
    """Rows of whole numbers, the sum and scales; the second rows and scales are there for a second smoothing, which is none."""
    written = sizes.outputs(node)
    return Moved(sizes.inputs(node), [written[place] for place in (0, 2, 3)])


def _pages(pool: Size, table: Size) -> Size:
    return Size(pool.dtype, (table.elements, *pool.shape[1:]))


_MOVED: dict[str, Callable[[Node, Sizes], Moved]] = {
    **dict.fromkeys(("GatherV2", "StridedSliceV2", "SliceD", "Slice"), _part),
    **dict.fromkeys(("Scatter", "QuantUpdateScatter"), _scatter),
    "ScatterPaKvCache": _scatter_pages,
    "FusedInferAttentionScore": _attention,
    "AddRmsNormDynamicQuant": _norm_and_quant,
}


# ---- operations


def _product(node: Node, sizes: Sizes) -> int:
    """2 K for each element of the output, K being the length of a row of x."""
    x, output = sizes.input(node), sizes.outputs(node)[0]
    if x is None or output is None:
        return 0
    turned = any(node.attributes.get(name) for name in ("transpose_x1", "transpose_x", "adj_x1"))
    return 2 * output.elements * x.shape[-2 if turned else -1]


def _scores(node: Node, sizes: Sizes) -> int:
    """Scores and weighted values: 4 S for each element of the queries, S being the keys of a row, seen or not."""
    query, keys, table = (sizes.input(node, name) for name in ("query", "key0", "block_table"))
    axis = node.attributes["input_layout"].partition("_")[0].find("S")
    if query is None or keys is None or axis < 0:
        return 0
    seen = table.shape[-1] * node.attributes["block_size"] if table else keys.shape[axis]
    return 4 * query.elements * seen


_FLOPS: dict[str, Callable[[Node, Sizes], int]] = {
    **dict.fromkeys(
        (
            "BatchMatMul", "BatchMatMulV2", "MatMul", "MatMulV2", "MatmulAllReduce", "QuantBatchMatmulV3",
            "WeightQuantBatchMatmulV2",
        ),
        _product,
    ),
    "FusedInferAttentionScore": _scores,
}  # fmt: skip

"""Weights in FRACTAL_NZ, the order of blocks in which a card's matrix unit reads them; on a card alone, where it is requested.

torch_npu brings a tensor into the layout once, after loading. torchair notes the layout of each input when a graph is loaded
(`_update_internal_format_from_inputs`), so no graph is another. Which weights are cast goes by their dtype and shape, since a
graph does not name its inputs: those of which all graphs read every input as the matrix of a product, directly, and whose sizes
are whole blocks:

    MatMul               float16, bfloat16: both sizes multiples of 16 (torchair casts layers so, and so does vllm-ascend)
    QuantBatchMatmulV3   int8 [K, N]: K a multiple of 16, N of 32 (sgl-project/sglang: pull request 21209)

Everything else stays: tables of embeddings, an lm_head of the same shape, tied or not, weights that a graph transposes, and
weights in 8 or 4 bits beside 16-bit activations, whose operator takes the layout in some forms only (vllm-ascend: issue 5603).
A size of 1 is refused by the operator (issue 10014); no multiple of 16 is one.

Never tried on a card. The layout has changed answers of other models (vllm-ascend: pull request 4056), so it is off by default.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...artifact import IN_FLOAT32, ArtifactError, Manifest, Segment
from ...shown import quoted
from .kernel import load_graph

if TYPE_CHECKING:
    from torch import Tensor

    from ..ge_simulator.ge_graph import GeGraph, Node

WeightForm = tuple[str, tuple[int, ...]]  # dtype and shape

VARIABLE = "STATICVL_WEIGHT_LAYOUT"
ND, NZ = "nd", "nz"  # as stored, and in FRACTAL_NZ
FRACTAL_NZ = 29  # its number in torch_npu
# Operator -> the dtypes of its matrix `x2`, and what its last two sizes are multiples of.
_BLOCKS = {
    "MatMul": (("float16", "bfloat16"), (16, 16)),
    "MatMulV2": (("float16", "bfloat16"), (16, 16)),
    "QuantBatchMatmulV3": (("int8",), (16, 32)),
}


def weight_layout() -> str:
    """The layout that VARIABLE names, ND where it is not set; raises ArtifactError for another value."""
    value = os.environ.get(VARIABLE) or ND
    if value not in (ND, NZ):
        raise ArtifactError(f"{VARIABLE} is {quoted(value)}; expected {ND} (weights as they are stored) or {NZ} (FRACTAL_NZ)")
    return value


def artifact_forms_in_nz(folder: Path, manifest: Manifest) -> frozenset[WeightForm]:
    """The forms of the weights of an artifact that gain by FRACTAL_NZ and that no graph reads otherwise; eager graphs read
    theirs as torch does. Reads all graphs; torchair has to be importable."""
    from ..ge_simulator.ge_graph import parse

    graphs, others = [], set[WeightForm]()
    for graph in manifest.graphs:
        if graph.eager:
            specs = (manifest.weights[name.removesuffix(IN_FLOAT32)] for name in graph.weights)
            others.update((spec.dtype, tuple(spec.shape)) for spec in specs)
        else:
            file = next(step.file for step in graph.plan if isinstance(step, Segment))
            graphs.append(parse(load_graph(folder / file, manifest.files[file])))
    return forms_in_nz(graphs) - others


def forms_in_nz(graphs: Iterable[GeGraph]) -> frozenset[WeightForm]:
    """The forms of which every input of every graph may be cast."""
    taken, refused = set[WeightForm](), set[WeightForm]()
    for graph in graphs:
        for node in graph.inputs:
            descriptor = node.outputs[0]
            form = (descriptor.dtype or "", descriptor.shape or ())
            (taken if _is_matrix(graph, node) else refused).add(form)
    return frozenset(taken - refused)


def _is_matrix(graph: GeGraph, node: Node) -> bool:
    """Whether a graph input is read, and only as the matrix of products that take it in the layout."""
    readers = list(_readers(graph, node))
    return bool(readers) and all(_takes(kind, port, node) for kind, port in readers)


def _readers(graph: GeGraph, read: Node) -> Iterator[tuple[str, str]]:
    """The type and the port of everything that reads an input."""
    for node in graph.nodes:
        ports = node.input_names or ("",) * len(node.inputs)
        for port, source in zip(ports, node.inputs, strict=True):
            if source is not None and source.producer == read.name:
                yield node.type, port


def _takes(kind: str, port: str, node: Node) -> bool:
    descriptor = node.outputs[0]
    dtypes, blocks = _BLOCKS.get(kind, ((), (1, 1)))
    shape = descriptor.shape or ()
    whole = len(shape) == 2 and all(size > 0 and size % block == 0 for size, block in zip(shape, blocks, strict=True))
    return port == "x2" and descriptor.dtype in dtypes and whole


def in_layout(weight: Tensor, forms: Container[WeightForm]) -> Tensor:
    """A weight on a card: copied into FRACTAL_NZ where it has one of the forms."""
    if (str(weight.dtype).removeprefix("torch."), tuple(weight.shape)) not in forms:
        return weight
    import torch_npu  # pyright: ignore[reportMissingImports]

    return torch_npu.npu_format_cast(weight, FRACTAL_NZ)

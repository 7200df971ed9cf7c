"""Records of compiled graphs: their tensors, steps and certificates."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from msgspec import UNSET, UnsetType, field

from .record import DTYPE_BYTES, Count, Dtype, Number, Record, Shape, Size, Time, Work

Kind = Literal["vision", "prefill", "decode", "verify"]
KINDS: tuple[Kind, ...] = ("vision", "prefill", "decode", "verify")
CANDIDATES = ("top_logits", "top_ids", "mass")  # outputs of text graphs after the logits
IN_FLOAT32 = ".float32"  # ends the name of a weight that a graph takes in float32, beside the one in its own type
CROSS_HIDDEN = -1e30  # added to the scores of keys that a token does not see; finite, so that a token may see none


class TensorSpec(Record, frozen=True, kw_only=True):
    """One input, output or buffer of a graph."""

    name: str
    dtype: Dtype  # numpy name
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class CertificateCase(Record, frozen=True, kw_only=True):
    """One comparison of a compiled graph with the eager definition."""

    name: str  # what was fed, e.g. "length 128, past 0"
    error: float  # largest absolute difference divided by the largest magnitude of the reference


class Certificate(Record, frozen=True, kw_only=True):
    """The checks of a graph when it was compiled."""

    reference: str  # e.g. "eager torch float32"
    tolerance: float
    cases: tuple[CertificateCase, ...]
    # Where kernels round activations, the cases are those of an exact reference graph, which does not, and this is the distance
    # of the graph itself: length of the difference of the outputs, divided by the length of the definition's outputs.
    rounding: float | None = None

    @property
    def worst(self) -> float:
        return max((case.error for case in self.cases), default=0.0)

    @property
    def passed(self) -> bool:
        return bool(self.cases) and self.worst <= self.tolerance


class Segment(Record, frozen=True, kw_only=True, tag="segment"):
    """A part of a graph in a file of its own, whose inputs and outputs have these names."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the step reads or writes."""
        return (*self.inputs, *self.outputs)


class Collective(Record, frozen=True, kw_only=True, tag="collective"):
    """An exchange between two segments. all_reduce: the sum of all ranks' `reads`, in place where `writes` is the same;
    all_gather: all ranks' `reads` joined along the last axis, rank 0 first."""

    op: Literal["all_reduce", "all_gather"]
    ranks: Count
    reads: str
    writes: str

    @property
    def names(self) -> tuple[str, ...]:
        """As of Segment."""
        return (self.reads, self.writes)


class Transfer(Record, frozen=True, kw_only=True, tag="transfer"):
    """A tensor sent to another stage of a pipeline or received from it, by each rank for the rank in its place there."""

    op: Literal["send", "receive"]
    stage: Number  # the other
    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """As of Segment."""
        return (self.name,)


Step = Segment | Collective | Transfer


class Kernels(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The lowering of a graph where the fastest one depends on the machine. It does not change results."""

    cores: Number = 0  # that a run is shared among; 0: all that the process may use
    attention_tokens: Number = 0  # tokens of a chunk that attend at a time; 0: all
    widened_kib: Size = 0  # of a 16-bit matrix, upcast at a time; 0: UPCAST_BYTES of compiler/onnx_graph/products.py
    # Milliseconds of each way that was measured, by its description: the best of several runs of a model of few layers.
    measured: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0  # part of the cores that other processes took, where it was too much to choose anything; else 0

    @property
    def described(self) -> str:
        """A description in words."""
        if self.busy:
            return f"as by default: not tuned, other processes took {self.busy:.0%} of the cores"
        words = {
            f"{self.attention_tokens} tokens attend at a time": self.attention_tokens,
            f"{self.widened_kib} KiB upcast at a time": self.widened_kib,
            "one core": self.cores == 1,
            f"{self.cores} cores": self.cores > 1,
        }
        return ", ".join(word for word, holds in words.items() if holds) or "as by default"


class LoweredCost(Record, frozen=True, kw_only=True):
    """What a card does in one run, counted on the lowered graph (compiler/ge_cost.py)."""

    kernels: Number  # launches, folded nodes not among them
    folded: Number  # transposes and copies that CANN's passes remove
    flops: Work  # of products and attention
    read: Work  # bytes that kernels read
    written: Work  # bytes that they write
    unsized: Number = 0  # tensors of unknown size, counted as no bytes

    @property
    def nbytes(self) -> int:
        return self.read + self.written


class GraphKey(NamedTuple):
    """The key of a graph of an artifact: its kind, its bucket, and the images that a text graph sees by cross-attention.

    Keys are unique within an artifact, of a pipeline within a stage. Their units are those of GraphSpec.
    """

    kind: Kind
    bucket: int
    images: int = 0

    @property
    def name(self) -> str:
        """Such as "prefill-64-images-2"; "prefill-64" where no images are seen."""
        return f"{self.kind}-{self.bucket}" + (f"-images-{self.images}" if self.images else "")


class GraphSpec(Record, frozen=True, kw_only=True):
    """One compiled graph: a kind at one bucket."""

    kind: Kind
    bucket: Count  # vision: tiles; prefill, verify: new tokens; decode: rows
    images: Number = 0  # images whose cross-attention keys a text graph reads
    file: str  # of a graph in steps: the folder of their files
    key: str  # digest of everything the graph was made from
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cost_ms: Time  # one run on the machine that compiled it
    flops: Work = 0  # operations of one run, on any device
    nbytes: Work = 0  # bytes that one run has to read or write, the whole cache included
    certificate: Certificate | None = None
    kernels: Kernels | UnsetType = UNSET  # ONNX: the choice of `--tune`; left out of the manifest without it
    # Ascend: the arguments of a kernel before its inputs, in order: weights by name, then small tensors that are settings.
    weights: tuple[str, ...] = ()
    constants: dict[str, tuple[float, ...]] = field(default_factory=dict)
    eager: bool = False  # Ascend: run op by op, not as a compiled graph
    # Ascend: rules of cards (ge_simulator/card_rules) whose warnings the graph meets, with how many nodes; left out where none.
    card_warnings: dict[str, Number] | UnsetType = UNSET
    # Of a graph in steps. Left out of the manifest where unset, so that a graph of one file keeps its digest.
    steps: tuple[Step, ...] | UnsetType = UNSET
    buffers: tuple[TensorSpec, ...] | UnsetType = UNSET  # tensors between steps; one may hold several, one after another
    # Of one of several ranks: the number of collectives in a run, and the bytes that it sends in them.
    collectives: Number = 0
    collective_bytes: Work = 0
    # Ascend, of a compiled graph; left out of the manifest where unset, as by versions that did not count.
    lowered: LoweredCost | UnsetType = UNSET

    @property
    def graph_key(self) -> GraphKey:
        """The key of the graph within the artifact; not `key`, the digest of what it was made from."""
        return GraphKey(self.kind, self.bucket, self.images)

    @property
    def name(self) -> str:
        return self.graph_key.name

    @property
    def candidates(self) -> int:
        """The number of candidates of each row; 0: the graph has none."""
        return next((spec.shape[1] for spec in self.outputs if spec.name == CANDIDATES[0]), 0)

    @property
    def plan(self) -> tuple[Step, ...]:
        """The steps of a run in order; a graph of one file has one segment."""
        whole = Segment(file=self.file, inputs=tuple(s.name for s in self.inputs), outputs=tuple(s.name for s in self.outputs))
        return self.steps or (whole,)

    @property
    def sent(self) -> tuple[TensorSpec, ...]:
        """The tensors that a run sends to other stages."""
        specs = {spec.name: spec for spec in (*self.outputs, *(self.buffers or ()))}
        return tuple(specs[step.name] for step in self.plan if isinstance(step, Transfer) and step.op == "send")

    @property
    def files(self) -> tuple[str, ...]:
        """All files of the graph."""
        return tuple(step.file for step in self.plan if isinstance(step, Segment))


def is_cached(name: str) -> bool:
    """Whether a graph input or output is a part of the cache."""
    return name.startswith(("k_cache.", "v_cache.", "cross_k.", "cross_v."))

"""The artifact contract: what the compiler writes and the runtime reads. This file is its only description.

An artifact is a folder that can be moved or copied; every path in it is relative:

    manifest.json            everything below, as JSON, sealed by its own digest
    *.onnx, *.torchair       one graph per bucket; weights are referred to, never contained. Of a graph in steps (see below)
                             a folder with a file for each
    weights/*.safetensors    one copy of the weights, shared by every graph; of a model that is cut among ranks, those of rank R
                             lie in weights/rank-R/, in files of the same names with the same tensors at the same offsets
    tokenizer-*/             tokenizer files and the chat template, as the checkpoint gave them; definition.json, the sizes
                             of the model, which tools that check an artifact trace its definition from
    manifest.sig             where the artifact was signed: see signature.py

Files whose names begin with a dot are no part of it: what a build notes, locks, and what machines keep beside it (.host/).

Names of graph inputs and outputs (B rows, T tokens, S cache rows, H query heads, K kv heads, D head dim, C hidden size,
V vocabulary, P rows per tile):

    vision   pixels [tiles, size, size, 3] uint8                 -> image_rows [tiles, P, C]
    prefill  token_ids [1, T], row_index [1, T] (-1: embed the token id, else take that row of image_rows),
             image_rows [T, C], lengths [1] (tokens in the cache before this step), last_index [1],
             rope_cos, rope_sin [1, T, D], k_cache.N, v_cache.N [1, K, S, D]
                                                                 -> logits [1, V], the cache updated in place
    decode   token_ids [B, 1], lengths [B], rope_cos, rope_sin [B, 1, D], k_cache.N, v_cache.N [B, K, S, D]
                                                                 -> logits [B, V], the cache updated in place
    verify   (where an artifact has it) as decode, of one row and T tokens: token_ids [1, T], lengths [1],
             rope_cos, rope_sin [1, T, D], k_cache.N, v_cache.N [1, K, S, D]
                                                                 -> logits [T, V] behind each token, the cache updated in place

Text graphs may also put out what a token can nearly always be chosen from, N candidates: top_logits [R, N], the largest of
each of the R rows of logits, falling; top_ids [R, N]; and mass [R], the sum of exp((x - largest) * inverse_temperature) over
the row. They then take inverse_temperature [B]. The order of equals is up to the device, and so is which of those that equal
the smallest of the N are among them. Logits are the first output as ever, but need not be brought to the host.

Where queries are scaled by their position (Qwen's logn attention), text graphs also take query_scale [B, T, 1].

Where images enter by cross-attention (Llama-3.2-Vision; X keys per image, I images at most), prefill takes no
row_index and image_rows, and the cache has a second part that is never mixed with the first: cross_k.N.I, cross_v.N.I
[slots, K, X, D] for cross layer N and image I. A vision graph runs one image and its outputs are entries of that part:

    vision   pixels [tiles, size, size, 3] uint8, tile_count [1], aspect_id [1] -> cross_k.N, cross_v.N [1, K, X, D]

A text graph with `images` = n > 0 reads the first n images of its rows: cross_k.N.0 .. cross_k.N.n-1 [B, K, X, D] and the
same of cross_v, with cross_mask [B, T, n * tiles] (0 where a token sees a tile, else CROSS_HIDDEN) and cross_gate [B, T, 2]
(factors 0 or 1 of a cross layer's attention and MLP). A text graph with `images` = 0 has no cross layers at all.

A cache of text in 8 bits (CacheSpec.text_dtype) holds whole steps of scales, one for each channel of each kv head, which are
weights: text.layers.L.attn.k_scale and v_scale [K * D]. Keys are scaled as they lie there, behind the rotary embedding.
An ONNX graph whose chunk attends piece by piece also has outputs NAME@0, NAME@1 ... for an updated cache NAME: the same cache
behind each piece but the last. They are bound to the memory of NAME, as the input is.

Integers are int32. On Ascend the weights and the cache are float16 or bfloat16 (CacheSpec.dtype); inputs that a step brings
and outputs that are no cache are as above, so that the host does the same on both backends. Padding is on the right: a
prefill step writes T cache rows from `lengths` on, of which only the first last_index + 1 mean anything; the next step
overwrites the others and no real token attends to them.

A device without collectives runs a graph of one rank of several as steps: segments, each a file with named inputs and outputs,
and collectives between them. Their tensors are inputs and outputs of the graph, or buffers that live between segments. The
files are the same for all ranks; an ONNX segment names a weight file without its folder, and whoever opens the segment says
whose folder that is.

Of a pipeline each stage has a part of the layers, with graphs and a cache of its own (`Manifest.stages`); layers of caches are
counted from 0 in each. Its ranks are numbered one stage after another. Graphs of one name make one run together: steps
between stages hand on `next_hidden` [B, T, C], which is `hidden` to the next, and `next_features` [1, X, C] of images that
enter by cross-attention; the last stage gives `logits` back to the first.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .files import open_regular, read_regular, sha256_file, write_atomically
from .locks import Hold, hold
from .shown import shown
from .soundness import faults, leads_out

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
WEIGHTS = "weights"
DEFINITION = "definition.json"
Kind = Literal["vision", "prefill", "decode", "verify"]
KINDS: tuple[Kind, ...] = ("vision", "prefill", "decode", "verify")
CANDIDATES = ("top_logits", "top_ids", "mass")  # outputs of text graphs behind the logits
CROSS_HIDDEN = -1e30  # added to the score of a key that a token does not see; finite, so that a row may see nothing


class ArtifactError(ValueError):
    """An artifact that is missing, damaged, or not usable here; the message says what to do."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything in the manifest: immutable, and an unknown field is an error."""


# Ranges of numbers: a manifest from elsewhere must not make its reader take memory or time without end.
Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Number = Annotated[int, Meta(ge=0, le=1 << 24)]  # a count or an index that may be 0, or the id of a token
Size = Annotated[int, Meta(ge=0, le=1 << 50)]  # bytes
Work = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]  # operations or bytes of a run
Time = Annotated[float, Meta(ge=0, le=1e12)]
Dtype = Annotated[str, Meta(pattern=r"^(float32|int32|float16|bfloat16|uint8|int8)\Z")]
MOST_MANIFEST = 1 << 28  # bytes of manifest.json
Shape = tuple[Annotated[int, Meta(ge=0, le=1 << 40)], ...]

_WIDTHS: dict[str, int] = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}


class TensorSpec(Record, frozen=True, kw_only=True):
    """One named graph input or output."""

    name: str
    dtype: Dtype  # numpy name
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _WIDTHS[self.dtype]


class CertificateCase(Record, frozen=True, kw_only=True):
    """One comparison of a compiled graph with the eager definition."""

    name: str  # what was fed, e.g. "length 128, past 0"
    error: float  # largest absolute difference divided by the largest magnitude of the reference


class Certificate(Record, frozen=True, kw_only=True):
    """How a graph was checked when it was compiled."""

    reference: str  # e.g. "eager torch float32"
    tolerance: float
    cases: tuple[CertificateCase, ...]
    # Where kernels round activations the cases are those of a twin graph that does not, and this is the distance between
    # the graph itself and the reference: length of the difference of the outputs, divided by the reference's length.
    rounding: float | None = None

    @property
    def worst(self) -> float:
        return max((case.error for case in self.cases), default=0.0)

    @property
    def passed(self) -> bool:
        return bool(self.cases) and self.worst <= self.tolerance


class Segment(Record, frozen=True, kw_only=True, tag="segment"):
    """A part of a graph that a device runs by itself; the file's inputs and outputs bear these names."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the step reads or writes."""
        return (*self.inputs, *self.outputs)


class Collective(Record, frozen=True, kw_only=True, tag="collective"):
    """Where ranks meet between two segments. all_reduce: the sum of all ranks' `reads`, in place where `writes` is the same;
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
    """Where a stage of a pipeline hands a tensor to another, each rank to the one in its place there."""

    op: Literal["send", "receive"]
    stage: Number  # the other
    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """As of Segment."""
        return (self.name,)


Step = Segment | Collective | Transfer


class Kernels(Record, frozen=True, kw_only=True, omit_defaults=True):
    """How a graph was lowered where the fastest way depends on the machine. Results are the same whatever it says."""

    cores: Number = 0  # that a run is shared among; 0: all that the process may use
    attention_tokens: Number = 0  # tokens of a chunk that attend at a time; 0: all
    widened_kib: Size = 0  # of a 16-bit matrix that are upcast at a time; 0: UPCAST_BYTES of compiler/onnx_graph/products.py
    # Milliseconds of each way that was tried, by its description: the best of several runs of a model of few layers.
    measured: dict[str, float] = {}
    busy: float = 0.0  # part of the cores that other processes took meanwhile; so much that nothing was chosen, else 0

    @property
    def described(self) -> str:
        """In words, for people."""
        if self.busy:
            return f"as by default: not tuned, other processes took {self.busy:.0%} of the cores"
        words = {
            f"{self.attention_tokens} tokens attend at a time": self.attention_tokens,
            f"{self.widened_kib} KiB widened at a time": self.widened_kib,
            "one core": self.cores == 1,
            f"{self.cores} cores": self.cores > 1,
        }
        return ", ".join(word for word, holds in words.items() if holds) or "as by default"


class GraphKey(NamedTuple):
    """Which graph of an artifact: its kind, its bucket, and the images that a text graph sees by cross-attention.

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
    flops: Work = 0  # of one run, on whatever device
    nbytes: Work = 0  # that one run has to read or write, the whole cache included
    certificate: Certificate | None = None
    kernels: Kernels | UnsetType = UNSET  # ONNX: what `--tune` chose; left out of the manifest where it was not asked
    # Ascend: what a kernel takes before its inputs, in order: names of weights, and small tensors that are settings.
    weights: tuple[str, ...] = ()
    constants: dict[str, tuple[float, ...]] = {}
    eager: bool = False  # Ascend: run op by op, not as a compiled graph
    # Of a graph in steps. Left out of the manifest where unset, so that a graph of one file reads and is sealed as ever.
    steps: tuple[Step, ...] | UnsetType = UNSET
    buffers: tuple[TensorSpec, ...] | UnsetType = UNSET  # tensors between steps; one may hold several, one after another
    # Of a graph of one rank: how often it meets the others in a run, and the bytes that it brings to them.
    collectives: Number = 0
    collective_bytes: Work = 0

    @property
    def graph_key(self) -> GraphKey:
        """What the graph is found by; not `key`, which tells what it was made from."""
        return GraphKey(self.kind, self.bucket, self.images)

    @property
    def name(self) -> str:
        return self.graph_key.name

    @property
    def candidates(self) -> int:
        """How many of the likeliest tokens a run puts out behind the logits."""
        return next((spec.shape[1] for spec in self.outputs if spec.name == CANDIDATES[0]), 0)

    @property
    def plan(self) -> tuple[Step, ...]:
        """What is run, in order; a graph of one file is a plan of one segment."""
        whole = Segment(file=self.file, inputs=tuple(s.name for s in self.inputs), outputs=tuple(s.name for s in self.outputs))
        return self.steps or (whole,)

    @property
    def sent(self) -> tuple[TensorSpec, ...]:
        """What a run hands on to other stages."""
        specs = {spec.name: spec for spec in (*self.outputs, *(self.buffers or ()))}
        return tuple(specs[step.name] for step in self.plan if isinstance(step, Transfer) and step.op == "send")

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that the graph is in."""
        return tuple(step.file for step in self.plan if isinstance(step, Segment))


def is_cached(name: str) -> bool:
    """Whether a graph input or output is a part of the cache."""
    return name.startswith(("k_cache.", "v_cache.", "cross_k.", "cross_v."))


def rank_folder(ranks: int, rank: int) -> str:
    """Where the weight files of `rank` lie, within the artifact; `ranks` are all that the model is cut among."""
    assert 0 <= rank < ranks, (rank, ranks)
    return WEIGHTS if ranks == 1 else f"{WEIGHTS}/rank-{rank}"


def rank_weights(weights: Mapping[str, WeightSpec], ranks: int, rank: int) -> dict[str, WeightSpec]:
    """Where the weights of `rank` lie, given those of any rank of its stage, whose files are laid out alike."""
    folder = rank_folder(ranks, rank)
    return {name: msgspec.structs.replace(spec, file=f"{folder}/{PurePath(spec.file).name}") for name, spec in weights.items()}


class CrossSpec(Record, frozen=True, kw_only=True):
    """The part of the cache for cross-attention to images: per layer and image, [slots, kv_heads, rows, head_dim]."""

    layers: Number
    images: Count  # images that a sequence may hold
    rows: Count  # keys of one image
    tiles: Count  # of one image; rows are split evenly among them


class CacheSpec(Record, frozen=True, kw_only=True):
    """The KV cache: per layer, keys and values of shape [slots, kv_heads, rows, head_dim]."""

    layers: Number
    kv_heads: Count
    head_dim: Count
    slots: Count
    context: Count  # tokens that a sequence may hold
    rows: Count  # context plus room for the padding of a last chunk
    dtype: Dtype
    cross: CrossSpec | None = None
    # Of keys and values of the text, where they are kept in fewer bits than `dtype`, which is then that of images alone. Left
    # out of the manifest where unset.
    text_dtype: Literal["int8"] | UnsetType = UNSET

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * _WIDTHS[self.dtype_of(name)] for name, shape in self.buffers().items())

    def dtype_of(self, name: str) -> str:
        """What the buffer `name` is stored in."""
        return self.text_dtype or self.dtype if name.startswith(("k_cache.", "v_cache.")) else self.dtype

    def buffers(self) -> dict[str, tuple[int, ...]]:
        """Every buffer of the cache by name, with its shape."""
        text = (self.slots, self.kv_heads, self.rows, self.head_dim)
        found = {f"{which}_cache.{i}": text for i in range(self.layers) for which in "kv"}
        if cross := self.cross:
            shape = (self.slots, self.kv_heads, cross.rows, self.head_dim)
            names = ((i, which, image) for i in range(cross.layers) for which in "kv" for image in range(cross.images))
            found |= {f"cross_{which}.{i}.{image}": shape for i, which, image in names}
        return found


class WeightSpec(Record, frozen=True, kw_only=True):
    """Where one tensor lies: `nbytes` bytes from `offset` on in `file` (a safetensors file)."""

    file: str
    dtype: Dtype  # numpy name
    shape: Shape
    offset: Size
    nbytes: Size

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return _WIDTHS[self.dtype]


class FileSpec(Record, frozen=True, kw_only=True):
    """Size and digest of a file."""

    nbytes: Size
    sha256: str


class SourceFile(Record, frozen=True, kw_only=True):
    """One file of the checkpoint; `mtime_ns` only saves reading it again when nothing changed."""

    nbytes: int
    sha256: str
    mtime_ns: int


_Positive = Annotated[float, Meta(gt=0)]


class ImageProcessorConfig(Record, frozen=True, kw_only=True):
    """How an image becomes pixels, from the checkpoint's preprocessor_config.json.

    mode: crop (shortest edge, centre crop), pad (to a square, then resize), stretch (resize to the square), anyres
    (LLaVA-1.6: the image stretched to one tile, and the tiles of the best of `grids`), tiles (Llama-3.2-Vision: the tiles
    of the best of `grids`, filled up with empty ones to `tiles`).
    """

    mode: Literal["crop", "pad", "stretch", "anyres", "tiles"]
    size: Annotated[int, Meta(ge=1, le=1 << 14)]  # pixels on each side of a tile
    mean: tuple[float, float, float]
    std: tuple[_Positive, _Positive, _Positive]
    rescale: float = 1 / 255
    resample: Annotated[int, Meta(ge=0, le=5)] = 3  # PIL filter number: 2 bilinear, 3 bicubic
    rows: Count  # rows of features per tile
    mark: str = "<image>"  # what stands for an image in a prompt
    grids: tuple[tuple[Count, Count], ...] = ()  # anyres, tiles: (rows, columns) of tiles to choose from, in order
    tiles: Count = 1  # tiles: of every image, empty ones included
    alpha: Literal["white", "drop"] = "white"  # transparent parts: laid over white, or shown in their hidden colours
    newline_id: Number | None = None  # anyres: the token whose embedding ends a row of patches


class TokenizerConfig(Record, frozen=True, kw_only=True):
    """Which tokenizer files the artifact holds and how text becomes ids."""

    kind: Literal["tokenizers", "sentencepiece", "tiktoken"]
    style: Literal["hf", "original"]  # original: text is cut at the image mark, each piece tokenised afresh
    bos_token_id: Number
    add_bos: bool
    file: str = ""  # tiktoken only; the others are tokenizer.json and tokenizer.model
    pattern: str = ""  # tiktoken only: the regular expression that cuts text into words
    nfc: bool = False  # tiktoken only: text is brought into Unicode's normal form C first
    added_tokens: dict[str, Number] = {}  # sentencepiece, tiktoken: tokens that the file does not know
    legacy: bool = False  # sentencepiece only: a blank also before text that follows a special token
    image_token_id: Number | None  # None: images have no id of their own
    used: Number  # ids at or above this are never sampled


class SamplingDefaults(Record, frozen=True, kw_only=True):
    """Defaults from the checkpoint's generation_config.json, for what a request leaves open, and what it always forbids."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    # Left out of the manifest where unset, so that it reads and is sealed as ever.
    min_p: float | UnsetType = UNSET
    repetition_penalty: float | UnsetType = UNSET
    bad_words_ids: tuple[tuple[int, ...], ...] | UnsetType = UNSET  # sequences of tokens that no answer completes
    suppress_tokens: tuple[int, ...] | UnsetType = UNSET  # tokens that no answer has
    begin_suppress_tokens: tuple[int, ...] | UnsetType = UNSET  # tokens that no answer begins with


class Llama3Scaling(Record, frozen=True, kw_only=True):
    """Llama-3.1's scaling of rotary frequencies."""

    factor: _Positive
    low_freq_factor: float
    high_freq_factor: float
    original_positions: Count


class RopeParameters(Record, frozen=True, kw_only=True):
    """Rotary position embedding: the base, and what happens to it for long texts."""

    theta: _Positive
    llama3: Llama3Scaling | None = None
    ntk_positions: Count | None = None  # dynamic NTK (Qwen): prompts longer than this get a larger base
    logn_positions: Count | None = None  # logn attention (Qwen): queries behind this position are scaled up


class ModelInfo(Record, frozen=True, kw_only=True):
    """What the runtime must know about the model beyond its graphs."""

    family: str
    layout: str
    hidden_size: Count
    vocab_size: Count
    rope: RopeParameters
    eos_token_ids: Annotated[tuple[Number, ...], Meta(min_length=1)]
    stop_strings: tuple[str, ...] = ()
    image: ImageProcessorConfig
    tokenizer: TokenizerConfig
    sampling: SamplingDefaults = SamplingDefaults()
    chat: Literal["template", "chatml", "raw"] = "template"  # how a conversation becomes a prompt; the last two: Qwen-VL
    # Llama-3.2-Vision: what a token before the first image sees of the images behind it. transformers: the average of
    # all their keys; meta: nothing.
    text_before_image: Literal["transformers", "meta"] = "transformers"
    max_positions: int | UnsetType = UNSET  # the largest context that the model can be compiled for

    def can_hold(self, tokens: int) -> bool:
        """Whether a context of so many tokens can be compiled, as far as the artifact says."""
        return self.max_positions is UNSET or tokens <= self.max_positions


class CalibrationInfo(Record, frozen=True, kw_only=True):
    """What weights were quantised by, besides themselves."""

    method: str  # e.g. "GPTQ"
    sha256: str  # of the prompts and of their images
    prompts: int
    pictures: int


class BuildInfo(Record, frozen=True, kw_only=True):
    """How the artifact was made."""

    staticvl: str
    torch: str
    options: dict[str, str]  # command-line options that were given or derived; folders by the word for them
    key: str  # digest of everything that the weights and the settings were made from
    source: dict[str, SourceFile]
    # Left out of the manifest where unset, so that what was compiled without reads and is sealed as ever.
    calibration: CalibrationInfo | UnsetType = UNSET
    tuned_on: str | UnsetType = UNSET  # the machine that kernels were chosen on
    notes: tuple[str, ...] | UnsetType = UNSET  # sentences about settings of the checkpoint that are contradictory or not used


class AscendInfo(Record, frozen=True, kw_only=True):
    """What a torchair cache depends on and does not check itself."""

    python: str  # "3.11": the cache holds byte code
    torch: str
    torch_npu: str
    cache_format: str  # torchair's own number
    soc: str  # family of chips that graphs were lowered for, e.g. "Ascend910B"


class StageSpec(Record, frozen=True, kw_only=True):
    """What a stage of a pipeline has of its own; as in Manifest."""

    cache: CacheSpec
    graphs: tuple[GraphSpec, ...]
    weights: dict[str, WeightSpec]


class Manifest(Record, frozen=True, kw_only=True):
    """The whole of manifest.json. Of a pipeline, cache, graphs and weights are those of the first stage."""

    schema_version: int = SCHEMA_VERSION
    backend: Literal["onnx", "ascend"]
    quant: str
    tp: Annotated[int, Meta(ge=1, le=1 << 12)]
    model: ModelInfo
    tokenizer: str  # folder of the tokenizer files and the chat template
    cache: CacheSpec
    graphs: tuple[GraphSpec, ...]
    weights: dict[str, WeightSpec]  # of a model that is cut among ranks, those of the first; see rank_weights
    stages: tuple[StageSpec, ...] = ()  # of a pipeline: those behind the first
    files: dict[str, FileSpec]
    build: BuildInfo
    ascend: AscendInfo | None = None
    digest: str = ""

    @property
    def pp(self) -> int:
        """Stages of the pipeline; 1: there is none."""
        return 1 + len(self.stages)

    @property
    def ranks(self) -> int:
        """Processes that run the model together."""
        return self.tp * self.pp

    def of_stage(self, stage: int) -> Manifest:
        """The manifest with cache, graphs and weights of one stage; weights are those of its first rank."""
        if stage == 0:
            return self
        own = self.stages[stage - 1]
        return msgspec.structs.replace(self, cache=own.cache, graphs=own.graphs, weights=own.weights)

    def buckets(self, kind: Kind) -> tuple[int, ...]:
        """Bucket sizes of one graph kind, ascending."""
        return tuple(sorted({graph.bucket for graph in self.graphs if graph.kind == kind}))

    def recompilation(self, **changed: object) -> str:
        """The command that compiles this artifact with some options changed; bucket lists are those of the default."""
        options = {**self.build.options, **changed}
        return " ".join(
            [
                "staticvl compile CHECKPOINT --out ARTIFACT",
                *(f"--{k.replace('_', '-')} {v}".strip() for k, v in options.items()),
            ]
        )

    def graph(self, kind: Kind, bucket: int, images: int = 0) -> GraphSpec:
        """The graph of one key; raises StopIteration where there is none."""
        return next(graph for graph in self.graphs if graph.graph_key == (kind, bucket, images))


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact folder whose manifest was read and found sound. For as long as it is held, a build that replaces the artifact
    leaves its files where they are."""

    folder: Path
    manifest: Manifest
    hold: Hold = field(default_factory=lambda: Hold(None), compare=False)

    def path(self, relative: str) -> Path:
        return self.folder / relative

    def close(self) -> None:
        """Hold the files no longer."""
        self.hold.close()


class _Version(msgspec.Struct):
    schema_version: int


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, sealed with their digest."""
    sealed = msgspec.structs.replace(manifest, digest=_digest(manifest))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=1) + b"\n"


def _digest(manifest: Manifest) -> str:
    unsealed = msgspec.structs.replace(manifest, digest="")
    return hashlib.sha256(msgspec.json.encode(unsealed, order="sorted")).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, encode_manifest(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; raises ArtifactError when it is missing, damaged, unsound or of another schema version."""
    path = folder / MANIFEST
    if not path.exists():
        hint = "; it looks like a checkpoint: compile it first" if (folder / "config.json").is_file() else ""
        raise ArtifactError(f"{shown(folder)} holds no {MANIFEST}; expected a folder made by `staticvl compile`{hint}")
    try:
        data = read_regular(path, MOST_MANIFEST)
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path} has schema version {version}, this runtime reads version {SCHEMA_VERSION}; "
                "compile the checkpoint again with this release of staticvl"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        json.loads(data, object_pairs_hook=_without_doubles)
    except ArtifactError:
        raise
    except (msgspec.MsgspecError, ValueError, OSError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); compile the checkpoint again or fetch the artifact again") from error
    if manifest.digest != _digest(manifest):
        raise ArtifactError(
            f"{path} was changed after it was written (its digest differs); compile or fetch the artifact again"
        )
    if fault := next(faults(manifest), None):
        raise ArtifactError(f"{path} contradicts itself: {fault}; compile the checkpoint again or fetch the artifact again")
    return manifest


def _without_doubles(pairs: list[tuple[str, Any]]) -> None:
    """JSON leaves open which of two values of one key holds."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice in one object")


def open_artifact(folder: str | Path, rank: int | None = None) -> Artifact:
    """Read the manifest, check that every file is there with its size, and the digests of all but weights.

    Weights are checked by `verify`. `rank`, of all that the model is cut among: leave out the weights of others, which need not
    be on this machine. The files are held (see locks.py) until the result is closed or gone.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{shown(folder)} is not a folder; expected an artifact made by `staticvl compile`")
    held = hold(folder)  # before the manifest is read, so that nothing it names goes away
    try:
        manifest = read_manifest(folder)
        for name, spec in manifest.files.items():
            if rank is None or not _belongs_to_another(name, manifest.ranks, rank):
                _check_size(folder, name, spec)
                if not name.startswith(f"{WEIGHTS}/"):
                    _check_digest(folder, name, spec)
    except BaseException:
        held.close()
        raise
    return Artifact(folder, manifest, held)


def _belongs_to_another(name: str, ranks: int, rank: int) -> bool:
    return name.startswith(f"{WEIGHTS}/rank-") and not name.startswith(f"{rank_folder(ranks, rank)}/")


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def _check_size(folder: Path, name: str, spec: FileSpec) -> None:
    path = folder / name
    if leads_out(name) or not _is_inside(path, folder):
        raise ArtifactError(
            f"{path} leads out of the artifact, or to itself; expected a file in it: copy the files themselves (cp -rL), or "
            "fetch it again"
        )
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; copy the whole artifact folder or compile again") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error}); compile or fetch the artifact again") from error
    if size != spec.nbytes:
        raise ArtifactError(f"{path} has {size} bytes, expected {spec.nbytes}; compile or fetch the artifact again")


def _check_digest(folder: Path, name: str, spec: FileSpec, on_bytes: Callable[[int], object] | None = None) -> None:
    try:
        found = sha256_file(folder / name, on_bytes)
    except OSError as error:
        raise ArtifactError(f"{folder / name} cannot be read ({error}); compile or fetch the artifact again") from error
    if found != spec.sha256:
        raise ArtifactError(f"{folder / name} does not match its sha256 in the manifest; compile or fetch the artifact again")


def verify(folder: str | Path, on_bytes: Callable[[int], object] | None = None, rank: int | None = None) -> Artifact:
    """Check the digest of every file; raises ArtifactError naming the first that differs. `rank`: as of open_artifact."""
    artifact = open_artifact(folder, rank)
    try:
        for name, spec in artifact.manifest.files.items():
            if rank is None or not _belongs_to_another(name, artifact.manifest.ranks, rank):
                _check_digest(artifact.folder, name, spec, on_bytes)
    except BaseException:
        artifact.close()
        raise
    return artifact

"""A graph definition -> a torchair cache file: the graph for Ascend devices, made without one.

The definition is traced on meta tensors, so that a graph of any size costs no memory, and lowered and converted by the
real torchair (see lower_ascend.py). What comes out is what torchair itself would leave in its cache on a device: the GE
graph, and the Python code that feeds it. It refers to nothing of the compiler or the model definitions.

A kernel takes its tensors by position:

    weights     as `Emitted.weights` names them, some merged, cut, of filled up heads or in forms of their own (merging.py,
                head_pieces.py, head_padding.py and ascend_forms.py of weights/); floating-point ones in the graph's dtype but
                for scales of whole-number products and, beside bfloat16, biases of products, which are float32; quantised
                ones as `to_signed` of runtime/backends/ascend/weights.py gives them, and zero points as its `to_offsets` does
    constants   as `Emitted.constants` names them, float32
    inputs      in the order of the definition, each of its declared dtype; caches in the graph's dtype
    outputs     as `Emitted.outputs_in_place` names them: outputs that are no inputs, of the graph's dtype, written in place

and returns its first output in float32 (logits, rows of images), or nothing where every output lies in the cache. Where
candidates follow the logits it returns a tuple of them all, floats in float32.
Weights keep their addresses for as long as a kernel lives; everything else may lie elsewhere at every call.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from ..runtime.artifact import IN_FLOAT32, TensorSpec, is_cached
from ..runtime.backends.ascend import torchair_host
from ..runtime.backends.ascend.weights import to_offsets, to_signed
from ..runtime.shown import quoted
from . import ascend_graph, lower_ascend
from .ascend_graph import attention, fused
from .ascend_graph.fusions import FUSIONS, fuse_all_reduce
from .ascend_graph.head import cut_head
from .ascend_graph.head_padding import pad_heads
from .ascend_graph.merging import join_swiglu, merge_products, note_biases
from .ascend_graph.rewriting import Rewrite, traced
from .ascend_graph.stored_forms import take_stored_forms
from .graphs import GraphDef

DTYPES = ("float16", "bfloat16")
WIDE_INPUTS = ("inverse_temperature",)  # inputs that stay in float32: they are not to be rounded
# What is done to the trace of a definition before its ops are lowered, in order; stored forms are taken last.
REWRITES: tuple[Rewrite, ...] = (pad_heads, merge_products, note_biases, join_swiglu, *FUSIONS, cut_head)
NO_FILE = "<staticvl>"
ADVICE = "Parameters data address remain the same"


class EmitError(ValueError):
    """A graph that cannot be compiled for Ascend; the message says why."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """One compiled graph; see above for the order of a kernel's tensors."""

    name: str  # of the kernel
    data: bytes  # torchair's cache file (compiled_module): pickled code, so only to be loaded under a checked digest
    graph: bytes  # the GE graph, a serialised ModelDef
    weights: tuple[str, ...]
    constants: tuple[str, ...]
    outputs_in_place: tuple[str, ...]


def emit(definition: GraphDef, dtype: str, *, fused_all_reduce: bool = False) -> Emitted:
    """Trace, lower and convert one graph, computing in float16 or bfloat16.

    `fused_all_reduce`: products are summed over ranks by the operator that makes them, except for one token of each row, for
    which its documents advise against it (op-plugin, npu_mm_all_reduce_base).

    Raises EmitError for another dtype or heads that Ascend cannot attend with, and ArtifactError where torchair is missing.
    """
    if dtype not in DTYPES:
        raise EmitError(f"dtype {quoted(dtype)} cannot be compiled for Ascend; use one of {', '.join(DTYPES)}")
    _check_heads(definition)
    host = torchair_host.load()
    last = (fuse_all_reduce,) if fused_all_reduce and definition.kind != "decode" else ()
    kernel = make_kernel(definition, getattr(torch, dtype), (*REWRITES, *last, take_stored_forms))
    recorder = _Recorder([spec for spec in definition.outputs if not is_cached(spec.name)])
    # Traces of an earlier graph must not become a part of this one.
    torch._dynamo.reset()
    with (
        tempfile.TemporaryDirectory(prefix="staticvl-") as folder,
        host.running_on(recorder),
        _named(kernel),
        _without_advice(),
    ):
        compiled = host.torchair.inference.cache_compile(
            getattr(kernel.module, kernel.name),
            config=_config(host, kernel),
            dynamic=False,
            cache_dir=folder,
            custom_decompositions=decompositions(),
            ge_cache=True,  # what the device compiles can be kept, where the runtime says
        )
        compiled(*kernel.arguments)
        data = _anonymous(_only([*Path(folder).rglob("compiled_module")]), kernel, folder)
    torch._dynamo.reset()
    return Emitted(
        name=kernel.name,
        data=data,
        graph=_only(recorder.graphs),
        weights=kernel.weights,
        constants=kernel.constants,
        outputs_in_place=kernel.outputs_in_place,
    )


def _check_heads(definition: GraphDef) -> None:
    """Heads of towers are filled up in their weights; those of a cache would have to be so in the cache."""
    caches = {(spec.shape[-1], spec.dtype) for spec in (*definition.inputs, *definition.outputs) if is_cached(spec.name)}
    for width, dtype in sorted(caches):
        multiple = attention.INT8_HEAD_ALIGNMENT if dtype == "int8" else attention.HEAD_ALIGNMENT
        if width % multiple:
            raise EmitError(
                f"{definition.name}: a head of {width} elements cannot be compiled for Ascend, whose attention takes multiples "
                f"of {multiple}" + (" from a cache in 8 bits; leave out --kv-cache int8" if dtype == "int8" else "")
            )


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    return {**lower_ascend.lowerings(), **fused.lowerings()}


def kernel_name(definition: GraphDef) -> str:
    """The graph's name as an identifier, e.g. decode_4_images_2."""
    return definition.name.replace("-", "_")


def _anonymous(path: Path, kernel: Kernel, folder: str) -> bytes:
    """The cache file without what tells one compilation from another: the date, paths of this machine, chance names."""
    from torchair.inference._cache_compiler import CompiledModel  # pyright: ignore[reportMissingImports]

    model = CompiledModel.load(str(path))
    model.meta.date = ""
    model.compiled_fx.signature = ""  # the graph for human readers, with the lines of source that it came from
    model.compiled_fx.py_code = model.compiled_fx.py_code.replace(folder, "")
    code = model.compiled_fn
    names = (f"__compiled_fn_{kernel.digest}" if name.startswith("__compiled_fn") else name for name in code.co_names)
    model.compiled_fn = code.replace(co_names=tuple(names))
    model.save(str(path))
    return path.read_bytes()


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """torchair reminds at every graph that weights may not move, and resets filters of warnings: others pass."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for each in caught:
        if ADVICE not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


@contextlib.contextmanager
def _named(kernel: Kernel) -> Iterator[None]:
    """torchair numbers the graphs of a process; this one is named after what it computes, by its kernel and a digest.

    The device's compiler keeps its result under the graph's name, so that name may depend on nothing else. And so the same
    definition gives the same graph to the byte.
    """
    compiler: Any = sys.modules["torchair.npu_fx_compiler"]
    before = compiler._next_unique_graph_id
    compiler._next_unique_graph_id = lambda: f"{kernel.name}_{kernel.digest}"
    try:
        yield
    finally:
        compiler._next_unique_graph_id = before


def _only(graphs: Sequence[Any]) -> Any:
    assert len(graphs) == 1, f"torchair made {len(graphs)} graphs of one definition"
    return graphs[0]


def _config(host: torchair_host.TorchairHost, kernel: Kernel) -> Any:
    config = host.torchair.CompilerConfig()
    # Weights stay where they are, so the device may lay them out once when it loads the graph.
    config.experimental_config.frozen_parameter = True
    # Sizes that depend on lengths (attention's work split) are computed on the device, without a halt for the host.
    config.experimental_config.tiling_schedule_optimize = True
    # Nodes run in the order in which they were traced: the same memory plan and the same timing in every compilation.
    config.experimental_config.topology_sorting_strategy = "StableRDFS"
    # As torchair does where it sees a device: the transposes of quantised weights have to stay as they are.
    weights = kernel.arguments[: len(kernel.weights)]
    config.experimental_config.enable_view_optimize = all(each.is_floating_point() for each in weights)
    config.post_grad_custom_pre_pass = _share
    return config


def _share(graph_module: fx.GraphModule, _inputs: Any, _config: Any) -> None:
    """Compute once what every layer computes alike: the causal mask, the lengths, tables in another dtype."""
    from torch._functorch.compile_utils import fx_graph_cse

    graph_module.graph = fx_graph_cse(graph_module.graph)
    graph_module.recompile()


# ---- the traced method


@dataclass(frozen=True, slots=True)
class Kernel:
    """A module with one method of the kernel's name, and tensors without data to trace it with."""

    name: str
    module: _Traced
    arguments: tuple[Tensor, ...]
    weights: tuple[str, ...]
    constants: tuple[str, ...]
    outputs_in_place: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of everything that the graph is made of: its definition, shapes, dtypes, and how they are lowered."""
        tensors = [(tuple(each.shape), str(each.dtype)) for each in self.arguments]
        text = f"{self.module.graph.code}{self.module.operands}{self.module.written}{tensors}{_lowering()}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _lowering() -> str:
    """What turns a definition into a graph: our sources and torchair's version."""
    files = [Path(__file__), Path(lower_ascend.__file__), *sorted(Path(ascend_graph.__path__[0]).glob("*.py"))]
    sources = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(sources).hexdigest() + torchair_host.VERSION


def make_kernel(definition: GraphDef, dtype: torch.dtype, rewrites: tuple[Rewrite, ...]) -> Kernel:
    """What is traced for one graph: its definition after `rewrites`, between the tensors of a kernel, in their order."""
    graph = traced(definition, rewrites)
    parameters = graph.names
    weights = tuple(name for name in parameters if name not in definition.constants)
    constants = tuple(name for name in parameters if name in definition.constants)
    declared = {spec.name for spec in definition.inputs}
    in_place = tuple(
        spec for spec in definition.outputs if is_cached(spec.name) and spec.name.removesuffix(".out") not in declared
    )
    order = [*weights, *constants, *(spec.name for spec in (*definition.inputs, *in_place))]
    place = {name: i for i, name in enumerate(order)}
    name = kernel_name(definition)
    module = _with_method(
        name,
        graph.module,
        operands=[place[each] for each in (*parameters, *(spec.name for spec in definition.inputs))],
        written=[(i, place[s.name.removesuffix(".out")]) for i, s in enumerate(definition.outputs) if is_cached(s.name)],
        fixed=len(parameters),
        dtype=dtype,
        returns=sum(not is_cached(spec.name) for spec in definition.outputs),
        wide={place[name] for name in WIDE_INPUTS if name in place},
    )
    wide = graph.biases if dtype == torch.bfloat16 else set[str]()
    arguments = (
        *(_frozen(each, graph.tensors, torch.float32 if each in wide else dtype) for each in weights),
        *(torch.empty(graph.tensors[each].shape, device="meta") for each in constants),
        *(_like(spec, dtype) for spec in (*definition.inputs, *in_place)),
    )
    return Kernel(name, module, arguments, weights, constants, tuple(spec.name for spec in in_place))


def _frozen(name: str, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Parameter:
    """A parameter as the device takes it, one whose address never changes in torchair's eyes."""
    parameter, (stem, _, part) = parameters[name], name.rpartition(".")
    qweight = parameters.get(f"{stem}.qweight")
    if part == "zeros":
        assert qweight is not None, name
        stored = to_offsets(parameter, qweight, parameters[f"{stem}.scales"].to(dtype))
    elif name.endswith(IN_FLOAT32):
        stored = parameter.float()
    elif part == "scales" and qweight is not None and qweight.dtype == torch.int8:
        stored = parameter  # of whole-number products: float32
    else:
        stored = parameter.to(dtype) if parameter.is_floating_point() else to_signed(parameter)
    return nn.Parameter(torch.empty_like(stored), requires_grad=False)


def _like(spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    in_floats = is_cached(spec.name) and spec.dtype != "int8"
    return torch.empty(spec.shape, dtype=dtype if in_floats else getattr(torch, spec.dtype), device="meta")


class _Traced(nn.Module):
    """What the kernel's method runs while it is traced; nothing of it is in the kernel."""

    def __init__(
        self, graph: fx.GraphModule, *, operands: Sequence[int], written: Sequence[tuple[int, int]], **settings: Any
    ) -> None:
        """`operands`: which tensors the graph takes; `written`: which output goes into which tensor."""
        super().__init__()
        self.graph, self.operands, self.written = graph, tuple(operands), tuple(written)
        self.fixed: int = settings["fixed"]  # tensors that are weights and constants
        self.dtype: torch.dtype = settings["dtype"]
        self.returns: int = settings["returns"]  # outputs, from the first on
        self.wide: set[int] = settings["wide"]  # tensors that are not narrowed

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...] | Tensor | None:
        outputs = self.graph(*(self._narrow(i, tensors[i]) for i in self.operands))
        for output, target in self.written:
            tensors[target].copy_(outputs[output])
        returned = tuple(x.float() if x.is_floating_point() else x for x in outputs[: self.returns])
        return returned if self.returns > 1 else returned[0] if returned else None

    def _narrow(self, i: int, x: Tensor) -> Tensor:
        return x.to(self.dtype) if i >= self.fixed and i not in self.wide and x.dtype == torch.float32 else x


def _with_method(name: str, graph: fx.GraphModule, **settings: Any) -> _Traced:
    """A module with a method `name`: torchair names its cache after the method, and wants one of its own for each graph.

    The method's code goes into the cache file, so it says nothing of where it was compiled. torch opens the file that code
    names, where there is one: so the name is that of no file, in whatever folder a build runs.
    """
    code = _method.__code__.replace(co_name=name, co_qualname=name, co_filename=NO_FILE)
    return type("Graph", (_Traced,), {name: types.FunctionType(code, _method.__globals__, name)})(graph, **settings)


def _method(self: Any, *tensors: Any) -> Any:
    return self(*tensors)


# ---- the recorder


class _Recorder:
    """Takes the place of a device while a graph is compiled: keeps the graph, and gives outputs without data."""

    def __init__(self, outputs: Sequence[TensorSpec]) -> None:
        self.outputs = outputs
        self.graphs: list[bytes] = []

    def __call__(self, serialized: bytes) -> Any:
        self.graphs.append(serialized)
        return self._execute

    def _execute(self, _inputs: Sequence[Any], assigned: Sequence[Any]) -> list[Any]:
        returned = self._returned()
        return [next(returned) if each is None else each for each in assigned or [None] * len(self.outputs)]

    def _returned(self) -> Iterator[Tensor]:
        return (torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in self.outputs)

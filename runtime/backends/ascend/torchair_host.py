"""torchair, on a machine with an Ascend device or without one.

Where torch_npu is imported already (a machine with CANN), torchair is taken from it and graphs run on the device. Anywhere
else the real torchair is taken from an unpacked torch_npu wheel, which is never imported itself, and the parts of
the device are stand-ins: operator schemas and shape functions come from the wheel's own files, and the C++ executor is
replaced by that of `running_on`: a simulator, or a recorder while compiling.

    host = torchair_host.load()
    with host.running_on(Simulator):
        kernel(*tensors)        # a kernel of a torchair cache: loads its graph into Simulator(graph bytes), then runs it
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...artifact import ArtifactError
from . import process_groups

VERSION = "2.13.0"  # of torch_npu; it has to be that of torch
VARIABLE = "STATICVL_TORCH_NPU"
# Dtypes that torch has no name for, by the numbers that torch_npu has given them.
DTYPE_NUMBERS = {"int4": 285, "hifloat8": 290, "float8_e8m0fnu": 293, "float4_e2m1fn_x2": 296, "float4_e1m2fn_x2": 297}
SOCS = ("Ascend910B", "Ascend310P")  # families of chips; the first is the default
_EXTENSION = "torchair.core._torchair"

# (inputs, tensors that outputs are to be written into or None) -> outputs
Execute = Callable[[Sequence[Any], Sequence[Any]], list[Any]]
Executor = Callable[[bytes], Execute]  # a serialised GE ModelDef -> what runs it


def family(name: str) -> str:
    """The family of a chip by its full name, e.g. Ascend910B of Ascend910B2; the name itself where it is none of SOCS."""
    return next((each for each in SOCS if name.startswith(each)), name)


def default_folder() -> Path:
    """The folder into which `make ascend-sim` unpacks the wheel."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "staticvl" / f"torch_npu-{VERSION}"


def wheel_folder() -> Path:
    """The folder that holds torch_npu's files; raises ArtifactError, with what to do, where there is none."""
    folders = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else [default_folder(), *_installed()]
    for folder in folders:
        if (folder / "torch_npu" / "dynamo" / "torchair").is_dir():
            return folder
    raise ArtifactError(
        f"torchair is not in {folders[0]}; run `make ascend-sim`, or unpack the wheel yourself: "
        f"pip install --no-deps --target {folders[0]} torch_npu=={VERSION}"
    )


def _installed() -> list[Path]:
    spec = importlib.util.find_spec("torch_npu")
    return [Path(location).parent for location in (spec.submodule_search_locations or ())] if spec else []


class TorchairHost:
    """torchair with stand-ins for the device."""

    def __init__(self, torchair: types.ModuleType, libraries: tuple[Any, ...]) -> None:
        self.torchair = torchair
        self._libraries = libraries  # which live as long as they are referenced

    @contextlib.contextmanager
    def running_on(self, executor: Executor) -> Iterator[None]:
        """Graphs that are loaded inside run on `executor`, as long as they live."""
        before = getattr(_current, "executor", None)
        _current.executor = executor
        try:
            yield
        finally:
            _current.executor = before


_current = threading.local()
_loading = threading.Lock()


def load() -> TorchairHost:
    """The real torchair with stand-ins for the device; once per process.

    Raises ArtifactError where the wheel is missing, of another version, or where torch_npu itself is imported (the stand-ins
    and the device cannot be used in one process).
    """
    with _loading:  # ranks may be threads of one process
        return _load()


@functools.cache
def _load() -> TorchairHost:
    if "torch_npu" in sys.modules:
        raise ArtifactError(
            "torch_npu is imported in this process, so graphs run on the device and cannot be simulated; set "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 and start again"
        )
    folder = wheel_folder()
    _check_version(folder)
    schemas = _define_operators(folder)
    shapes = _register_shapes(folder)
    return TorchairHost(_import_torchair(folder), (schemas, shapes))


def _check_version(folder: Path) -> None:
    import torch

    versions = [path.stem.removeprefix("torch_npu-") for path in folder.glob("torch_npu-*.dist-info")]
    if versions and versions[0] != VERSION:
        raise ArtifactError(f"{folder} holds torch_npu {versions[0]}; expected {VERSION}")
    if torch.__version__.split("+")[0] != VERSION:
        raise ArtifactError(f"torch {torch.__version__} is installed; torch_npu {VERSION} needs torch {VERSION}")


def _define_operators(folder: Path) -> Any:
    """Every operator of the namespace npu, from the schemas that the wheel's own code generator used."""
    import torch
    import yaml

    path = folder / "torch_npu" / "csrc" / "aten" / "npu_native_functions_by_codegen.yaml"
    # The file is large and the C parser twenty times faster.
    data = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    library = torch.library.Library("npu", "DEF")
    for schema in _schemas([data[section] for section in ("custom", "symint", "quant")]):
        # Some are in two sections, some have types that torch has no name for.
        with contextlib.suppress(RuntimeError):
            library.define(schema)
    return library


def _schemas(data: Any) -> Iterator[str]:
    """Every entry `func` at any depth."""
    if isinstance(data, dict):
        if "func" in data:
            yield data["func"]
        data = list(data.values())
    if isinstance(data, list):
        for each in data:
            yield from _schemas(each)


def _register_shapes(folder: Path) -> Any:
    """The wheel's shape functions; their module imports parts of torch_npu for error texts and versions only."""
    names = {
        "torch_npu": DTYPE_NUMBERS,
        "torch_npu.utils": {},
        "torch_npu.utils._error_code": {"ErrCode": types.SimpleNamespace(), "ops_error": lambda *_: ""},
        "torch_npu.npu": {},
        "torch_npu.npu.utils": {"get_cann_version": lambda *_, **__: ""},
        "torch_npu.npu._backends": {"get_soc_version": lambda: 220},  # Ascend910B
    }
    with _modules({name: _module(name, **members) for name, members in names.items()}):
        path = folder / "torch_npu" / "op_plugin" / "meta" / "_meta_registrations.py"
        scope = {"__name__": "torch_npu_shapes"}
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    return scope


def _with_torch_npu(converter: Callable[..., Any]) -> Callable[..., Any]:
    """A converter that imports torch_npu, for names of dtypes and of the chip; otherwise torchair has to find it absent."""

    @functools.wraps(converter)
    def convert(*args: Any, **settings: Any) -> Any:
        npu = types.SimpleNamespace(get_device_name=lambda: SOCS[0])
        with _modules({"torch_npu": _module("torch_npu", npu=npu, **DTYPE_NUMBERS)}):
            return converter(*args, **settings)

    return convert


def _recording_group(converter: Callable[..., Any]) -> Callable[..., Any]:
    """A converter of an operator that names a group, and notes the group for the graph's generated code, as converters of
    collectives do: that code writes the communicator's name into every node of a noted group."""

    @functools.wraps(converter)
    def convert(x1: Any, x2: Any, hcom: str, **settings: Any) -> Any:
        from torchair.ge._ge_graph import get_default_ge_graph  # pyright: ignore[reportMissingImports]

        get_default_ge_graph().record_process_group(hcom, process_groups.ranks_of(hcom), "")
        return converter(x1, x2, hcom, **settings)

    return convert


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members, __path__=[])
    return module


@contextlib.contextmanager
def _modules(stand_ins: dict[str, types.ModuleType]) -> Iterator[None]:
    """Modules that can be imported inside the context."""
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _import_torchair(folder: Path) -> types.ModuleType:
    sys.path.insert(0, str(folder / "torch_npu" / "dynamo"))
    sys.modules[_EXTENSION] = _extension()
    # torchair sets handlers of two signals, which belong to this process's own program.
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        import torch
        import torchair  # pyright: ignore[reportMissingImports]
        import torchair._ge_concrete_graph.ge_converter.custom  # pyright: ignore[reportMissingImports]  the converters
        import torchair.inference  # pyright: ignore[reportMissingImports]
        import torchair.ops._npu_fused_infer_attention_score  # pyright: ignore[reportMissingImports]  defines the operator
    finally:
        sys.path.pop(0)
        if threading.current_thread() is threading.main_thread():
            for each, handler in handlers.items():
                signal.signal(each, handler)
    process_groups.install(sys.modules)
    product: Any = torch.ops.npu.npu_quant_matmul.default
    product._ge_converter = _with_torch_npu(product._ge_converter)
    reduced: Any = torch.ops.npu.npu_mm_all_reduce_base.default
    reduced._ge_converter = _recording_group(_with_torch_npu(reduced._ge_converter))
    return torchair


class _Graph:
    """A stand-in for torchair's C++ class of a graph, which is run by the executor of `running_on`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self, serialized: bytes, _options: Any, _placements: Any, _dtypes: Any, _executor_type: int) -> None:
        executor = getattr(_current, "executor", None)
        if executor is None:
            raise RuntimeError("a torchair graph was loaded outside TorchairHost.running_on")
        self.execute = executor(serialized)

    def set_hint_shape(self, _inputs: Any, _outputs: Any) -> None:
        """Shapes are in the graph."""

    def compile(self) -> None:
        """Nothing: there is no device to compile for."""

    def run(self, arguments: tuple[Sequence[Any], Sequence[Any], Any]) -> list[Any]:
        inputs, assigned, _stream = arguments
        return self.execute(inputs, assigned)


def _extension() -> types.ModuleType:
    """A stand-in for torchair's C++ extension."""
    module = _module(_EXTENSION, TorchNpuGraphBase=_Graph, GetSocName=lambda: SOCS[0])
    for name in ("InitializeGraphEngine", "FinalizeGraphEngine", "InitDeviceStdoutChannel", "SetDebugLogPath"):
        setattr(module, name, _nothing)
    module.__dict__["check_cann_compat"] = lambda *_, **__: ""  # everything is supported
    module.__dict__["get_registered_ir_def"] = lambda *_, **__: ("ERROR", [], [], [])  # torchair has its own definitions
    names = "BOOL UINT8 INT8 INT16 UINT16 INT32 UINT32 INT64 UINT64 BF16 FLOAT16 FLOAT32 FLOAT64 COMPLEX64 COMPLEX128"
    module.__dict__["TorchDataType"] = types.SimpleNamespace(**{name: i for i, name in enumerate(names.split())})
    return module


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a call that only matters to a device."""

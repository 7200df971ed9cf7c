"""Kernels: the torchair cache files of an artifact as functions over tensors, without a trace and without the model's
definition.

The file is a pickle with Python byte code in it, so it is opened only when its digest is the one in the sealed manifest, and by
a reader that knows three classes. torchair insists on a file that belongs to the user alone, which a copied artifact seldom is:
the checked bytes are put into such a file for the moment of reading.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...artifact import ArtifactError, AscendInfo, FileSpec, Manifest
from ...files import read_regular
from ..base import Group

Kernel = Callable[[Sequence[Any]], Any]  # tensors in the order of GraphSpec -> the first output, None where it is in place
_FILE = "compiled_module"
_GRAPH = "serialized_graph"  # the name that torchair's generated code gives it


def load_kernel(path: Path, spec: FileSpec, compile_cache: Path | None = None) -> Kernel:
    """The kernel in a cache file; its graph is loaded when it first runs. `compile_cache`: the folder for what a device
    compiles.

    Raises ArtifactError for a file that is not what the manifest says, before anything of it is interpreted.
    """
    model = _load_model(_read_checked(path, spec))
    method = model.rebase(None, {}, cache_dir=str(compile_cache) if compile_cache else None)
    return lambda tensors: method(None, *tensors)  # compiled from a method, whose object it does not use


def load_graph(path: Path, spec: FileSpec) -> bytes:
    """The GE graph in a cache file, a serialised ModelDef; of the file's code nothing is run.

    Raises ArtifactError for a file that is not what the manifest says, or that holds no graph.
    """
    tree = ast.parse(_load_model(_read_checked(path, spec)).compiled_fx.py_code)
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == [_GRAPH]:
            return ast.literal_eval(statement.value)
    raise ArtifactError(f"{path} holds no graph of torchair; compile the artifact again")


def _load_model(data: bytes) -> Any:
    from torchair.inference._cache_compiler import CompiledModel  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory(prefix="staticvl-") as folder:
        private = Path(folder) / _FILE
        with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        return CompiledModel.load(str(private))


def load_program(path: Path, spec: FileSpec, device: str, dtype: Any, group: Group | None = None) -> Kernel:
    """The kernel of an eager graph: source of torch operators, checked like a cache file, run on `device` in `dtype`.

    The collectives of a program of one rank of several are those of `group`, on whatever device; without one it raises
    ArtifactError when it runs.
    """
    import torch

    from ..ge_simulator.collectives import EagerGroup

    scope = {"group": EagerGroup(group)}
    scope |= {"torch": torch, "device": torch.device(device), "half": dtype, "inf": float("inf"), "nan": float("nan")}
    exec(compile(_read_checked(path, spec), str(path), "exec"), scope)
    program: Any = scope["forward"]

    def kernel(tensors: Sequence[Any]) -> Any:
        # Weights are stored in 16 bits, also where the arithmetic is in float32; the cache has its dtype already.
        halves = (torch.float16, torch.bfloat16)
        with torch.no_grad():
            return program(None, *(x.to(dtype) if x.dtype in halves else x for x in tensors))

    return kernel


def _read_checked(path: Path, spec: FileSpec) -> bytes:
    data = read_regular(path, spec.nbytes)
    if len(data) != spec.nbytes or hashlib.sha256(data).hexdigest() != spec.sha256:
        raise ArtifactError(f"{path} is not the file that the manifest describes; compile or fetch the artifact again")
    return data


def ascend_info(torch_npu: str, soc: str) -> AscendInfo:
    """The versions on which a cache file made in this process depends; torchair has to be importable."""
    import torch
    from torchair.inference._cache_compiler import CompiledModel  # pyright: ignore[reportMissingImports]

    return AscendInfo(
        python=".".join(platform.python_version_tuple()[:2]),
        torch=torch.__version__.split("+")[0],
        torch_npu=torch_npu,
        cache_format=CompiledModel.VERSION,
        soc=soc,
    )


def check_ascend_info(folder: Path, manifest: Manifest, local: AscendInfo) -> None:
    """Raise ArtifactError unless graphs that were compiled for the manifest's versions can be loaded in this process, whose
    versions are `local`."""
    recorded = manifest.ascend
    differing = [
        f"{name} {getattr(recorded, name)} (here {getattr(local, name)})"
        for name in local.__struct_fields__
        if getattr(recorded, name) != getattr(local, name)
    ]
    if differing:
        raise ArtifactError(
            f"{folder} was compiled for {', '.join(differing)}, and compiled graphs cannot be moved between them; compile it "
            f"again here: {manifest.recompilation()}"
        )

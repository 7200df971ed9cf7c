"""Artifacts that are wrong on purpose: copies with one graph, weight or setting changed, sound to whoever opens them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from staticvl.runtime.artifact import FileSpec, Manifest, ModelInfo, rank_weights, read_manifest, write_manifest

Model = onnx.ModelProto


def copied(artifact: Path, out: Path) -> Path:
    return shutil.copytree(artifact, out)


def with_facts(folder: Path, change: Callable[[ModelInfo], ModelInfo]) -> Path:
    manifest = read_manifest(folder)
    write_manifest(folder, msgspec.structs.replace(manifest, model=change(manifest.model)))
    return folder


def with_graphs(folder: Path, chosen: Callable[[str], bool], edit: Callable[[Model], None]) -> Path:
    """Edit the ONNX files of the graphs whose names are chosen."""
    manifest = read_manifest(folder)
    files = dict(manifest.files)
    for graph in manifest.graphs:
        if chosen(graph.name):
            for name in graph.files:
                model = onnx.load_model(str(folder / name), load_external_data=False)
                edit(model)
                data = model.SerializeToString()
                (folder / name).write_bytes(data)
                files[name] = FileSpec(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    return folder


def weight(folder: Path, name: str, rank: int = 0) -> np.ndarray:
    """A stored tensor, to be read and written in place."""
    manifest: Manifest = read_manifest(folder)
    spec = rank_weights(manifest.weights, manifest.tp, rank)[name]
    return np.memmap(folder / spec.file, spec.dtype, mode="r+", offset=spec.offset, shape=spec.shape)


def nodes(model: Model, scope: str, op: str = "") -> Iterator[onnx.NodeProto]:
    """Nodes of a module, by its path."""
    return (node for node in model.graph.node if node.name.startswith(f"{scope}/{op}"))


def insert(model: Model, before: onnx.NodeProto, *new: onnx.NodeProto) -> None:
    at = next(i for i, node in enumerate(model.graph.node) if node.name == before.name)
    for node in reversed(new):
        model.graph.node.insert(at, node)


def constant(model: Model, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def bypass(model: Model, node: onnx.NodeProto) -> None:
    """Take a node out: who read its output reads its first input."""
    source, result = node.input[0], node.output[0]
    for other in model.graph.node:
        for i, name in enumerate(other.input):
            if name == result:
                other.input[i] = source
    model.graph.node.remove(node)


def made(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"seeded/{output}", **attributes)

"""Checkpoints whose settings, headers, indexes and tokenizer files are wrong, damaged or hostile."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from staticvl.compiler.inputs import plan_only, prepare
from staticvl.compiler.plan import Options
from staticvl.compiler.progress import Progress

from .case import REPO, Attempt, Kind
from .models import EMBEDDED
from .mutate import BYTES, json_menu, shuffled

ASSETS = EMBEDDED.parent
QWEN = REPO / "tests" / "golden" / "qwen_vl_tiny" / "checkpoint"
WHOLE = (ASSETS / "tiny_llava15", ASSETS / "tiny_llava16", ASSETS / "tiny_mllama", QWEN)
Write = Callable[[random.Random, Path], None]  # changes the file of a copy, which is its own


@dataclass(frozen=True, slots=True)
class Harm:
    """One way to harm one file of one checkpoint."""

    checkpoint: Path
    file: str
    what: str
    write: Write


@dataclass(frozen=True, slots=True)
class Ground:
    copy: Path
    menu: tuple[Harm, ...]


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    own = folder / "checkpoints"
    shutil.rmtree(own, ignore_errors=True)
    checkpoints = [
        *WHOLE,
        _reshaped(own / "sharded", "safetensors", sharded=True),
        _reshaped(own / "bin", "bin", sharded=False),
    ]
    for checkpoint in checkpoints:
        _examine(checkpoint, own / "out")
    canary = own / "canary"
    menu = [harm for checkpoint in checkpoints for harm in _harms(checkpoint, canary)]
    yield Ground(own / "copy", tuple(shuffled(menu)))


def make(ground: Ground, rng: random.Random, index: int) -> Attempt:
    harm = ground.menu[index % len(ground.menu)]
    canary = ground.copy.with_name("canary")
    shutil.rmtree(ground.copy, ignore_errors=True)
    shutil.copytree(harm.checkpoint, ground.copy, copy_function=lambda source, target: Path(target).symlink_to(source))
    path = ground.copy / harm.file
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    harm.write(rng, path)

    def run() -> str:
        try:
            return _examine(ground.copy, ground.copy.with_name("out"))
        finally:
            if canary.exists():
                canary.unlink()
                raise AssertionError("a file of the checkpoint was run as a program")

    return Attempt(f"{harm.what} in {harm.file} of {harm.checkpoint.name}", run)


def _examine(checkpoint: Path, out: Path) -> str:
    """All that a compilation reads before it traces graphs, and every tensor."""
    from staticvl.weights.source import open_source
    from staticvl.weights.weight_map import match  # which import torch

    options = Options(checkpoint=checkpoint, out=out)
    plan_only(options)
    job = prepare(options, Progress())
    source = open_source(checkpoint)
    match(job.config, source.tensors)
    for name in source.tensors:
        source.read_any(name)
    return "plan"


def _reshaped(out: Path, fmt: str, *, sharded: bool) -> Path:
    """The embedded checkpoint with its weights in other files."""
    from safetensors.torch import load_file

    from ..checkpoints_files import write_weights

    shutil.copytree(EMBEDDED, out, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    write_weights(out, load_file(EMBEDDED / "model.safetensors"), fmt=fmt, sharded=sharded)
    return out


# ---- ways to harm a file


def _harms(checkpoint: Path, canary: Path) -> Iterator[Harm]:
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".md":
            continue
        harms: dict[str, Write] = {name: partial(_bytes, damage) for name, damage in BYTES.items()}
        harms |= {"missing": lambda _, file: file.unlink(), "a folder": _folder}
        if path.suffix == ".json":
            harms |= _of_json(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".safetensors":
            harms |= _of_safetensors(_header(path.read_bytes())[0])
        elif path.suffix == ".bin":
            harms |= _of_bin(canary)
        yield from (Harm(checkpoint, path.name, what, write) for what, write in harms.items())


def _bytes(damage: Callable[[random.Random, bytes], bytes], rng: random.Random, file: Path) -> None:
    file.write_bytes(damage(rng, file.read_bytes()))


def _folder(_: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def _of_json(document: Any) -> dict[str, Write]:
    def write(apply: Callable[[random.Random], str], rng: random.Random, file: Path) -> None:
        file.write_bytes(apply(rng).encode(errors="surrogatepass"))

    menu = json_menu(document, is_path=lambda value: isinstance(value, str) and value.endswith((".safetensors", ".bin")))
    return {change.what: partial(write, change.apply) for change in menu}


# ---- safetensors: 8 bytes of length, a header of JSON, the tensors


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(text: str, body: bytes) -> bytes:
    raw = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + body


def _of_safetensors(header: dict[str, Any]) -> dict[str, Write]:
    def write(apply: Callable[[random.Random], str], rng: random.Random, file: Path) -> None:
        file.write_bytes(_with_header(apply(rng), _header(file.read_bytes())[1]))

    def length(number: int, _: random.Random, file: Path) -> None:
        file.write_bytes(struct.pack("<Q", number) + file.read_bytes()[8:])

    def rewrite(change: Callable[[dict[str, Any], list[str]], object], rng: random.Random, file: Path) -> None:
        header, body = _header(file.read_bytes())
        names = [name for name in header if name != "__metadata__"]
        rng.shuffle(names)
        change(header, names)
        file.write_bytes(_with_header(json.dumps(header), body))

    found: dict[str, Write] = {f"header: {each.what}": partial(write, each.apply) for each in json_menu(header)}
    found |= {f"header of {n} bytes": partial(length, n) for n in (0, 1, 2, 7, 2**31, 2**63, 2**64 - 1)}
    return found | {what: partial(rewrite, change) for what, change in LAYOUTS.items()}


def _overlap(header: dict[str, Any], names: list[str]) -> None:
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def _shifted(header: dict[str, Any], names: list[str]) -> None:
    first, last = header[names[0]]["data_offsets"]
    header[names[0]]["data_offsets"] = [first - 2, last - 2]


def _reversed(header: dict[str, Any], names: list[str]) -> None:
    header[names[0]]["data_offsets"].reverse()


def _beyond(header: dict[str, Any], names: list[str]) -> None:
    first, last = header[names[0]]["data_offsets"]
    header[names[0]]["data_offsets"] = [first + 2**40, last + 2**40]


def _huge(header: dict[str, Any], names: list[str]) -> None:
    header[names[0]] = {"dtype": "F16", "shape": [2**31, 2**31], "data_offsets": [0, 2**63]}


def _no_size(header: dict[str, Any], names: list[str]) -> None:
    header[names[0]]["shape"] = [0, *header[names[0]]["shape"]]


def _dimensions(header: dict[str, Any], names: list[str]) -> None:
    header[names[0]]["shape"] = [1] * 1000 + header[names[0]]["shape"]


def _dtype(header: dict[str, Any], names: list[str]) -> None:
    for name, dtype in zip(names, ("F8_E4M3", "Q4", "", "F64", "BOOL", "I64"), strict=False):
        header[name]["dtype"] = dtype


def _same_names(header: dict[str, Any], names: list[str]) -> None:
    header["../" + names[0]] = header["\0"] = header.pop(names[0])


LAYOUTS: dict[str, Callable[[dict[str, Any], list[str]], object]] = {
    "two tensors in one place": _overlap, "a tensor over its neighbour": _shifted, "a tensor from its end on": _reversed,
    "a tensor beyond the file": _beyond, "a tensor of 2**63 bytes": _huge, "a side of 0": _no_size,
    "a thousand dimensions": _dimensions, "other dtypes": _dtype, "odd names": _same_names,
}  # fmt: skip


# ---- .bin: a zip with a pickle in it


@dataclass(frozen=True, slots=True)
class _Program:
    """A pickle of it calls a function when it is read."""

    function: Any
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def _of_bin(canary: Path) -> dict[str, Write]:
    import os
    import subprocess

    programs = {
        "os.system": _Program(os.system, (f"touch {canary}",)),
        "open": _Program(open, (str(canary), "w")),
        "exec": _Program(exec, (f"open({str(canary)!r}, 'w')",)),
        "subprocess.call": _Program(subprocess.call, (["touch", str(canary)],)),
        "Path.touch": _Program(Path.touch, (canary,)),
    }
    found: dict[str, Write] = {}
    for name, program in programs.items():
        found[f"a pickle that calls {name}"] = partial(_write_pickle, pickle.dumps({"a": program}))
        found[f"an old pickle that calls {name}"] = partial(_write_old, pickle.dumps({"a": program}, protocol=2))
    found["a pickle that repeats itself"] = partial(_write_pickle, b"\x80\x02" + b"]" + b"q\0h\0" * 1000 + b"a" * 999 + b".")
    return found


def _write_pickle(data: bytes, _: random.Random, file: Path) -> None:
    """In the place of the one in a .bin."""
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, content in members.items():
            new.writestr(name, data if name.endswith("data.pkl") else content)


def _write_old(data: bytes, _: random.Random, file: Path) -> None:
    file.write_bytes(data)


KIND = Kind(
    name="checkpoints",
    what="config.json, weight headers, indexes, pickles, tokenizer and processor files: every value, key and kind of damage",
    endings=("ConfigError", "WeightsError", "PlanError", "TokenizerError", "plan"),
    limit_s=20,
    count=900,
    ground=ground,
    make=make,
)

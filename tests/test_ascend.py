"""Ascend artifacts: the GE graphs of the real torchair say on the simulator what the ONNX graphs say, and nothing is taken on
trust when they are loaded."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.check import relative_error
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import ArtifactError, FileSpec, Manifest, read_manifest, write_manifest
from staticvl.runtime.backends.ascend import torchair_host
from staticvl.tools.cli import main

from .ascend import CHECKPOINTS, QUESTION, Pair, check_alike, compile_pair
from .need_torchair import skip_without_torchair
from .parity import noise_image

skip_without_torchair()

BUCKETS = Buckets(prefill=(16,), decode=(2,), context=448, slots=2)
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True, "return_logits": True}
SHAPES = Path(__file__).parent.parent / "tools" / "assets" / "shapes.png"
ROUNDING = 2e-2  # float16 keeps 11 bits
# Graphs of all families are checked operator by operator in test_lower_ascend, and Llama-3.2 in ranks in test_ascend_tp.
FAMILIES = [pytest.param(each, marks=[] if each in ("llava", "qwen_vl") else [pytest.mark.slow]) for each in CHECKPOINTS]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Compiled when first asked for."""
    return _Pairs(tmp_path_factory.mktemp("ascend"))


class _Pairs(dict[str, Pair]):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, family: str) -> Pair:
        self[family] = compile_pair(family, self.folder / family, BUCKETS)
        return self[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_simulator_says_what_onnx_says(pairs: dict[str, Pair], family: str) -> None:
    """Chunks of an image prompt, a batch of rows of different lengths, and a later turn with an image of its own."""
    onnx, ascend = pairs[family].load()
    prompts, images = [QUESTION, "Say one word."], [[noise_image((70, 50))], []]
    for expected, found in zip(*(model.generate(prompts, images, **GREEDY) for model in (onnx, ascend)), strict=True):
        check_alike(expected, found, ROUNDING)
    chats = onnx.chat(), ascend.chat()
    for text, turn_images in (("What is it?", []), ("And here?", [noise_image((40, 64), seed=3)])):
        check_alike(*(chat.send(text, turn_images, **GREEDY) for chat in chats), ROUNDING)


def test_without_rounding_the_simulator_says_it_exactly(pairs: dict[str, Pair]) -> None:
    """The embedded model's weights are of 16 bits already."""
    pair = pairs["llava"]
    expected, found = (
        model.generate(QUESTION, [noise_image((70, 50))], max_new_tokens=4, return_logits=True)
        for model in pair.load("sim:float32")
    )
    assert expected.logits is not None and found.logits is not None
    assert relative_error(found.logits, expected.logits) <= 1e-4
    with pytest.raises(ArtifactError, match="device 'sim:bfloat16' is unknown; expected sim, or sim:float32"):
        runtime.load(pair.ascend, device="sim:bfloat16")


def test_greedy_answers_leave_logits_on_the_device(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not so the answers of whoever wants to see them; both say the same."""
    onnx, ascend = pairs["llava"].load()
    vocab, copied, to_host = ascend.engine.manifest.model.vocab_size, [], torch.Tensor.cpu

    def counted(x: torch.Tensor, *args: Any) -> torch.Tensor:
        if x.shape[-1:] == (vocab,):
            copied.append(tuple(x.shape))
        return to_host(x, *args)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    for settings in ({"temperature": 0.0}, {"temperature": 0.7, "top_k": 20, "seed": 5}):
        request_settings: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, **settings}
        prompts = ["Say one word.", "What is it?"]
        found, expected = (model.generate(prompts, **request_settings) for model in (ascend, onnx))
        assert [out.token_ids for out in found] == [out.token_ids for out in expected]
        assert not copied
    logprobs = ascend.generate("Say one word.", max_new_tokens=6, ignore_eos=True, temperature=0.0, logprobs=1)
    assert logprobs.token_ids == ascend.generate("Say one word.", max_new_tokens=6, ignore_eos=True, temperature=0.0).token_ids
    assert copied == [(1, vocab)] * 6


@pytest.mark.parametrize("family", FAMILIES)
def test_certificates(pairs: dict[str, Pair], family: str) -> None:
    """The graph is right to 1e-4 where nothing rounds, and rounding is told apart and is not nothing."""
    manifest = read_manifest(pairs[family].ascend)
    assert {graph.kind for graph in manifest.graphs} == {"vision", "prefill", "decode"}
    for graph in manifest.graphs:
        assert graph.certificate is not None
        assert graph.certificate.passed
        assert graph.certificate.worst <= 1e-4
        assert graph.certificate.rounding is not None
        assert 1e-6 < graph.certificate.rounding < 0.1
    assert {spec.dtype for spec in manifest.weights.values()} == {"float16"}


def test_loading_never_traces_and_needs_no_definitions(pairs: dict[str, Pair]) -> None:
    code = (
        "import sys\n"
        "sys.modules['staticvl.compiler'] = sys.modules['staticvl.model_defs'] = None\n"
        "from staticvl import runtime\n"
        f"model = runtime.load({str(pairs['llava'].ascend)!r}, device='sim')\n"
        "import torch\n"
        "def traced(*_, **__): raise AssertionError('traced')\n"
        "torch.compile = torch.export.export = traced\n"
        "print(model.generate('Say one word.', max_new_tokens=3, ignore_eos=True).token_ids)\n"
        "from torch._dynamo.utils import counters\n"
        "assert not counters['stats'], counters\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")


def test_an_unchanged_build_traces_nothing(pairs: dict[str, Pair]) -> None:
    options = Options(
        checkpoint=CHECKPOINTS["llava"], out=pairs["llava"].ascend, buckets=BUCKETS, backend="ascend", dtype="float16"
    )
    report = build(options)
    assert not report.traced
    assert not report.converted
    assert report.manifest.ascend is not None


@pytest.fixture
def copy(pairs: dict[str, Pair], tmp_path: Path) -> Path:
    """An artifact to damage."""
    return shutil.copytree(pairs["llava"].ascend, tmp_path / "artifact")


def change(folder: Path, **fields: Any) -> None:
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), **fields))


@pytest.mark.parametrize(
    ("field", "value"), [("python", "3.9"), ("torch", "2.1.0"), ("torch_npu", "2.1.0"), ("cache_format", "0.1")]
)
def test_another_version_is_refused(copy: Path, field: str, value: str) -> None:
    ascend = read_manifest(copy).ascend
    assert ascend is not None
    here = getattr(ascend, field)
    change(copy, ascend=msgspec.structs.replace(ascend, **{field: value}))
    with pytest.raises(ArtifactError, match=rf"compiled for {field} {value} \(here {here}\).*compile it again"):
        runtime.load(copy, device="sim")


def run(folder: Path) -> None:
    runtime.load(folder, device="sim").generate("Say one word.", max_new_tokens=2)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def graph_file(manifest: Manifest) -> str:
    return next(graph.file for graph in manifest.graphs if graph.kind == "prefill")


def test_a_foreign_cache_file_is_not_unpickled(copy: Path, tmp_path: Path) -> None:
    """Neither under a digest that is not its own, nor, should somebody have forged the manifest, as what it is."""
    trap, manifest = tmp_path / "sprung", read_manifest(copy)
    file = graph_file(manifest)
    data = pickle.dumps(Bomb(trap))
    model = runtime.load(copy, device="sim")
    (copy / file).write_bytes(data + b"\0" * (manifest.files[file].nbytes - len(data)))
    with pytest.raises(ArtifactError, match="not the file that the manifest describes"):  # changed since it was loaded
        model.generate("Say one word.", max_new_tokens=2)
    with pytest.raises(ArtifactError, match="does not match its sha256 in the manifest"):
        run(copy)
    (copy / file).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    change(copy, files={**manifest.files, file: FileSpec(nbytes=len(data), sha256=digest)})
    with pytest.raises(ArtifactError, match=rf"{file} cannot be used .*Forbid.*staticvl verify") as caught:
        run(copy)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not trap.exists()


def test_one_wrong_byte_is_refused(copy: Path) -> None:
    path = copy / graph_file(read_manifest(copy))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="does not match its sha256 in the manifest"):
        run(copy)


def test_other_weights_are_refused(copy: Path) -> None:
    path = next((copy / "weights").iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="not the file that the manifest describes"):
        run(copy)


def test_a_wrong_shape_is_refused(pairs: dict[str, Pair]) -> None:
    """A feed of another shape, and weights of another one."""
    model = runtime.load(pairs["llava"].ascend, device="sim")
    backend, graph = model.engine.backend, model.engine.graphs["decode", 2, 0]
    from staticvl.runtime.backends.base import new_feed

    feed = new_feed(graph)
    with pytest.raises(ValueError, match=r"token_ids is int32 \(1, 1\); expected contiguous int32 \(2, 1\)"):
        backend.run(graph, {**feed, "token_ids": feed["token_ids"][:1]})
    backend._weight("text.norm.weight")  # type: ignore[attr-defined]
    backend.weights["text.norm.weight"] = backend.weights["text.norm.weight"][:-1]  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="expected size"):
        backend.run(graph, feed)


def test_what_is_missing_is_named(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    artifact = pairs["llava"].ascend
    with pytest.raises(ArtifactError, match="device npu needs torch_npu, which is not installed: pip install torch_npu=="):
        runtime.load(artifact, device="npu")
    with pytest.raises(ArtifactError, match="use device npu or sim, or compile it with --backend onnx"):
        runtime.load(artifact, device="cpu")
    monkeypatch.setenv(torchair_host.VARIABLE, str(tmp_path))
    with pytest.raises(ArtifactError, match=r"torchair is not in .*; run `make ascend-sim`"):
        torchair_host.wheel_folder()


def test_which_part_of_a_card_is_missing(pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CANN: torch_npu does not find its libraries. Cards: it finds fewer than were asked for. Chip: of another family."""
    artifact = pairs["llava"].ascend
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArtifactError, match=r"libhccl.so.*CANN is missing; install the CANN toolkit"):
        runtime.load(artifact, device="npu")
    npu = SimpleNamespace(device_count=lambda: 1, set_device=lambda _: None, get_device_name=lambda _: "Ascend310P3")
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=npu))
    with pytest.raises(ArtifactError, match=r"device is npu:1, but 1 Ascend cards are visible"):
        runtime.load(artifact, device="npu:1")
    with pytest.raises(ArtifactError, match=r"compiled for soc Ascend910B \(here Ascend310P\)"):
        runtime.load(artifact, device="npu")


@pytest.mark.parametrize(
    ("quant", "dtypes"),
    [
        ("w8a8", {"float16", "uint8", "int8", "float32"}),  # lm_head is stored as in w8a16
        pytest.param("w8a16", {"float16", "uint8"}, marks=pytest.mark.slow),
        # Layers are packed along their out features, eight numbers in an int32; lm_head has 8 bits.
        pytest.param("w4a16", {"float16", "uint8", "int32"}, marks=pytest.mark.slow),
    ],
)
def test_quantised_weights(pairs: dict[str, Pair], tmp_path: Path, quant: str, dtypes: set[str]) -> None:
    """The certificate is as strict as for others, and answers are those of the float model."""
    out = tmp_path / "artifact"
    buckets = Buckets(prefill=(16,), decode=(1,), context=448, slots=1)
    build(Options(checkpoint=CHECKPOINTS["llava"], out=out, buckets=buckets, backend="ascend", quant=quant))
    manifest = read_manifest(out)
    assert {spec.dtype for spec in manifest.weights.values()} == dtypes
    command = f"staticvl compile CHECKPOINT --out ARTIFACT --quant {quant} --context 900 --slots 1 --kv slots --backend ascend"
    assert manifest.recompilation(context=900) == command
    assert all(graph.certificate and graph.certificate.worst <= 1e-4 for graph in manifest.graphs)
    expected = runtime.load(pairs["llava"].onnx).generate(QUESTION, [SHAPES], max_new_tokens=24, temperature=0.0)
    found = runtime.load(out, device="sim").generate(QUESTION, [SHAPES], max_new_tokens=24, temperature=0.0)
    assert found.text == expected.text


@pytest.mark.slow
def test_eager_graphs_answer_alike(pairs: dict[str, Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("vision", "prefill", "decode")
    eager = compile_pair("llava", tmp_path, BUCKETS, eager=kinds).ascend
    manifest = read_manifest(eager)
    assert all(graph.eager and graph.file.endswith(".py") for graph in manifest.graphs)
    main(["show", str(eager)])
    shown = capsys.readouterr().out
    assert shown.count("(eager)") == len(kinds)
    assert f"Ascend910B, torch_npu {torchair_host.VERSION}, Python 3." in " ".join(shown.split())
    expected = runtime.load(pairs["llava"].onnx).generate(QUESTION, [noise_image((70, 50))], **GREEDY)
    check_alike(expected, runtime.load(eager, device="sim").generate(QUESTION, [noise_image((70, 50))], **GREEDY), ROUNDING)

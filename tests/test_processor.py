"""The Processor alone: prompts and texts of an artifact without its graphs."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import open_artifact
from staticvl.runtime.processor.processor import Processor
from staticvl.runtime.processor.prompt import IMAGE, Message, Prompt, PromptError

from .comparisons import CHECKPOINTS
from .conftest import REPO

BUCKETS = {
    "llava": Buckets(prefill=(64,), decode=(1,), vision=(1,), context=256, slots=1),
    "llava_next": Buckets(prefill=(64,), decode=(1,), vision=(1,), context=512, slots=1),
    "mllama": Buckets(prefill=(64,), decode=(1,), images=(3,), context=256, slots=1),
    "qwen_vl": Buckets(prefill=(64,), decode=(1,), vision=(1,), context=256, slots=1),
}
README = REPO / "README.md"
CONVERSATION = [
    Message("user", ("What is in ", IMAGE, " and in ", IMAGE, "?")),
    Message("assistant", "A red circle [0.1, 0.2, 0.3, 0.4]."),
    Message("user", (IMAGE, "And here?")),
]
BOXES = "A bus [0.25, 0.25, 0.5, 0.5] <ref>bus</ref><box>(250,250),(500,500)</box>"


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS))
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "artifact"
    build(Options(checkpoint=CHECKPOINTS[request.param], out=out, buckets=BUCKETS[request.param]))
    return out


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = ((40, 30), (20, 70), (56, 56))
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in shapes]


def same(one: Any, other: Any) -> bool:
    """Whether two prompts, or two of their fields, are equal to the last number."""
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)
        )
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


def prompts_of(model: runtime.Model) -> Iterator[Prompt]:
    """The prompts that a model's engine is given."""
    make, prompts = model.engine.new_sequence, []

    def new_sequence(prompt: Prompt, *args: Any, **settings: Any) -> Any:
        prompts.append(prompt)
        return make(prompt, *args, **settings)

    model.engine.new_sequence = new_sequence  # type: ignore[method-assign]
    model.generate("What is this?", images()[0], max_new_tokens=1)
    model.generate("Hello!", raw=True, max_new_tokens=1)
    chat = model.chat()
    chat.messages, chat.images = list(CONVERSATION[:2]), list(images()[:2])
    chat.send(CONVERSATION[2], images()[2], max_new_tokens=1)
    yield from prompts


def test_prompts_equal_those_of_the_model(artifact: Path) -> None:
    processor = Processor.open(artifact)
    with runtime.load(artifact, threads=1) as model:
        prompts = list(prompts_of(model))
    expected = [
        processor.prompt("What is this?", images()[0]),
        processor.raw_prompt("Hello!"),
        processor.prompt(CONVERSATION, images()),
    ]
    assert all(map(same, prompts, expected)) and len(prompts) == 3
    assert not same(prompts[0], prompts[2])


def test_an_open_artifact_and_its_folder_give_one_processor(artifact: Path) -> None:
    with closing(open_artifact(artifact)) as opened:
        one, other = Processor.of(opened, system_in_user=True), Processor.open(str(artifact))
        folder = artifact / opened.manifest.tokenizer
        third = Processor.read(opened.manifest.model, folder)
    assert one.info == other.info == third.info
    assert one.template == other.template == third.template and one.template
    assert (one.system_in_user, other.system_in_user, third.system_in_user) == (True, False, False)
    assert same(one.prompt(CONVERSATION, images()), third.prompt(CONVERSATION, images()))


def test_an_artifact_can_go_once_its_processor_is_there(embedded_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(embedded_artifact, tmp_path / "copy")
    processor = Processor.open(copy)
    shutil.rmtree(copy)
    assert same(processor.prompt("What?", images()[0]), Processor.open(embedded_artifact).prompt("What?", images()[0]))


def test_answers_are_read(artifact: Path) -> None:
    """Tokens become text, at once or one by one; boxes are those that the family writes."""
    processor = Processor.open(artifact)
    ids = processor.tokenizer.encode("A red circle on the left.", add_bos=False)
    text = processor.detokenizer(streamed=True)
    for token in ids:
        text.add(token)
    text.finish()
    assert text.text == processor.decode(ids).strip() and "circle" in text.text
    cut = processor.detokenizer(("circle",))
    for token in ids:
        cut.add_unread(token)
    assert cut.stopped and cut.text == text.text.partition("circle")[0].rstrip()
    assert b"".join(processor.token_bytes.tokens[token] for token in ids).decode().strip() == text.text
    frames = processor.prompt("What?", images()[:2]).frames
    (box,) = processor.boxes(BOXES, frames)
    assert box.normalised == (0.25, 0.25, 0.5, 0.5)
    assert (box.label, box.image) == (("bus", 1) if processor.info.family == "qwen_vl" else (None, 0))
    assert processor.boxes(BOXES, ()) == ()


def test_a_turn(embedded_artifact: Path) -> None:
    processor = Processor.open(embedded_artifact)
    assert processor.turn("What?", 2) == Message("user", (IMAGE, IMAGE, "What?"))
    assert [part == IMAGE for part in processor.turn("A <image> b", 1).parts] == [False, False, False]
    assert processor.turn("A <image> b", 1).images == 1
    assert processor.turn(CONVERSATION[0], 2) is CONVERSATION[0]
    with pytest.raises(PromptError, match="1 <image> mark but 2 images"):
        processor.turn("A <image> b", 2)
    ended = processor.prompt(CONVERSATION[:2], images()[:2], add_generation_prompt=False)
    assert processor.prompt(CONVERSATION[:2], images()[:2]).length > ended.length


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (5, "a prompt is int; expected text, a Message or a list of Messages"),
        (["Hello!"], "a message of a conversation is str; expected a Message"),
        (CONVERSATION, "the messages have 3 image parts but 0 images were given"),
    ],
)
def test_what_is_no_conversation(messages: Any, error: str, embedded_artifact: Path) -> None:
    processor = Processor.open(embedded_artifact)
    with pytest.raises(PromptError, match=error):
        processor.prompt(messages)
    with pytest.raises(PromptError, match="a prompt is list; expected text"):
        processor.raw_prompt(["Hello!"])  # type: ignore[arg-type]


def test_the_example_of_the_readme_runs_without_a_device(embedded_artifact: Path, tmp_path: Path) -> None:
    """Neither onnxruntime nor torch is loaded."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "Processor" in block)
    images()[0].save(tmp_path / "cat.jpg")
    code = example.replace("llava-7b", str(embedded_artifact)) + (
        "import sys\n"
        "heavy = {'onnxruntime', 'torch', 'transformers', 'onnx', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+ \d+ \S", done.stdout) and "Box(" in done.stdout

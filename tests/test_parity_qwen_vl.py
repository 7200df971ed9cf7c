"""Compiled Qwen-VL against recorded outputs of its published code: vision features, logits and greedy tokens.

The records are in golden/qwen_vl_tiny. Of every case they hold the prefill's logits and those after 16 greedy tokens that
were fed one by one.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.engine.request import SamplingParams

from .parity import TOLERANCE, Answer, Case, as_answer, check, image_files, noise_image, opened, ours, relative_error

GOLDEN = Path(__file__).parent / "golden" / "qwen_vl_tiny"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
TRAINED = 64  # seq_length: longer prompts get another rotary base, queries after it are scaled
GREEDY = 16
BUCKETS = Buckets(prefill=(16, 96), decode=(1, 4), vision=(1, 2), context=160, slots=4)


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What the published code gave for one case."""

    question: str  # chat: the user's text without its image line; else the whole prompt
    images: list[Path]
    token_ids: np.ndarray  # int64 [L]
    spans: list[tuple[int, int]]  # positions of <img> and </img>
    features: np.ndarray | None  # float32 [images, rows, C]
    answer: Answer
    alpha: float
    chat: bool

    @classmethod
    def read(cls, name: str) -> Record:
        meta, arrays = CASES[name], load_file(GOLDEN / "cases" / f"{name}.safetensors")
        # Row i of decode_logits is after greedy token i, so the last row belongs to a token that was not kept.
        logits = np.concatenate((arrays["prefill_logits"][0, -1:], arrays["decode_logits"][:-1]))
        chat = meta["kind"] == "chat"
        return cls(
            question=meta["text"].partition("\n")[2] if chat else meta["text"],
            images=[GOLDEN / "images" / image for image in meta["images"]],
            token_ids=arrays["input_ids"][0],
            spans=[(start, end) for start, end in meta.get("image_spans", [])],
            features=arrays.get("vision_features"),
            answer=Answer(arrays["greedy_ids"].tolist(), logits),
            alpha=meta["ntk_alpha"],
            chat=chat,
        )

    def ask(self, model: runtime.Model) -> runtime.Output:
        return model.generate(
            self.question, self.images, raw=not self.chat, max_new_tokens=GREEDY, temperature=0.0, ignore_eos=True,
            return_logits=True,
        )  # fmt: skip

    def prompt(self, model: runtime.Model):
        make = model.processor.prompt if self.chat else model.processor.raw_prompt
        return make(self.question, list(self.images))


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    return compiled(tmp_path_factory.mktemp("qwen") / "artifact", BUCKETS)


def compiled(out: Path, buckets: Buckets) -> runtime.Model:
    build(Options(checkpoint=GOLDEN / "checkpoint", out=out, buckets=buckets))
    return runtime.load(out)


# --- As recorded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_prompts_equal_the_published_code(golden: runtime.Model, name: str) -> None:
    """Ids but for those inside of <img>...</img>, which the network never sees; alpha; and where the features stand."""
    record = Record.read(name)
    prompt = record.prompt(golden)
    inside = np.zeros(len(record.token_ids), dtype=bool)
    for start, end in record.spans:
        inside[start + 1 : end] = True
    assert prompt.token_ids[~inside].tolist() == record.token_ids[~inside].tolist()
    assert (prompt.rows >= 0).tolist() == inside.tolist()
    assert prompt.ntk == record.alpha


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["images"]])
def test_vision_features_equal_the_published_code(golden: runtime.Model, name: str) -> None:
    record = Record.read(name)
    sequence = golden.engine.add_request(record.prompt(golden), SamplingParams(max_new_tokens=1))
    while sequence.encoding:
        golden.engine.step()
    assert record.features is not None
    found = sequence.features.reshape(record.features.shape).copy()
    golden.engine.cancel(sequence)
    error = float(np.abs(found - record.features).max())
    assert error <= 1e-5, f"{name}: features differ by {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_answers_equal_the_published_code(golden: runtime.Model, name: str) -> None:
    record = Record.read(name)
    out = record.ask(golden)
    check(out, record.answer, name)
    error = float(np.abs(out.logits - record.answer.logits).max())
    assert error <= 5e-5, f"{name}: logits differ by {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_prefill_equals_the_published_code_at_every_position(golden: runtime.Model, name: str) -> None:
    """Prompts cut off after every token of the text; alpha stays that of the whole prompt, as in the record."""
    record = Record.read(name)
    expected = load_file(GOLDEN / "cases" / f"{name}.safetensors")["prefill_logits"][0]  # [L, V]
    prompt, params = record.prompt(golden), SamplingParams(max_new_tokens=1, temperature=0.0)
    for length in range(1 + max((end for _, end in record.spans), default=0), prompt.length + 1):
        cut = dataclasses.replace(
            prompt, token_ids=prompt.token_ids[:length], rows=prompt.rows[:length], state=prompt.state[:length]
        )
        out = golden.run([golden.engine.new_sequence(cut, params, return_logits=True)])[0]
        error = relative_error(out.logits, expected[length - 1 : length])
        assert error <= TOLERANCE, f"{name}: logits at position {length - 1} differ by {error:.1e} of their largest magnitude"


@pytest.mark.parametrize(
    "prefill",
    [
        (86,),  # one chunk without padding
        (128,),  # padded far after seq_length: alpha must not see it
        (7,),
        (5, 33),
        pytest.param((1,), marks=pytest.mark.slow),
        pytest.param((64,), marks=pytest.mark.slow),
        pytest.param((63, 65), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_buckets_do_not_matter(tmp_path: Path, prefill: tuple[int, ...]) -> None:
    """Every case in one chunk and in many, each of which takes alpha from the length of the whole prompt."""
    model = compiled(tmp_path / "artifact", Buckets(prefill=prefill, decode=(1,), context=130, slots=1))
    for name in CASES:
        record = Record.read(name)
        check(record.ask(model), record.answer, f"{name} in chunks of {prefill}")


def test_a_batch_equals_the_published_code(golden: runtime.Model) -> None:
    """All cases decode together, each with the rotary base of its own prompt."""
    records = [Record.read(name) for name in CASES]
    params = SamplingParams(max_new_tokens=GREEDY, temperature=0.0, ignore_eos=True)
    prompts = [record.prompt(golden) for record in records]
    assert len({prompt.ntk for prompt in prompts}) == 2
    sequences = [golden.engine.new_sequence(prompt, params, return_logits=True) for prompt in prompts]
    for name, record, out in zip(CASES, records, golden.run(sequences), strict=True):
        check(out, record.answer, name)


def test_a_request_inherits_nothing(golden: runtime.Model) -> None:
    """A long prompt, whose base is another, then a short one in the same slot."""
    for name in ("long_one_image_ntk", "text_only", "long_one_image_ntk", "base_one_image"):
        record = Record.read(name)
        check(record.ask(golden), record.answer, name)


# --- Where seq_length ends ---------------------------------------------------------------------------------------------


def naive_logits(weights: dict[str, np.ndarray], ids: list[int], prompt_length: int) -> np.ndarray:
    """The language model written out from its description, without a cache: text ids [L] -> logits [L, V], float64."""
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    heads, dim, eps = config["num_attention_heads"], config["kv_channels"], config["layer_norm_epsilon"]
    length = len(ids)
    alpha = max(2 ** np.ceil(np.log2(prompt_length / TRAINED) + 1) - 1, 1)
    base = config["rotary_emb_base"] * alpha ** (dim / (dim - 2))
    angles = np.outer(np.arange(length), base ** (-np.arange(0, dim, 2) / dim))
    cos, sin = (np.tile(table, 2)[:, None] for table in (np.cos(angles), np.sin(angles)))
    logn = np.array([np.log(p) / np.log(TRAINED) if p > TRAINED else 1 for p in range(1, length + 1)])
    blocked = np.triu(np.full((length, length), -np.inf), 1)

    def w(name: str) -> np.ndarray:
        return weights[name].astype(np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w(f"{name}.weight")

    def rotate(x: np.ndarray) -> np.ndarray:  # [L, heads, dim]
        first, second = np.split(x, 2, axis=-1)
        return x * cos + np.concatenate((-second, first), -1) * sin

    x = w("transformer.wte.weight")[ids]
    for layer in range(config["num_hidden_layers"]):
        h = f"transformer.h.{layer}"
        qkv = norm(x, f"{h}.ln_1") @ w(f"{h}.attn.c_attn.weight").T + w(f"{h}.attn.c_attn.bias")
        q, k, v = (part.reshape(length, heads, dim) for part in np.split(qkv, 3, axis=-1))
        scores = np.einsum("qhd,khd->hqk", rotate(q) * logn[:, None, None], rotate(k)) / np.sqrt(dim) + blocked
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", share, v).reshape(length, -1) @ w(f"{h}.attn.c_proj.weight").T
        y = norm(x, f"{h}.ln_2")
        gate = y @ w(f"{h}.mlp.w2.weight").T
        x = x + (y @ w(f"{h}.mlp.w1.weight").T * gate / (1 + np.exp(-gate))) @ w(f"{h}.mlp.c_proj.weight").T
    return norm(x, "transformer.ln_f") @ w("lm_head.weight").T


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129])
def test_text_of_any_length_equals_a_naive_model(golden: runtime.Model, length: int) -> None:
    """Around one and two times seq_length, where alpha changes; the answer then runs on after it."""
    weights = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    text = _text_of(golden, length)
    out = ours(golden, Case(text, []), new_tokens=GREEDY)
    ids = golden.processor.raw_prompt(text).token_ids.tolist()
    assert len(ids) == length
    expected = naive_logits(weights, [*ids, *out.token_ids[:-1]], length)[length - 1 :].astype(np.float32)
    check(out, Answer(expected.argmax(-1).tolist(), expected), f"{length} tokens")


def _text_of(model: runtime.Model, length: int) -> str:
    """Digits, each of which is a token."""
    text = "".join(str(i * 7 % 10) for i in range(length))
    assert model.processor.raw_prompt(text).length == length
    return text


def test_the_naive_model_equals_the_published_code() -> None:
    record = Record.read("text_only")
    weights = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    whole = [*record.token_ids.tolist(), *record.answer.tokens[:-1]]
    found = naive_logits(weights, whole, len(record.token_ids))[len(record.token_ids) - 1 :]
    assert relative_error(found.astype(np.float32), record.answer.logits) <= 1e-5


# --- Several images --------------------------------------------------------------------------------------------------


def test_images_fill_their_marks_in_order(golden: runtime.Model) -> None:
    """Two images through vision buckets of one and two; exchanged, the answer is another."""
    first, second = noise_image((97, 61), 1), noise_image((30, 200), 2)
    text = "Picture 1: <img>a</img>\nPicture 2: <img>b</img>\nboth"
    found = as_answer(ours(golden, Case(text, [first, second]), new_tokens=8))
    together = golden.generate(
        [text, "Hello", text], [[first, second], None, [second, first]], raw=True, max_new_tokens=8, temperature=0.0,
        ignore_eos=True, return_logits=True,
    )  # fmt: skip
    check(together[0], found, "in a batch")
    assert relative_error(together[2].logits, found.logits) > 1e-2


def test_every_kind_of_file_is_dropped_to_rgb(golden: runtime.Model, tmp_path: Path) -> None:
    """As PIL's convert("RGB") does, which shows hidden colours of transparent parts; turned as transformers' loader does."""
    for name, path in image_files(tmp_path).items():
        found = golden.processor.raw_prompt("<img>x</img>", [path]).pixels
        side = golden.info.image.size
        expected = opened(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        assert (found[0] == np.asarray(expected)).all(), name

"""`runtime.load`, `Model.generate` and `runtime.generate` on the compiled embedded model."""

from __future__ import annotations

import base64
import dataclasses
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import permutations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from staticvl import runtime
from staticvl.runtime.artifact import ArtifactError, open_artifact
from staticvl.runtime.backends.open import open_backend
from staticvl.runtime.engine.engine import ContextError
from staticvl.runtime.processor.images import ImageError
from staticvl.runtime.processor.prompt import PromptError
from staticvl.runtime.processor.tokenizer import TokenizerError

from .fakes import lent, loaded_with_fake, noise

TOLERANCE = 1e-4  # of the largest magnitude
QUESTION = "What is in the picture?"
PROOF = {"max_new_tokens": 10, "ignore_eos": True, "return_logits": True}


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def model(embedded_artifact: Path) -> Iterator[runtime.Model]:
    yield from lent(embedded_artifact)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server whose every path is the image noise(1)."""

    class Images(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/1.png" else 404)
            self.end_headers()
            self.wfile.write(png(noise(1)))

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Images) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def check_same(one: runtime.Output, other: runtime.Output) -> None:
    """Equal tokens, and equal logits up to what another batch size changes."""
    assert one.token_ids == other.token_ids
    assert one.text == other.text
    assert np.abs(one.logits - other.logits).max() <= TOLERANCE * np.abs(other.logits).max()


# --- Batches -----------------------------------------------------------------------------------------------------------

MIXED = (
    (QUESTION, None),
    (QUESTION, noise(1)),
    ("Compare these, please: " * 3, [noise(2), noise(3, (20, 90))]),
    ("", [noise(4)]),
    ("Is <image> like <image>?", (noise(1), noise(2))),
    ("One word after another, " * 15, []),
)


def test_a_list_of_mixed_prompts_equals_each_alone(model: runtime.Model) -> None:
    """Six requests over four slots."""
    alone = [model.generate(prompt, images, **PROOF) for prompt, images in MIXED]
    together = model.generate([prompt for prompt, _ in MIXED], images=[images for _, images in MIXED], **PROOF)
    for pair in zip(together, alone, strict=True):
        check_same(*pair)
    assert [out.image_tokens for out in together] == [0, 64, 128, 64, 128, 0]


def test_any_order_gives_the_same(model: runtime.Model) -> None:
    alone = [model.generate(prompt, images, **PROOF) for prompt, images in MIXED[:4]]
    for order in list(permutations(range(4)))[1::5]:
        together = model.generate([MIXED[i][0] for i in order], [MIXED[i][1] for i in order], **PROOF)
        for i, out in zip(order, together, strict=True):
            check_same(out, alone[i])


def test_seeds_do_not_depend_on_the_batch(model: runtime.Model) -> None:
    settings = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 1.5, "top_k": 50, "seed": 11}
    alone = model.generate(QUESTION, noise(1), **settings)
    together = model.generate(["Hello!", QUESTION, "Where?"], [None, noise(1), None], **settings)
    assert together[1].token_ids == alone.token_ids
    assert model.generate(QUESTION, noise(1), **(settings | {"seed": 12})).token_ids != alone.token_ids


def test_sampling_as_one_object_or_by_name(model: runtime.Model) -> None:
    params = runtime.SamplingParams(max_new_tokens=7, temperature=1.5, seed=3, ignore_eos=True)
    named = model.generate(QUESTION, max_new_tokens=7, temperature=1.5, seed=3, ignore_eos=True)
    assert model.generate(QUESTION, sampling=params).token_ids == named.token_ids
    assert len(model.generate(QUESTION, sampling=params, max_new_tokens=2).token_ids) == 2


def test_unused_ids_are_never_sampled(model: runtime.Model) -> None:
    """The vocabulary has 640 rows of weights, the tokenizer 576 ids; at this temperature all are as likely."""
    used = model.info.tokenizer.used
    out = model.generate(QUESTION, max_new_tokens=300, ignore_eos=True, temperature=1e6, seed=0)
    assert used < model.info.vocab_size
    assert max(out.token_ids) < used


def test_an_empty_list(model: runtime.Model) -> None:
    assert model.generate([]) == []
    assert model.generate([], []) == []


# --- Outputs -----------------------------------------------------------------------------------------------------------


def test_logits_of_every_token(model: runtime.Model) -> None:
    out = model.generate(QUESTION, noise(1), max_new_tokens=9, ignore_eos=True, return_logits=True)
    assert out.logits.shape == (9, 640)
    assert out.logits.dtype == np.float32
    assert out.logits.argmax(axis=1).tolist() == out.token_ids
    assert model.generate(QUESTION, max_new_tokens=2).logits is None


def test_counts_and_reasons(model: runtime.Model) -> None:
    stopped = model.generate(QUESTION, max_new_tokens=40)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids[-1] == 2
    cut = model.generate(QUESTION, max_new_tokens=3)
    assert (cut.finish_reason, cut.token_ids) == ("length", stopped.token_ids[:3])
    # <s> and the template's words, then an image of 64 rows and its line break.
    text_only = model.generate(QUESTION, max_new_tokens=1)
    assert text_only.prompt_tokens == len(model.processor.tokenizer.encode(f"USER: {QUESTION} ASSISTANT:", add_bos=True))
    assert model.generate(QUESTION, noise(1), max_new_tokens=1).image_tokens == 64


def test_exactly_as_many_tokens_as_the_context_holds(model: runtime.Model) -> None:
    context = model.artifact.manifest.cache.context
    prompt_tokens = model.generate(QUESTION, noise(1), max_new_tokens=1).prompt_tokens
    out = model.generate(QUESTION, noise(1), max_new_tokens=context - prompt_tokens, ignore_eos=True)
    assert out.prompt_tokens + len(out.token_ids) == context


def test_stop_strings(model: runtime.Model) -> None:
    whole = model.generate(QUESTION, max_new_tokens=40)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 4]
    for given in (stop, [stop], ("never said", stop)):
        out = model.generate(QUESTION, max_new_tokens=40, stop=given)
        assert out.text == whole.text[: whole.text.index(stop)].rstrip()
        assert out.finish_reason == "stop"
        assert len(out.token_ids) < len(whole.token_ids)


def test_stop_strings_of_the_model(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end an answer as an end-of-sequence token does, and are ignored with it."""
    whole = model.generate(QUESTION, max_new_tokens=6, ignore_eos=True)
    stop = whole.text.split()[2]
    monkeypatch.setattr(model, "info", msgspec.structs.replace(model.info, stop_strings=(stop,)))
    assert model.generate(QUESTION, max_new_tokens=6).text == whole.text[: whole.text.index(stop)].rstrip()
    assert model.generate(QUESTION, max_new_tokens=6, ignore_eos=True).text == whole.text


def test_a_stop_string_that_the_last_token_completes(model: runtime.Model) -> None:
    whole = model.generate(QUESTION, max_new_tokens=3)
    out = model.generate(QUESTION, max_new_tokens=3, stop=whole.text[-2:])
    assert out.finish_reason == "stop"
    assert out.text == whole.text[:-2].rstrip()


def test_a_stop_string_that_only_the_end_shows(embedded_artifact: Path) -> None:
    """Bytes are held back while more may come, so a stop string of them shows when the answer ends."""
    model = loaded_with_fake(embedded_artifact)
    raw, token = next(found for n in range(1, 200) if (found := ends_in_a_byte(model, "a" * n)))
    plain = model.generate(raw, raw=True, max_new_tokens=1)
    out = model.generate(raw, raw=True, max_new_tokens=1, stop=model.processor.tokenizer.decode([token]))
    assert (plain.finish_reason, plain.token_ids, out.token_ids) == ("length", [token], [token])
    assert (out.text, out.finish_reason) == ("", "stop")
    assert "".join(model.stream(raw, raw=True, max_new_tokens=1)) == plain.text != ""


def ends_in_a_byte(model: runtime.Model, text: str) -> tuple[str, int] | None:
    """A prompt that the fake backend answers with a byte of ASCII, and that byte's token."""
    token = model.generate(text, raw=True, max_new_tokens=1).token_ids[0]
    written = model.processor.tokenizer.token(token)
    return (text, token) if written.startswith("<0x") and 0x21 <= int(written[3:5], 16) <= 0x7E else None


def test_raw_text_is_passed_as_it_is(model: runtime.Model) -> None:
    rendered = f"USER: <image>\n{QUESTION} ASSISTANT:"
    check_same(model.generate(rendered, noise(1), raw=True, **PROOF), model.generate(QUESTION, noise(1), **PROOF))
    plain = model.generate("A red", raw=True, **PROOF)
    assert plain.prompt_tokens == len(model.processor.tokenizer.encode("A red", add_bos=True))
    together = model.generate([rendered, "A red"], [noise(1), None], raw=True, **PROOF)
    check_same(together[1], plain)


def test_one_shot(embedded_artifact: Path, model: runtime.Model) -> None:
    """In a call without a loaded model."""
    out = runtime.generate(embedded_artifact, QUESTION, images=[noise(1)], **PROOF)
    check_same(out, model.generate(QUESTION, noise(1), **PROOF))
    outs = runtime.generate(str(embedded_artifact), [QUESTION, "Hello!"], max_new_tokens=3)
    assert [len(out.token_ids) for out in outs] == [3, 3]


# --- Images ----------------------------------------------------------------------------------------------------------


def test_every_way_to_give_a_image(model: runtime.Model, server: str, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(png(noise(1)))
    data = f"data:image/png;base64,{base64.b64encode(png(noise(1))).decode()}"
    ways: tuple[Any, ...] = (str(path), path, f"{server}/1.png", data, io.BytesIO(png(noise(1))), [noise(1)], (str(path),))
    expected = model.generate(QUESTION, noise(1), **PROOF)
    for way in ways:
        assert np.array_equal(model.generate(QUESTION, way, **PROOF).logits, expected.logits)
    other = model.generate(QUESTION, noise(2), **PROOF)
    assert not np.array_equal(other.logits, expected.logits)


def test_images_stand_first_and_in_order(model: runtime.Model, tmp_path: Path) -> None:
    path = tmp_path / "two.png"
    path.write_bytes(png(noise(2)))
    out = model.generate("Which?", [noise(1), path], **PROOF)
    raw = model.generate("USER: <image>\n<image>\nWhich? ASSISTANT:", [noise(1), noise(2)], raw=True, **PROOF)
    swapped = model.generate("Which?", [path, noise(1)], **PROOF)
    assert np.array_equal(out.logits, raw.logits)
    assert not np.array_equal(swapped.logits[0], out.logits[0])


# --- Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "images", "error", "message"),
    [
        ("<image> what?", [noise(1), noise(2)], PromptError, "1 <image> mark but 2 images were given"),
        ("<image><image>", noise(1), PromptError, "2 <image> marks but 1 image was given"),
        (["a", "b"], [noise(1)], PromptError, "2 prompts were given but images has 1;"),
        (["a", "b"], noise(1), PromptError, "2 prompts were given but images has one entry that is no list;"),
        (["a", "b"], [noise(1), [noise(2), 3]], ImageError, "an image was given as int"),
        (["a", 5], None, PromptError, "a prompt is int; expected text"),
        (None, None, PromptError, "prompts is NoneType; expected a text or a list of texts"),
        (b"a", None, PromptError, "prompts is bytes; expected a text or a list of texts"),
        ({"a": 1}, None, PromptError, "prompts is dict; expected a text or a list of texts"),
        ("a", "none.png", ImageError, "none.png does not exist"),
        ("a", 3, ImageError, "an image was given as int"),
        ("a", [[noise(1)]], ImageError, "an image was given as list"),
        ("a", np.zeros((4, 4, 3), np.uint8), ImageError, "an image was given as ndarray"),
        ("\ud800", None, TokenizerError, "not valid Unicode"),
        ("a " * 600, None, ContextError, "but the artifact holds 512"),
        (["a", "a " * 600], None, ContextError, "0 image tokens, and max_new_tokens is 128"),
    ],
)
def test_unusable_input(model: runtime.Model, prompts: Any, images: Any, error: type[Exception], message: str) -> None:
    """Nothing runs, also not the prompts of a list that are fine."""
    before = dict(model.engine.metrics.runs)
    with pytest.raises(error) as raised:
        model.generate(prompts, images)
    assert message in str(raised.value)
    assert model.engine.metrics.runs == before


def test_a_image_that_a_server_does_not_have(model: runtime.Model, server: str) -> None:
    with pytest.raises(ImageError, match="HTTP status 404"):
        model.generate(QUESTION, f"{server}/2.png")


def test_an_empty_raw_prompt(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With BOS it is a prompt of one token; without, there is nothing to run."""
    assert model.generate("", raw=True, max_new_tokens=1).prompt_tokens == 1
    tokenizer = model.processor.tokenizer
    config = type(tokenizer.config)(kind="tokenizers", style="hf", bos_token_id=1, add_bos=False, image_token_id=574, used=576)
    without_bos = dataclasses.replace(model.processor, tokenizer=type(tokenizer)(config, tokenizer.vocabulary))
    monkeypatch.setattr(model, "processor", without_bos)
    with pytest.raises(PromptError, match="the prompt is empty; expected some text or an image"):
        model.generate("", raw=True)


def test_unknown_settings(model: runtime.Model) -> None:
    with pytest.raises(TypeError, match="unknown settings beams, typical_p; expected bad_words, choice,"):
        model.generate(QUESTION, beams=3, typical_p=0.1)
    with pytest.raises(ValueError, match="max_new_tokens is 0; expected at least 1"):
        model.generate(QUESTION, max_new_tokens=0)


def test_a_failing_device_leaves_no_request_behind(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    run, left = model.engine.backend.run, iter(range(5))

    def failing(*args: Any) -> np.ndarray:
        if next(left, None) is None:
            raise OSError("the device is gone")
        return run(*args)

    expected = model.generate(QUESTION, noise(1), **PROOF)
    with monkeypatch.context() as patch:
        patch.setattr(model.engine.backend, "run", failing)
        with pytest.raises(OSError, match="the device is gone"):
            model.generate([QUESTION] * 6, [noise(2)] * 6)
    assert model.engine.scheduler.idle
    check_same(model.generate(QUESTION, noise(1), **PROOF), expected)


@pytest.mark.parametrize(
    ("device", "remedy"), [("npu", "--backend ascend"), ("sim", "--backend ascend"), ("tpu", "use device cpu")]
)
def test_devices_that_cannot_run_it(embedded_artifact: Path, device: str, remedy: str) -> None:
    for call in (runtime.load, lambda *args, **kwargs: runtime.generate(*args, QUESTION, **kwargs)):
        with pytest.raises(ArtifactError) as raised:
            call(embedded_artifact, device=device)
        for part in (repr(device), str(embedded_artifact), "compiled for onnx", remedy):
            assert part in str(raised.value)


def test_an_artifact_for_another_backend(embedded_artifact: Path) -> None:
    cache = open_artifact(embedded_artifact).manifest.cache
    with pytest.raises(ArtifactError, match="compiled for ascend; use device npu or sim, or compile it with --backend onnx"):
        open_backend("ascend", embedded_artifact, cache, device="cpu")


def test_another_number_of_ranks(embedded_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="compiled for tp=1, not tp=2; compile it again with --tp 2 or load it with tp=1"):
        runtime.load(embedded_artifact, tp=2)
    assert runtime.load(embedded_artifact, tp=1).artifact.manifest.tp == 1

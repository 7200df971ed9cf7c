"""The long proof that Ascend graphs say what ONNX graphs say: 64 greedy tokens of every family, simulated in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from staticvl.compiler.plan import Buckets
from staticvl.runtime.artifact import read_manifest
from staticvl.tools import ascend_acceptance

from .ascend import CHECKPOINTS, GREEDY, QUESTION, Pair, answer_requests, check_alike, compile_pair, natural_end
from .need_torchair import skip_without_torchair
from .parity import noise_image

skip_without_torchair()
pytestmark = pytest.mark.slow

BUCKETS = Buckets(prefill=(8, 32), decode=(1, 4), context=512, slots=4)
ROUNDING = {"float16": 2e-2, "bfloat16": 1.5e-1}  # 11 and 8 bits
NEAR = 2e-3  # random weights: logits of 560 tokens lie so close that 11 bits may decide; they were 0.0014 apart, a tie 0.0004


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return compile_pair(request.param, tmp_path_factory.mktemp(request.param), BUCKETS)


def test_a_batch_of_four(pair: Pair) -> None:
    """Whatever a trained model is sure of, its answer up to the natural end, is the same to the token."""
    onnx, ascend = pair.load()
    stops = onnx.info.eos_token_ids
    for expected, found in zip(*map(answer_requests, (onnx, ascend)), strict=True):
        sure = natural_end(expected, stops) if pair.trained else 0
        check_alike(expected, found, ROUNDING["float16"], NEAR, sure)


def test_a_chat(pair: Pair) -> None:
    chats = [model.chat() for model in pair.load()]
    for text, images in (
        (QUESTION, [noise_image((50, 80))]),
        ("Where is it?", []),
        ("And here?", [noise_image((60, 60), seed=9)]),
    ):
        check_alike(*(chat.send(text, images, **{**GREEDY, "max_new_tokens": 24}) for chat in chats), ROUNDING["float16"])


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_bfloat16(family: str, tmp_path: Path) -> None:
    """Three bits fewer: the trained models still say the same, their logits are further apart."""
    pair = compile_pair(family, tmp_path, Buckets(prefill=(32,), decode=(1,), context=512, slots=1), "bfloat16")
    shapes = Path(__file__).parent.parent / "tools" / "assets" / "shapes.png"
    settings = {**GREEDY, "max_new_tokens": 24, "ignore_eos": False}
    check_alike(*(model.generate(QUESTION, [shapes], **settings) for model in pair.load()), ROUNDING["bfloat16"])


def test_acceptance(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """The command for owners of a card, with the simulator for a card: it agrees with itself, and a bound that nothing meets
    is an exit status."""
    arguments = [str(pair.ascend), "--device", "sim", "--json"]
    assert ascend_acceptance.main(arguments) == 0
    acceptance = json.loads(capsys.readouterr().out)
    assert len(acceptance["operators"]) > 10 and {each["status"] for each in acceptance["operators"]} == {"passed"}
    assert [each["graph"] for each in acceptance["graphs"]] == [graph.name for graph in read_manifest(pair.ascend).graphs]
    assert all(each["distance"] == 0 and each["same_choice"] == 1 for each in acceptance["graphs"])
    assert acceptance["device"]["token_ids"] == acceptance["simulator"]["token_ids"]
    assert acceptance["device"]["ttft_ms"] > acceptance["device"]["tpot_ms"] > 0
    assert ascend_acceptance.main([*arguments, "--tolerance", "-1"]) == 1

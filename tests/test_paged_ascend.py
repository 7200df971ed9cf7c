"""Artifacts for Ascend with a cache in pages, on the simulator: what runs together, is preempted, forked or shared gets the
answer that ONNX gives to it alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import ArtifactError
from staticvl.runtime.engine.fit import ContextError
from staticvl.runtime.engine.paged_cache import PagedCache

from .ascend import CHECKPOINTS, LONG, QUESTION, Pair, check_alike
from .fakes import check_blocks, check_slots
from .need_torchair import skip_without_torchair
from .parity import noise_image

skip_without_torchair()

SMALL = Buckets(prefill=(64,), decode=(2,), vision=(1,), context=384, slots=2)
LARGE = Buckets(prefill=(16, 64), decode=(1, 4, 8), vision=(1,), verify=(4,), context=512, slots=8)
PAGES = 10  # eight sequences of two or three pages do not fit
SUITE = [("llava", SMALL, 5)]
SLOW = [pytest.param((family, LARGE, PAGES), marks=pytest.mark.slow) for family in ("llava", "qwen_vl")]


class Models:
    """The same checkpoint in slots on ONNX Runtime, and in pages on the simulator, which does not round."""

    def __init__(self, pair: Pair) -> None:
        self.onnx, self.pages = runtime.load(pair.onnx), runtime.load(pair.ascend, device="sim:float32")
        assert isinstance(self.pages.engine.cache, PagedCache)
        self.cache = self.pages.engine.cache
        self.most = self.cache.spec.slots  # requests of a batch
        self.new_tokens = 64 if self.most > 2 else 12
        self.exact, self.preempting = self.onnx.info.family == "llava", False
        step, count = self.pages.engine.step, itertools.count()

        def checked() -> Any:
            running = self.pages.engine.scheduler.running
            if self.preempting and running and next(count) % 11 == 10:
                self.pages.engine.scheduler.preempt(running[-1])
            result = step()
            check_slots(self.pages.engine)
            check_blocks(self.pages.engine)
            return result

        self.pages.engine.step = checked  # type: ignore[method-assign]

    def same(self, expected: runtime.Output, found: runtime.Output) -> None:
        """LLaVA's weights are of 16 bits already. Qwen-VL's are random and rounded on one side, so that near ties may part."""
        check_alike(expected, found, *((1e-4,) if self.exact else (1e-2, 5e-3)))

    def text(self, tokens: int) -> str:
        """A text whose prompt has at least so many tokens, and few more."""
        words = LONG.split() * tokens
        count = next(n for n in range(len(words)) if self.pages.processor.prompt(" ".join(words[:n])).length >= tokens)
        return " ".join(words[:count])

    def settings(self, **more: Any) -> dict[str, Any]:
        return {"temperature": 0.0, "max_new_tokens": self.new_tokens, "ignore_eos": True, "return_logits": True, **more}

    def alike(self, texts: list[str], images: list[Any], **more: Any) -> list[runtime.Output]:
        """The answers to a batch, checked against those that ONNX gives one by one."""
        found = self.pages.generate(texts, images, **self.settings(**more))
        for text, some, each in zip(texts, images, found, strict=True):
            expected = self.onnx.generate(text, some, **self.settings(**more))
            for right, answer in zip((expected, *expected.others), (each, *each.others), strict=True):
                self.same(right, answer)
        assert self.cache.blocks.used == 0
        return found


@pytest.fixture(scope="module", params=[*SUITE, *SLOW], ids=lambda param: f"{param[0]}-{param[2]}")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    family, buckets, pages = request.param
    folder = tmp_path_factory.mktemp(family)
    pair = Pair(folder / "onnx", folder / "ascend", trained=False)
    options: dict[str, Any] = {"checkpoint": CHECKPOINTS[family], "buckets": buckets}
    build(Options(out=pair.onnx, **options))
    build(Options(out=pair.ascend, backend="ascend", dtype="float16", kv="pages", pages=pages, **options))
    return Models(pair)


def test_a_batch_that_does_not_fit(models: Models) -> None:
    """Sequences wait for pages and are preempted, for want of pages and every few steps besides."""
    image, preempted = [noise_image((70, 50))], models.pages.engine.metrics.preemptions
    models.preempting = True
    lengths = (220, 230) if models.most == 2 else (100, 240, 20, 110, 50, 120, 90, 30)
    images = [image if place % 4 == 2 else [] for place in range(len(lengths))]
    models.alike([models.text(length) for length in lengths], images, max_new_tokens=64)
    models.preempting = False
    assert models.pages.engine.metrics.preemptions > preempted + 3


def test_several_answers_share_the_pages_of_their_prompt(models: Models) -> None:
    copies = models.pages.engine.metrics.copies
    (found,) = models.alike(["Answer: " + models.text(220)], [[]], n=models.most)
    assert all(each.reused_tokens == found.prompt_tokens - 1 for each in found.others)
    assert models.pages.engine.metrics.copies >= copies + models.most - 1


def test_prompts_that_begin_alike(models: Models) -> None:
    start = "Please: " + models.text(135)
    found = models.alike([start + end for end in (QUESTION, "Hello!", "Where?", *"abcde")[: models.most]], [[]] * models.most)
    assert all(each.reused_tokens >= models.cache.page_tokens for each in found[1:])


def test_a_chat_and_its_fork(models: Models) -> None:
    """Between the turns another request runs; the next turn finds the pages nevertheless, the last one as well."""
    chats = [model.chat() for model in (models.onnx, models.pages)]
    for text, images in ((QUESTION, [noise_image((50, 80))]), (LONG, []), ("Where is it?", [])):
        expected, found = (chat.send(text, images, **models.settings()) for chat in chats)
        models.same(expected, found)
        chats[1].messages[:] = chats[0].messages  # where the two may part
        assert chats[1].slot is None and models.cache.blocks.used == 0
        models.alike(["Hello!"], [[]])
    assert found.reused_tokens > found.prompt_tokens - 80 or not models.exact
    forks = [chat.fork() for chat in chats]
    models.same(*(fork.send("And here?", **models.settings()) for fork in forks))
    models.same(*(chat.send("Thanks!", **models.settings()) for chat in chats))


def test_what_does_not_fit_says_so(models: Models) -> None:
    pages = models.cache.blocks.budget
    with pytest.raises(ArtifactError, match=rf"the artifact reserves its {pages} pages of 128 tokens when it is loaded; leave"):
        runtime.load(models.pages.artifact.folder, device="sim", cache_gb=1.0)
    context = models.cache.spec.context
    with pytest.raises(ContextError, match=f"the artifact holds {context}"):
        models.pages.generate(QUESTION, max_new_tokens=context)


@pytest.mark.slow
def test_drafts_and_draws(models: Models) -> None:
    """One token is so likely that drafts of it are right."""
    if models.most > 2:
        scheduler = models.pages.engine.scheduler
        scheduler.costs = dict.fromkeys(scheduler.costs, 1.0)  # the simulator is slow where a card is not
        models.alike([LONG * 3], [[]], speculate=3, logit_bias={7: 1000.0})
        assert models.pages.engine.metrics.accepted > 20
    if models.exact:
        models.alike([QUESTION, LONG], [[], []], temperature=0.8, seed=3, n=2)

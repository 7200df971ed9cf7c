"""The page in a real browser: a drawing is chosen, asked about, and its boxes are drawn where the model put them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from staticvl import runtime

from .conftest import REPO
from .servers import TIMEOUT_S, Running, far_model, serving, slow_down, until

SHAPES = REPO / "tools" / "assets" / "shapes.png"
CHROMIUM = os.environ.get("STATICVL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on PATH: `make chromium` installs Debian's (as root), or name any in STATICVL_CHROMIUM",
)
BOX = "Please provide the bounding box coordinate of the region this sentence describes: the red circle."


def test_the_page_and_what_it_may_do(tmp_path: Path) -> None:
    """Nothing from elsewhere is loaded, and a browser is told so."""
    with serving(far_model(tmp_path / "artifact"), keys=("k",)) as server:
        response = server.http.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.findall(r"""(?:src|href)=["']|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", response.text)
    assert not re.findall(r"\son\w+=|\sstyle=|innerHTML", response.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens pages of a server; at the end none of them has had an error, and none has asked for anything from elsewhere."""
    opened: list[Any] = []
    faults: list[str] = []

    def open_at(server: Running, **settings: Any) -> Any:
        page = browser.new_page(**settings)
        page.set_default_timeout(TIMEOUT_S * 1000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on(
            "request",
            lambda request: None if request.url.startswith((server.url, "data:", "blob:")) else faults.append(request.url),
        )
        page.goto(server.url)
        opened.append(page)
        return page

    open_at.faults = faults  # type: ignore[attr-defined]
    yield open_at
    for page in opened:
        page.close()
    assert not faults


def ask(page: Any, text: str) -> Any:
    """Send a question; its answer, once it is complete."""
    page.get_by_label("Your question").fill(text)
    page.get_by_label("Your question").press("Enter")
    page.get_by_role("button", name="Send").wait_for()
    return page.locator("li.assistant").last


@pytest.fixture(scope="module")
def tiny(embedded_artifact: Path) -> Iterator[Running]:
    with runtime.load(embedded_artifact, threads=1) as model, serving(model) as running:
        yield running


@needs_chromium
@pytest.mark.parametrize("size", [(1100, 800), (360, 640)], ids=["desk", "phone"])
def test_a_conversation_about_a_drawing(tiny: Running, open_page: Any, size: tuple[int, int]) -> None:
    page = open_page(tiny, viewport={"width": size[0], "height": size[1]})
    page.get_by_text("model, 512 tokens").wait_for()
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Maximum tokens").fill("60")
    page.get_by_label("Add images").set_input_files(SHAPES)
    page.get_by_alt_text("Image 1 to be sent").wait_for()
    with runtime.load(tiny.model.artifact.folder, threads=1) as model, model.chat() as chat:
        wanted = [
            chat.send(text, [SHAPES] * (text == BOX), temperature=0, max_new_tokens=60) for text in (BOX, "What colour is it?")
        ]
    answer = ask(page, BOX)
    assert answer.locator("p").first.inner_text() == wanted[0].text
    [box] = wanted[0].boxes
    x1, y1, x2, y2 = box.pixels
    drawn = answer.locator("svg polygon")
    drawn.wait_for(state="attached")
    assert drawn.get_attribute("points") == f"{x1},{y1} {x2},{y1} {x2},{y2} {x1},{y2}"
    assert on_image(answer, box.pixels)
    assert page.get_by_alt_text("Image 1 to be sent").count() == 0
    answer = ask(page, "What colour is it?")
    assert answer.locator("p").first.inner_text() == wanted[1].text
    assert "cached" in answer.locator(".note").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing hangs over the edge
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#turns li").count() == 0


def on_image(answer: Any, pixels: tuple[int, int, int, int]) -> bool:
    """Whether a box lies on the screen where its pixels of the image are, within two pixels of the screen."""
    image, box = answer.locator("img").bounding_box(), answer.locator("svg polygon").bounding_box()
    scale = image["width"] / answer.locator("img").evaluate("image => image.naturalWidth")
    middle = [image["x"] + scale * (pixels[0] + pixels[2]) / 2, image["y"] + scale * (pixels[1] + pixels[3]) / 2]
    return abs(box["x"] + box["width"] / 2 - middle[0]) < 2 and abs(box["y"] + box["height"] / 2 - middle[1]) < 2


@needs_chromium
def test_stopping_dropping_and_errors(tmp_path: Path, open_page: Any) -> None:
    """A stopped answer frees its slot and the conversation goes on; a refused key is shown, and the question is kept."""
    model = far_model(tmp_path / "artifact")
    slow_down(model)
    model.engine.next_token.eos = frozenset()  # no answer ends by itself, however slowly the browser clicks
    with serving(model, keys=("secret",)) as server:
        page = open_page(server)
        page.get_by_text("no valid API key was sent").wait_for()
        answer = ask(page, "Hello!")
        assert "no valid API key" in answer.locator(".wrong").inner_text()
        assert page.get_by_label("Your question").input_value() == "Hello!"
        open_page.faults.clear()  # browsers report refused requests as errors
        page.get_by_text("Settings").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("Maximum tokens").fill("")
        page.get_by_label("Your question").fill("Hello!")
        page.get_by_label("Your question").press("Enter")
        until(page.locator("li.assistant").last.locator("p").first.inner_text)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped", exact=True).wait_for()
        until(lambda: model.engine.metrics.finished["cancelled"] == 1)
        page.get_by_label("Maximum tokens").fill("4")
        drop = "const data = new DataTransfer(); data.items.add(new File(['no image'], 'x.png', {type: 'image/png'}));"
        page.evaluate(drop + "document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}))")
        page.get_by_text("x.png is not an image").wait_for(state="attached")
        answer = ask(page, "And now?")
        assert "4 out" in answer.locator(".note").inner_text()

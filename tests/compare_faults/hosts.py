"""Wrong work of the host: what the processor makes of a prompt, and what the engine feeds to graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from staticvl.runtime.artifact import CROSS_HIDDEN
from staticvl.runtime.engine.feeds import Feeds
from staticvl.runtime.processor import images
from staticvl.runtime.processor.families import fusion, llava_next, mllama
from staticvl.runtime.processor.prompt import CrossAttentionMask

from .fault import Base, Fault, Seeding
from .settings import LLAVA, MLLAMA, NEXT, QWEN

BY_TRANSFORMERS = {family: Base(family, by="transformers") for family in ("llava", "mllama")}
QUICK: dict[str, Any] = {"with_edges": False, "inspect": "never"}


def after(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[Seeding], None]:
    """Code whose result is changed: `change(result, *arguments)` gives the new one, or None for changes in place."""

    def seed(place: Seeding) -> None:
        right = getattr(owner, name)

        def wrong(*args: Any, **settings: Any) -> Any:
            result = right(*args, **settings)
            changed = change(result, *args)
            return result if changed is None else changed

        place.patch.setattr(owner, name, staticmethod(wrong) if name == "_set_cross_attention" else wrong)

    return seed


def fed(fill: str, change: Callable[[dict[str, np.ndarray], Any], None]) -> Callable[[Seeding], None]:
    """A feed changed after the engine has filled it: `change(feed, step)`."""

    def apply(_result: Any, _feeds: Any, feed: dict[str, np.ndarray], step: Any, _cache: Any) -> None:
        change(feed, step)

    return after(Feeds, fill, apply)


def add(name: str, number: float) -> Callable[[dict[str, np.ndarray], Any], None]:
    def change(feed: dict[str, np.ndarray], _step: Any) -> None:
        if name in feed:
            feed[name] += np.asarray(number, feed[name].dtype)

    return change


def rolled(name: str, axis: int) -> Callable[[dict[str, np.ndarray], Any], None]:
    def change(feed: dict[str, np.ndarray], _step: Any) -> None:
        feed[name][...] = np.roll(feed[name], 1, axis)

    return change


def by_columns(tiles: np.ndarray, _image: Any, _corner: Any, grid: tuple[int, int], _side: int) -> np.ndarray:
    return tiles.reshape(*grid, *tiles.shape[1:]).swapaxes(0, 1).reshape(tiles.shape)


def bilinear(place: Seeding) -> None:
    right = images._resize

    def wrong(image, size, config):
        chosen = images.Image.Resampling(2 if config.resample == 3 else config.resample)
        return image.resize(size, resample=chosen)

    assert right
    place.patch.setattr(images, "_resize", wrong)


def sees_everything(mask: CrossAttentionMask, *_: Any) -> CrossAttentionMask:
    return CrossAttentionMask(visible=np.ones_like(mask.visible), gates=mask.gates)


def open_gates(mask: CrossAttentionMask, *_: Any) -> CrossAttentionMask:
    return CrossAttentionMask(visible=mask.visible, gates=np.ones_like(mask.gates))


def hide_last_tile(feed: dict[str, np.ndarray], _step: Any) -> None:
    if "cross_mask" in feed:
        feed["cross_mask"][..., -1] = CROSS_HIDDEN


def scale_queries(feed: dict[str, np.ndarray], _step: Any) -> None:
    feed["query_scale"] *= 1.1


def fault(
    name: str, base: Base, seed: Callable[[Seeding], object], where: str, says: str = "", stage: str = "feeds", **more: Any
) -> Fault:
    return Fault(name=name, base=base, seed=seed, stage=stage, where=where, says=says, **({"settings": QUICK} | more))


LARGE: dict[str, Any] = {"samples": ("image, large",)}
ON_IMAGE: dict[str, Any] = {"samples": ("image, wide",)}
FAULTS = (
    fault("tiles in another order", BY_TRANSFORMERS["mllama"], after(images, "_cut", by_columns), "pixels",
          "the reference's tiles in the order 0, 2, 1, 3", stage="inputs", **LARGE),
    fault("resize filter in code", BY_TRANSFORMERS["llava"], bilinear, "pixels",
          "resize filter is bilinear, where the reference has bicubic", stage="inputs", **ON_IMAGE),
    fault("channel order of images", BY_TRANSFORMERS["llava"], after(
          images, "_resize", lambda image, *_: images.Image.fromarray(np.asarray(image)[..., ::-1].copy())), "pixels",
          "channel order is reversed", stage="inputs", **ON_IMAGE),
    fault("images mirrored", BY_TRANSFORMERS["llava"], after(
          images, "_resize", lambda image, *_: images.Image.fromarray(np.asarray(image)[:, ::-1].copy())), "pixels",
          "the tiles are mirrored", stage="inputs", **ON_IMAGE),
    fault("patches of LLaVA-1.6 column by column", NEXT, after(
          llava_next, "_patches", lambda plane, *_: plane.T.reshape(plane.shape)), "row_index", "where the prompt requires",
          stage="inputs", samples=("image, tall",)),
    fault("features one row late in a prompt", LLAVA, after(
          fusion, "_put_in", lambda pair, *_: (pair[0], np.where(pair[1] > 0, pair[1] - 1, pair[1]))), "row_index",
          stage="inputs", **ON_IMAGE),
    fault("unused tiles seen", MLLAMA, after(mllama, "cross_attention_mask", sees_everything), "tiles_seen",
          "where the prompt requires 0", stage="inputs", samples=("image, wide",), quick=True),
    fault("gates open before the image", MLLAMA, after(mllama, "cross_attention_mask", open_gates), "cross_gate",
          stage="inputs", **LARGE),
    fault("aspect id off by one", MLLAMA, fed("_vision", add("aspect_id", 1)), "aspect_id", "where 6 is right", **LARGE),
    fault("tile count off by one", MLLAMA, fed("_vision", add("tile_count", -1)), "tile_count", "3 for image 0", **LARGE),
    fault("tile hidden from an answer", MLLAMA, fed("_decode", hide_last_tile), "cross_mask", "decode-1", quick=True, **LARGE),
    fault("gates closed for an answer", MLLAMA, fed("_decode", add("cross_gate", -1)), "cross_gate", "decode-1", **LARGE),
    fault("tile hidden from a prompt", MLLAMA, fed("_prefill", hide_last_tile), "cross_mask", "prefill-16", **LARGE),
    fault("index of features one late", LLAVA, fed("_prefill", rolled("row_index", 1)), "row_index", "prefill", **ON_IMAGE),
    fault("features in another order", LLAVA, fed("_prefill", rolled("image_rows", 0)), "image_rows", "prefill", **ON_IMAGE),
    fault("steps one row late", BY_TRANSFORMERS["llava"], fed("_decode", add("lengths", 1)), "lengths",
          "lengths 14 after 13 tokens, where 13 is right", graph="decode-1", samples=("text 2",), quick=True),
    fault("rotary tables one position late", LLAVA, fed("_decode", lambda feed, _step: [
          np.copyto(feed[name], np.roll(feed[name], 1, -1)) for name in ("rope_cos", "rope_sin")]), "rope_(cos|sin)", "decode",
          samples=("text 2",)),
    fault("last index one early", LLAVA, fed("_prefill", add("last_index", -1)), "last_index", samples=("text 2",)),
    fault("token of the step before", LLAVA, fed("_decode", add("token_ids", 1)), "token_ids", "decode-1", samples=("text 2",)),
    fault("scale of queries", QWEN, fed("_prefill", scale_queries), "query_scale",
          samples=("image, wide",)),
    fault("padding in place of pixels", LLAVA, fed("_vision", lambda feed, _step: feed["pixels"].fill(0)), "pixels", "vision-1",
          **ON_IMAGE),
)  # fmt: skip

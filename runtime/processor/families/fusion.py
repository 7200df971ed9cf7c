"""Early fusion: rows of image features take the places of image marks.

Legend: L positions of the prompt, S side of a tile, P rows of features per tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...artifact import ModelInfo
from ..images import ImageSource, frame_of, load_image, to_pixels
from ..prompt import Prompt
from ..tokenizer import IMAGE_ID, Tokenizer
from .marks import check_ids

# Size of an image -> int32 [n]: the rows, counted from the image's first, that its mark stands for; -1: a newline.
ImageRows = Callable[[tuple[int, int], ModelInfo], np.ndarray]


def fused_prompt(
    text: str,
    images: Sequence[ImageSource],
    info: ModelInfo,
    tokenizer: Tokenizer,
    image_rows: ImageRows,
    guard: str = "",
) -> Prompt:
    """The prompt of a text in which the i-th mark that no `guard` breaks up stands for the i-th image.

    Features are those of all tiles in order, so row t * P + p is patch p of tile t.

    Raises PromptError when marks and images differ in number, ImageError, TokenizerError.
    """
    ids = np.array(tokenizer.encode_with_images(text, info.image.mark, guard), dtype=np.int32)
    return fuse(ids, images, info, image_rows)


def fuse(ids: np.ndarray, images: Sequence[ImageSource], info: ModelInfo, image_rows: ImageRows) -> Prompt:
    """The prompt of ids, int32 [L] with IMAGE_ID where an image stands; raises as fused_prompt."""
    check_ids(ids, len(images), info)
    pixels = [np.empty((0, info.image.size, info.image.size, 3), dtype=np.uint8)]
    frames, runs, tiles = [], [], 0
    for source in images:
        image = load_image(source, alpha=info.image.alpha)
        frames.append(frame_of(image.size, info.image))
        rows = image_rows(image.size, info)
        runs.append(np.where(rows >= 0, rows + tiles * info.image.rows, -1))
        pixels.append(to_pixels(image, info.image))
        tiles += len(pixels[-1])
    token_ids, rows = _put_in(ids, runs, info)
    return Prompt(
        token_ids=token_ids,
        rows=rows,
        pixels=np.concatenate(pixels),
        frames=tuple(frames),
        image_tokens=sum(map(len, runs)),
        state=np.zeros_like(rows),
    )


def _put_in(ids: np.ndarray, runs: Sequence[np.ndarray], info: ModelInfo) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and feature rows, both int32 [L], with the i-th mark replaced by the i-th run."""
    repeats = np.ones(ids.shape, dtype=np.int64)
    repeats[ids == IMAGE_ID] = [len(run) for run in runs]
    wide = np.repeat(ids, repeats)  # [L]
    is_image = wide == IMAGE_ID
    rows = np.full(wide.shape, -1, dtype=np.int32)
    rows[is_image] = np.concatenate([np.empty(0, np.int32), *runs])
    wide[is_image] = info.tokenizer.image_token_id or 0
    if info.image.newline_id is not None:
        wide[is_image & (rows < 0)] = info.image.newline_id
    return wide, rows

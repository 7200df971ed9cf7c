"""Inputs that the host makes of a prompt before any graph runs: token ids, tiles in their order, rotary tables, masks.

Names that both sides have are compared. `token_ids` [L] (image rows hidden), `row_index` [L], `rope_cos` and `rope_sin`
[L, D], `query_scale` [L], `pixels` [tiles, S, S, 3] normalised, `aspect_id` [images], `tiles_seen` [L, images * tiles].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .findings import Finding
from .metrics import relative_error
from .setting_words import FILTERS


@dataclass(frozen=True, slots=True)
class Resizing:
    """The resize filter that a side's settings name, and what others make of the images. Filters have Pillow's numbers."""

    declared: int
    pixels: Callable[[int], np.ndarray | None]  # a filter -> pixels as in `pixels`


def compare_inputs(
    reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray], limit: float, resizing: Resizing | None = None
) -> list[Finding]:
    """A finding for every input that differs by more than `limit` of its largest magnitude; integers may not differ at all.

    `resizing` is used to name a filter that explains a difference.
    """
    findings = []
    for name, a in reference.items():
        if name not in candidate:
            if name in ("pixels", "query_scale"):
                findings.append(Finding(stage="inputs", where=name, text=f"the candidate makes no {name} of this prompt"))
            continue
        b = candidate[name]
        if a.shape != b.shape:
            text = f"{name} has the shape {list(b.shape)}; the reference makes {list(a.shape)}"
            findings.append(Finding(stage="inputs", where=name, text=text, shape=b.shape))
            continue
        integer = np.issubdtype(a.dtype, np.integer)
        error = float((a != b).mean()) if integer else relative_error(a, b)
        if error > (0 if integer else limit):
            findings.append(
                Finding(
                    stage="inputs", where=name, text=_text(name, a, b, error, integer, resizing), error=error, shape=b.shape
                )
            )
    return findings


def _text(name: str, a: np.ndarray, b: np.ndarray, error: float, integer: bool, resizing: Resizing | None) -> str:
    if integer:
        at = tuple(int(i) for i in np.argwhere(a != b)[0])
        return f"{name}{list(at)} is {b[at]}, where the reference has {a[at]}; {error:.1%} differ"
    text = f"{name} {list(b.shape)} differs by {error:.2e} of its largest magnitude"
    if name == "pixels":
        text += _tiles(a, b) or _resize_filter(a, b, resizing) or _wrong_tiles(a, b)
    elif name.startswith("rope"):
        text += f", first at position {int(np.argmax(np.abs(a - b).max(axis=1) > 1e-5 * np.abs(a).max()))}"
    return text


def _tiles(a: np.ndarray, b: np.ndarray) -> str:
    """A clause where tiles or channels are in another order, or channels are scaled in another way."""
    if np.abs(a[..., ::-1] - b).max() < 1e-3 or _same_but_for_scale(a[..., ::-1], b):
        return ": the channel order is reversed (BGR in place of RGB)"
    order = [next((i for i, tile in enumerate(a) if np.abs(tile - mine).max() < 1e-3), None) for mine in b]
    if None not in order and order != [*range(len(a))]:
        return f": it holds the reference's tiles in the order {', '.join(map(str, order))}"
    fits = _channel_fits(a, b)
    if fits is not None:
        scales = ", ".join(f"{fit[0]:.4g} x {fit[1]:+.4g}" for fit in fits)
        return f": another normalisation, the reference's channels are {scales} of the candidate's x"
    if any(np.abs(np.flip(a, axis) - b).max() < 1e-3 for axis in (1, 2)):
        return ": the tiles are mirrored"
    return ""


def _channel_fits(a: np.ndarray, b: np.ndarray) -> list[np.ndarray] | None:
    """For each channel, factor and shift that make the reference's of the candidate's; None where none do."""
    fits = [np.polyfit(b[..., c].ravel(), a[..., c].ravel(), 1) for c in range(3)]
    exact = all(np.abs(np.polyval(fit, b[..., c]) - a[..., c]).max() < 1e-3 for c, fit in enumerate(fits))
    return fits if exact else None


def _same_but_for_scale(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether channels differ by how they are normalised alone, and not each by itself: grey images say nothing."""
    return _channel_fits(a, b) is not None and _channel_fits(a[..., ::-1], b) is None


def _resize_filter(a: np.ndarray, b: np.ndarray, resizing: Resizing | None) -> str:
    """A clause where another filter gives the numbers of one side."""
    if resizing is None:
        return ""
    pixels = {number: value for number in range(len(FILTERS)) if (value := resizing.pixels(number)) is not None}
    names = [
        next((FILTERS[i] for i, value in pixels.items() if value.shape == each.shape and np.abs(value - each).max() < 1e-3), "")
        for each in (a, b)
    ]
    right = names[0] or FILTERS[resizing.declared]
    if names[1] and names[1] != right:
        return f": the resize filter is {names[1]}, where the reference has {right}"
    return ""


def _wrong_tiles(a: np.ndarray, b: np.ndarray) -> str:
    wrong = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if np.abs(x - y).max() > 1e-3]
    return f", in tiles {', '.join(map(str, wrong))} of {len(a)}" if len(wrong) < len(a) else ""

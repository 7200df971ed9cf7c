"""Inputs that the host makes of a prompt before any graph runs: token ids, tiles in their order, rotary tables, masks.

Names that both sides have are compared. `token_ids` [L] (image rows hidden), `row_index` [L], `rope_cos` and `rope_sin`
[L, D], `query_scale` [L], `pixels` [tiles, S, S, 3] normalised, `aspect_id` [images], `tiles_seen` [L, images * tiles].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .findings import Finding
from .metrics import relative_error


def compare_inputs(reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray], limit: float) -> list[Finding]:
    """A finding for every input that differs by more than `limit` of its largest magnitude; integers may not differ at all."""
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
                Finding(stage="inputs", where=name, text=_text(name, a, b, error, integer), error=error, shape=b.shape)
            )
    return findings


def _text(name: str, a: np.ndarray, b: np.ndarray, error: float, integer: bool) -> str:
    if integer:
        at = tuple(int(i) for i in np.argwhere(a != b)[0])
        return f"{name}{list(at)} is {b[at]}, where the reference has {a[at]}; {error:.1%} differ"
    text = f"{name} {list(b.shape)} differs by {error:.2e} of its largest magnitude"
    if name == "pixels":
        text += _tiles(a, b)
    elif name.startswith("rope"):
        text += f", first at position {int(np.argmax(np.abs(a - b).max(axis=1) > 1e-5 * np.abs(a).max()))}"
    return text


def _tiles(a: np.ndarray, b: np.ndarray) -> str:
    """A clause where tiles are in another order, or channels are scaled in another way."""
    order = [next((i for i, tile in enumerate(a) if np.abs(tile - mine).max() < 1e-3), None) for mine in b]
    if None not in order and order != [*range(len(a))]:
        return f": it holds the reference's tiles in the order {', '.join(map(str, order))}"
    fits = [np.polyfit(b[..., c].ravel(), a[..., c].ravel(), 1) for c in range(3)]
    exact = all(np.abs(np.polyval(fit, b[..., c]) - a[..., c]).max() < 1e-3 for c, fit in enumerate(fits))
    if exact:
        scales = ", ".join(f"{fit[0]:.4g} x {fit[1]:+.4g}" for fit in fits)
        return f": another normalisation, the reference's channels are {scales} of the candidate's x"
    wrong = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if np.abs(x - y).max() > 1e-3]
    return f", in tiles {', '.join(map(str, wrong))} of {len(a)}" if len(wrong) < len(a) else ""

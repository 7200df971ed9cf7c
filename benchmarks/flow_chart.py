"""Draw the flow from a checkpoint to an answer, for the README.

python -m benchmarks.flow_chart docs/flow.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

STAGES = (
    ("checkpoint", ("safetensors or .bin", "float or quantised", "config, tokenizer")),
    ("compiler", ("offline: buckets,", "weights, graphs,", "certificates")),
    ("artifact", ("a folder: graphs,", "one copy of weights,", "manifest.json")),
    ("runtime", ("ONNX Runtime, or", "Ascend / simulator;", "one KV cache")),
    ("answer", ("text, boxes,", "log-probabilities,", "timings")),
)
OURS, OTHERS, DATA = "#1b6ca8", "#5f6b76", "#b8bec4"
COLOURS = {"compiler": OURS, "runtime": OURS, "artifact": OTHERS}
WIDTH, HEIGHT, GAP, MARGIN = 150, 110, 40, 10  # of a box, between boxes, around them
FONT = 'font-family="sans-serif"'


def draw() -> str:
    """The text of the SVG file: a box for each stage, and an arrow from each to the next."""
    count = len(STAGES)
    width = 2 * MARGIN + count * WIDTH + (count - 1) * GAP
    height = 2 * MARGIN + HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(' -> '.join(name for name, _ in STAGES))}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, (name, notes) in enumerate(STAGES):
        left = MARGIN + index * (WIDTH + GAP)
        lines += _box(left, name, notes)
        if index:
            lines += _arrow(left - GAP)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _box(left: int, name: str, notes: tuple[str, ...]) -> list[str]:
    colour, middle = COLOURS.get(name, DATA), left + WIDTH // 2
    box = f'<rect x="{left}" y="{MARGIN}" width="{WIDTH}" height="{HEIGHT}" rx="8"'
    return [
        f'{box} fill="#ffffff" stroke="{colour}" stroke-width="2"/>',
        _text(middle, MARGIN + 28, 'font-size="16" font-weight="bold"', name),
        *(_text(middle, MARGIN + 54 + 18 * row, 'font-size="12"', note) for row, note in enumerate(notes)),
    ]


def _text(middle: int, y: int, style: str, text: str) -> str:
    return f'<text x="{middle}" y="{y}" {FONT} {style} text-anchor="middle">{escape(text)}</text>'


def _arrow(left: int) -> list[str]:
    y, tip = MARGIN + HEIGHT // 2, left + GAP - 4
    return [
        f'<line x1="{left + 4}" y1="{y}" x2="{tip - 8}" y2="{y}" stroke="{OTHERS}" stroke-width="2"/>',
        f'<path d="M {tip} {y} l -9 -5 v 10 z" fill="{OTHERS}"/>',
    ]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m benchmarks.flow_chart DRAWING.svg")
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()

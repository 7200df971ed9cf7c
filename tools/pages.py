"""One self-contained HTML file: text, tables and plots as SVG. matplotlib is imported here alone."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
    "pre{font:12px/1.3 monospace;overflow-x:auto}svg{max-width:100%;height:auto}"
)
_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "staticvl", "font.size": 10, "figure.autolayout": True}


def document(title: str, notes: Sequence[str], plots: Sequence[tuple[str, str]], tables: Sequence[Table]) -> str:
    """The whole file; `plots` are titles and SVG elements."""
    paragraphs = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
    parts = "".join(f"<h2>{html.escape(name)}</h2>\n{plot}" for name, plot in plots)
    console = Console(width=150, file=io.StringIO(), record=True, highlight=False)
    for table in tables:
        console.print(table)
        console.print()
    text, title = html.escape(console.export_text()), html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n{paragraphs}{parts}\n<h2>Figures</h2>\n<pre>{text}</pre>\n</body></html>\n"
    )


def drawn(draw: Callable, columns: int = 1, height: float = 3.6) -> str:
    """An SVG element of a figure whose axes `draw` fills."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(9, height))
        axes = figure.subplots(1, columns)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]

"""One self-contained HTML file: text, tables and plots as SVG. matplotlib is imported here alone."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

_STYLE = """
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--line:#ccc;--fault:#fdecea;--edge:#c33}
@media (prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#181a1b;--line:#444;--fault:#3a1f1d;--edge:#f66}
svg{filter:invert(.91) hue-rotate(180deg)}}
body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:var(--ink);background:var(--paper)}
svg{max-width:100%;height:auto}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;margin:.5em 0 1.5em}caption{text-align:left;font-weight:bold;padding:.3em 0}
th,td{border-bottom:1px solid var(--line);padding:.2em .7em;text-align:left;white-space:nowrap}
td.right,th.right{text-align:right;font-variant-numeric:tabular-nums}
.first{border-left:4px solid var(--edge);background:var(--fault);padding:.6em 1em}
.made{font-size:13px;opacity:.75}
""".replace("\n", "")
_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "staticvl", "font.size": 10, "figure.autolayout": True}


def document(
    title: str,
    notes: Sequence[str],
    plots: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    *,
    first: str = "",
    made: str = "",
) -> str:
    """The whole file; `plots` are titles and SVG elements. `first`: a paragraph that stands out before all others; `made`: when
    and where the file was made."""
    title = html.escape(title)
    emphasised = f'<p class="first">{html.escape(first)}</p>\n' if first else ""
    paragraphs = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
    line = f'<p class="made">{html.escape(made)}</p>\n' if made else ""
    parts = "".join(f"<h2>{html.escape(name)}</h2>\n{plot}" for name, plot in plots)
    figures = "".join(map(_table, tables))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n{emphasised}{paragraphs}{line}{parts}\n<h2>Figures</h2>\n{figures}</body></html>\n"
    )


def _table(table: Table) -> str:
    """A table as HTML; a column that is right-aligned in a terminal is so here too."""
    kinds = [' class="right"' if column.justify == "right" else "" for column in table.columns]
    heads = "".join(f"<th{kind}>{_plain(column.header)}</th>" for column, kind in zip(table.columns, kinds, strict=True))
    cells = [[_plain(cell) for cell in column.cells] for column in table.columns]
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>\n"
        for row in zip(*cells, strict=True)
    )
    caption = f"<caption>{_plain(table.title)}</caption>" if table.title else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n'


def _plain(value: object) -> str:
    """The text of a cell, without rich's markup."""
    return html.escape(value.plain if isinstance(value, Text) else str(value))


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

"""Parts of an HTML page: cells, tables, bars. Every text that comes in is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .numbers import count

Cell = tuple[str, str]
BAR_WIDTH, BAR_HEIGHT = 160, 14


def text(value: Any) -> Cell:
    """A table cell of words."""
    return "", escape(str(value))


def name(value: Any) -> Cell:
    """A table cell with a name from the model."""
    return "name", escape(str(value))


def number(value: Any) -> Cell:
    """A table cell of a number, with separated thousands; empty for None."""
    return "number", count(value)


def table(headers: Sequence[Cell], rows: Iterable[Sequence[Cell]]) -> str:
    """Return an HTML table of cells ``(class, HTML)``."""

    def line(tag: str, cells: Sequence[Cell]) -> str:
        return "<tr>" + "".join(f'<{tag} class="{c}">{h}</{tag}>' if c else f"<{tag}>{h}</{tag}>" for c, h in cells)

    body = "\n".join(line("td", row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n{line("th", headers)}</tr>\n{body}\n</table></div>'


def bar(before: float, after: float, largest: float) -> str:
    """Return an inline SVG bar: the full length is what was, the coloured part what is left."""
    scale = BAR_WIDTH / largest if largest else 0.0
    label = escape(f"{count(before)} before, {count(after)} after")
    return (
        f'<svg width="{BAR_WIDTH}" height="{BAR_HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        f'<rect class="before" width="{before * scale:.1f}" height="{BAR_HEIGHT}"/>'
        f'<rect class="after" width="{after * scale:.1f}" height="{BAR_HEIGHT}"/></svg>'
    )

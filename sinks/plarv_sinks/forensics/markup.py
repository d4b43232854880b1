"""HTML for notebooks: tables and paragraphs, everything escaped, nothing fetched."""

from __future__ import annotations

from html import escape
from typing import Iterable, Optional, Sequence

__all__ = ["LEVEL_COLOURS", "block", "bullets", "paragraph", "preformatted", "table"]

LEVEL_COLOURS = {"ok": "#2e7d32", "warn": "#b26a00", "critical": "#c62828"}
_CELL = "text-align:left;padding:2px 10px 2px 0;vertical-align:top"


def block(title: str, *parts: str) -> str:
    """A heading and what stands below it, which is markup already.

    >>> block("<run>", paragraph("a & b"))
    '<div><p><b>&lt;run&gt;</b></p><p>a &amp; b</p></div>'
    """
    return f"<div><p><b>{escape(title)}</b></p>{''.join(parts)}</div>"


def paragraph(text: str) -> str:
    """A sentence or more."""
    return f"<p>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """A list, a line each."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def preformatted(text: str) -> str:
    """Text whose lines and columns stay as they are."""
    return f'<pre style="white-space:pre-wrap">{escape(text)}</pre>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], level: Optional[int] = None
) -> str:
    """Rows of cells; None is an empty one. ``level``: the column whose word is coloured by it."""
    heads = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(_cells(row, level))}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _cells(row: Sequence[object], level: Optional[int]) -> Iterable[str]:
    for place, value in enumerate(row):
        text = "" if value is None else str(value)
        colour = LEVEL_COLOURS.get(text) if place == level else None
        style = f"{_CELL};color:{colour};font-weight:bold" if colour else _CELL
        yield f'<td style="{style}">{escape(text)}</td>'

"""Columns for the terminal."""

from __future__ import annotations

from typing import Iterator, Sequence, Tuple

__all__ = ["aligned"]


def aligned(rows: Sequence[Tuple[str, ...]]) -> Iterator[str]:
    """One line a row, its cells in columns.

    >>> list(aligned([("run", "steps"), ("a-long-one", "1")]))
    ['run         steps', 'a-long-one  1']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()

"""Real English that every Python carries: the reference manual's help topics."""

from __future__ import annotations

import unicodedata
from typing import Tuple

__all__ = ["read_text"]


def read_text() -> Tuple[str, str]:
    """The text (some 450,000 characters) and its alphabet in order; both pure ASCII.

    It is what `help("topics")` shows, so it differs a little between versions of Python.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    return ascii_text, "".join(sorted(set(ascii_text)))

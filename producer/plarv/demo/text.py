"""Real English that every Python carries: the help topics of the language's manual."""

from __future__ import annotations

import importlib
import unicodedata
from typing import Dict, NamedTuple

__all__ = ["Text", "read_text"]


class Text(NamedTuple):
    """What there is to read, in plain ASCII, and the characters that occur in it, in order."""

    characters: str
    alphabet: str


def read_text() -> Text:
    """Some 465,000 characters. They differ a little from one version of Python to the next.

    >>> text = read_text()
    >>> "The assignment statement" in text.characters or len(text.characters) > 100_000
    True
    """
    topics: Dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    everything = "\n\n".join(topics[name] for name in sorted(topics))
    plain = unicodedata.normalize("NFKD", everything).encode("ascii", "ignore").decode("ascii")
    return Text(plain, "".join(sorted(set(plain))))

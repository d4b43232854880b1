"""Real English that every Python carries: the help topics of the language's manual."""

from __future__ import annotations

import importlib
import unicodedata
from typing import Dict, NamedTuple

__all__ = ["Text", "read_text"]

_TYPEWRITER = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")  # quotes, dashes


class Text(NamedTuple):
    """What there is to read, in plain ASCII, and the characters that occur in it, in order."""

    characters: str
    alphabet: str


def read_text() -> Text:
    """Some 400,000 characters, tables left out; a little else in each version of Python.

    >>> text = read_text()
    >>> "The assignment statement" in text.characters or len(text.characters) > 100_000
    True
    """
    topics: Dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    lines = "\n".join(topics[name] for name in sorted(topics)).splitlines()
    prose = " ".join(word for line in lines if not _is_table(line) for word in line.split())
    prose = prose.translate(_TYPEWRITER)
    plain = unicodedata.normalize("NFKD", prose).encode("ascii", "ignore").decode("ascii")
    return Text(plain, "".join(sorted(set(plain))))


def _is_table(line: str) -> bool:
    return line.lstrip().startswith(("|", "+-", "+=", "---", "===", "***"))

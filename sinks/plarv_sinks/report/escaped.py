"""Text from outside, as a page may show it: run ids, layers, messages and paths are hostile."""

from __future__ import annotations

import html

__all__ = ["escaped"]


def escaped(text: str) -> str:
    r"""``text`` as HTML text or attribute; what no browser shows, or what turns text about, is
    replaced.

    >>> escaped("<b>a\x1b" + chr(0x202e) + "'")
    '&lt;b&gt;a��&#x27;'
    """
    return html.escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))

"""Names for events that no training process writes: the same whenever they are written."""

from __future__ import annotations

import hashlib

__all__ = ["session_of"]


def session_of(*parts: object) -> str:
    """16 hex digits in a session's place, made from what the event is about."""
    text = "\x1f".join(map(str, parts))
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()

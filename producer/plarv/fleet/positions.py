"""Small files in a run's folder that say how far something has come; a torn one says nothing."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple, cast

__all__ = ["Shipped", "read_note", "read_shipped", "shipped_lock", "write_note", "write_shipped"]

Position = Tuple[int, int, int, int, int]


class Shipped(NamedTuple):
    """How far a session's journal is acknowledged by the brokers."""

    topic: str  # to which it went
    record: int  # all before it are acknowledged
    position: Position  # of a reader at that record, or a little before it


def shipped_lock(folder: Path, session: str) -> Path:
    """The file whose lock the session's one shipper holds."""
    return folder / f"shipped-{session}.lock"


def read_shipped(folder: Path, session: str, topic: str) -> Optional[Shipped]:
    """How far the session is shipped to ``topic``; None: not at all, or nobody can say."""
    data = read_note(folder / f"shipped-{session}")
    try:
        position = tuple(int(number) for number in data["position"])
        found = Shipped(str(data["topic"]), int(data["record"]), cast(Position, position))
    except (KeyError, TypeError, ValueError):
        return None
    return found if len(position) == 5 and found.topic == topic else None


def write_shipped(folder: Path, session: str, shipped: Shipped) -> None:
    """Replaces the session's file. OSError: the disk takes none."""
    write_note(folder / f"shipped-{session}", shipped._asdict())


def read_note(path: Path) -> Dict[str, Any]:
    """What :func:`write_note` wrote; empty where there is nothing, or it is damaged."""
    try:
        checksum, _, text = path.read_bytes().partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            return {}
        data: Any = json.loads(text)
    except (OSError, ValueError):
        return {}
    return cast("Dict[str, Any]", data) if isinstance(data, dict) else {}


def write_note(path: Path, data: Dict[str, Any]) -> None:
    """Writes a small mapping at once or not at all. OSError: the disk takes none."""
    text = json.dumps(data, separators=(",", ":")).encode("utf-8")
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(b"%08x %s" % (zlib.crc32(text), text))
    os.replace(temporary, path)

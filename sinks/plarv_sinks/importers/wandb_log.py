"""The records of a ``.wandb`` file, W&B's offline log: in blocks of 32 kB, like LevelDB's."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Iterator

from plarv_sinks.curve import Tell

__all__ = ["MAGIC", "read_records"]

MAGIC = b":W&B"

_FILE_HEADER_BYTES = 7
_BLOCK_BYTES = 1 << 15
_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(path: Path, tell: Tell) -> Iterator[bytes]:
    """The records up to the file's end, or to the first that is cut or broken, which is told.

    A record whose middle is missing is left out. Memory: the file.
    """
    data = path.read_bytes()
    place, number = _FILE_HEADER_BYTES, 0
    parts = b""
    while place < len(data):
        room = _BLOCK_BYTES - place % _BLOCK_BYTES
        if room < _HEADER.size:  # too little for a header: filled up
            place += room
            continue
        end = place + _HEADER.size
        if end > len(data):
            break
        checksum, length, kind = _HEADER.unpack_from(data, place)
        content = data[end : end + length]
        if len(content) < length or checksum != zlib.crc32(bytes((kind,)) + content):
            break
        place = end + length
        parts = content if kind in (_FULL, _FIRST) else parts + content
        if kind in (_FULL, _LAST):
            number += 1
            yield parts
            parts = b""
    if place < len(data) or parts:
        tell(
            f"{path}: cut or broken after {number:,} records, at byte {place:,} of "
            f"{len(data):,}; read up to there"
        )

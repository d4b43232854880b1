"""Keeps a journal's next segments ready, and the journals of a run's folder within their bound."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable

from plarv_schemas.journal_reader import segments_of
from plarv_schemas.journal_writer import JournalWriter

__all__ = ["JournalKeeper"]

_READY = 2  # segments that are ready beside the one being written
_ROOM_EVERY_S = 0.25  # between two looks at how much the other ranks' journals take


class JournalKeeper:
    """What a transport's thread does for the training thread's journal.

    ``trim`` removes segments that are no longer needed, and says how many bytes that freed.
    """

    def __init__(
        self, folder: Path, writer: JournalWriter, max_bytes: int, trim: Callable[[], int]
    ) -> None:
        self._folder = folder
        self._writer = writer
        self._max_bytes = max_bytes
        self._trim = trim
        self._made_room = -float("inf")

    def keep(self, *, for_others: bool) -> None:
        """Keeps the next segments ready, within the bound of the run's folder.

        ``for_others``: other ranks write to the folder, and cannot remove what is not needed.
        """
        writer = self._writer
        if for_others and time.monotonic() - self._made_room >= _ROOM_EVERY_S:
            self._made_room = time.monotonic()
            self._excess()
        while writer.ready < _READY:
            if self._excess() > 0:
                writer.full = "the journal is at its bound, ARGUS_JOURNAL_MAX_MB"
                return
            try:
                writer.prepare(writer.ready + 1)
            except OSError as error:  # tried again next time: room may be made before it is needed
                writer.full = f"no room for the journal: {error.strerror}"
                return
        writer.full = ""

    def _excess(self) -> int:
        """Bytes by which one more segment would pass the bound, once what may go is removed."""
        over = _journal_bytes(self._folder) + self._writer.segment_bytes - self._max_bytes
        return over - self._trim() if over > 0 else over


def _journal_bytes(folder: Path) -> int:
    """What all journals in the folder take on disk."""
    total = 0
    for files in segments_of(folder).values():
        for file in files:
            try:
                total += file.path.stat().st_size
            except OSError:  # removed meanwhile
                continue
    return total

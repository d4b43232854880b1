"""The verdicts and actions of a fleet's run, written beside its journal: each id once."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Deque, Dict, Set, Union

from plarv.fleet.positions import write_note
from plarv_schemas.events import Action, Verdict
from plarv_schemas.locks import FileLock
from plarv_schemas.records import ACTIONS_FILE, FOLD_LOCK, VERDICTS_FILE, read_lines

__all__ = ["SUBSCRIBED_FILE", "RecordFiles"]

SUBSCRIBED_FILE = "subscribed"  # which offsets of the topics are read next

_RECENT = 1024  # records that are kept for the case that the one who writes them dies

Record = Union[Verdict, Action]


class RecordFiles:
    """Appends records to ``verdicts.jsonl`` and ``actions.jsonl`` of a run's folder.

    Of several ranks' processes on a node one writes, the one that holds the run's fold lock: no
    engine folds the run here meanwhile. The others remember what it should have written, and write
    it if it dies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / FOLD_LOCK)
        self._written: Set[str] = set()
        self._recent: Deque[Record] = deque(maxlen=_RECENT)
        self._offsets: Dict[str, int] = {}
        self._noted: Dict[str, int] = {}

    @property
    def seen(self) -> Set[str]:
        """The ids of the actions that stand there by now."""
        return {str(each.get("id")) for each in read_lines(self._folder / ACTIONS_FILE)}

    def lead(self) -> bool:
        """Tries to become the one that writes; whether this is it. OSError."""
        if self._lock.held:
            return True
        if not self._lock.acquire():
            return False
        for name in (VERDICTS_FILE, ACTIONS_FILE):
            path = self._folder / name
            self._written.update(str(each.get("id")) for each in read_lines(path))
            if _ends_torn(path):
                _append(path, b"\n")
        while self._recent:
            self._write(self._recent.popleft())
        return True

    def add(self, record: Record) -> None:
        """Takes in a record. OSError: it found no room; it is tried again with the next."""
        self._recent.append(record)
        if self._lock.held:
            while self._recent:
                self._write(self._recent[0])
                self._recent.popleft()

    def settled(self) -> bool:
        """Whether all that was taken in stands in the files, whoever wrote it. OSError."""
        if self._recent and not self.lead():
            there = {
                str(each.get("id"))
                for name in (VERDICTS_FILE, ACTIONS_FILE)
                for each in read_lines(self._folder / name)
            }
            missing = [record for record in self._recent if record.id not in there]
            self._recent = deque(missing, maxlen=_RECENT)
        return not self._recent

    def note(self, offsets: Dict[str, int]) -> None:
        """Notes up to where the topics are read, once all from there is written. OSError."""
        if self._lock.held and not self._recent and offsets != self._noted:
            write_note(self._folder / SUBSCRIBED_FILE, dict(offsets))
            self._noted = dict(offsets)

    def close(self) -> None:
        """Lets another one write."""
        self._lock.release()

    def _write(self, record: Record) -> None:
        if record.id in self._written:
            return
        name = VERDICTS_FILE if isinstance(record, Verdict) else ACTIONS_FILE
        line = json.dumps(record.to_dict(), separators=(",", ":"), allow_nan=False) + "\n"
        _append(self._folder / name, line.encode("utf-8"))
        self._written.add(record.id)


def _append(path: Path, data: bytes) -> None:
    """Appends all of it, or leaves the file as it was."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, data) < len(data):
            os.ftruncate(descriptor, before)
            raise OSError("no room for a record")
    finally:
        os.close(descriptor)


def _ends_torn(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False

"""The reports of a run's local detector: on this machine and nowhere else, in its ``local/``.

Lines of JSON: ``step``, ``time_ns`` (UTC), ``rank`` and ``report``, as ``to_dict()`` gave it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Deque, Dict, Iterator, List, Mapping, Optional, Tuple, cast

from plarv import settings
from plarv.faults import Faults

__all__ = ["LOCAL_FOLDER", "ReportKeeper", "read_reports"]

LOCAL_FOLDER = "local"
_EVERY = 10  # of reports in which all is ok; every other one is kept
_MAX_WAITING = 1024
_PARTS = 4  # files that the bound is shared out to, so that old reports go a part at a time


class ReportKeeper:
    """Keeps the reports in which something is not ok, one in ten of the others, and the last before
    each change for the worse.

    ``take()`` belongs to the training thread: no lock and no disk. ``write()`` is the background's.
    The folder holds at most ARGUS_LOCAL_MAX_MB; the oldest files go first.
    """

    def __init__(self, folder: Path, session: str, rank: int, faults: Faults) -> None:
        self._folder = folder
        self._stem = f"reports-{session}-{rank:05d}"
        self._rank = rank
        self._faults = faults
        self._bound = settings.integer("ARGUS_LOCAL_MAX_MB") << 20
        self._waiting: Deque[Dict[str, Any]] = deque()
        self._skipped: Optional[Dict[str, Any]] = None  # the latest that was ok and not kept
        self._num_ok = 0
        self._writing = threading.Lock()
        self._number = 0  # of this session's files
        self._torn = False

    def take(self, step: int, report: Mapping[str, Any]) -> None:
        """A report that was given to ``step()``, as a dict."""
        line = {"step": step, "time_ns": time.time_ns(), "rank": self._rank, "report": report}
        if report.get("worst_level", "ok") == "ok":
            self._num_ok += 1
            if self._num_ok % _EVERY != 1:
                self._skipped = line
                return
        elif self._skipped is not None:
            self._put(self._skipped)
        self._skipped = None
        self._put(line)

    def write(self) -> None:
        """Brings what was taken to the disk; what it does not take is counted."""
        with self._writing:
            lines: List[bytes] = []
            while self._waiting:
                line = self._waiting.popleft()
                lines.append(json.dumps(line, default=str, separators=(",", ":")).encode())
            if not lines or not self._bound:
                return
            try:
                self._append(b"\n".join(lines) + b"\n")
            except OSError as error:
                why = f"local reports could not be kept ({error.strerror})"
                self._faults.count(why, times=len(lines))

    def _put(self, line: Dict[str, Any]) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            self._faults.count("local reports came faster than they could be kept")
            return
        self._waiting.append(line)

    def _append(self, data: bytes) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{self._stem}-{self._number:04d}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            is_full = size + len(data) >= self._bound // _PARTS
            if self._torn:
                data = b"\n" + data
            self._torn = True  # unless all of it is there
            while data:
                data = data[os.write(descriptor, data) :]
            self._torn = False
        finally:
            os.close(descriptor)
        if is_full or size == 0:
            self._number += is_full
            self._trim(path)

    def _trim(self, current: Path) -> None:
        """Lets the oldest files go, also those of earlier sessions."""
        files: List[Tuple[int, int, Path]] = []
        for path in self._folder.glob("reports-*.jsonl"):
            stat = path.stat()
            files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._bound - self._bound // _PARTS:
                return
            if path != current:
                path.unlink()
                total -= size


def read_reports(run: Path) -> Iterator[Dict[str, Any]]:
    """The kept reports of a run, by its folder: dicts with step, time_ns, rank and report.

    In the order in which they were written, rank by rank. A line that a crash has cut is left out.
    FileNotFoundError: no report was kept.
    """
    folder = Path(run) / LOCAL_FOLDER
    files = sorted(folder.glob("reports-*.jsonl"), key=_age)
    if not files:
        raise FileNotFoundError(f"{folder} holds no local reports")
    for path in files:
        with open(path, "rb") as file:
            for line in file:
                try:
                    found: Any = json.loads(line)
                except ValueError:
                    continue
                if isinstance(found, dict) and "report" in found:
                    yield cast(Dict[str, Any], found)


def _age(path: Path) -> Tuple[int, str]:
    """Sessions and ranks in the order of their last write, the files of each by their number."""
    stem, _, _ = path.stem.rpartition("-")
    newest = max(each.stat().st_mtime_ns for each in path.parent.glob(f"{stem}-*.jsonl"))
    return newest, path.name

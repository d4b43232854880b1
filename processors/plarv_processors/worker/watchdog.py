"""Ends a detector that hangs, and with it the worker's process, which begins anew without it.

All agents share one event loop: a detector that does not return stops them all. Time is counted in
CPU seconds of the loop's thread, so that a machine that sleeps or swaps is no hang.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Callable, List, Optional

from plarv_processors.worker.left_out import from_json, to_json
from plarv_schemas.messages import LeftOut

__all__ = ["Watchdog", "forget_notes", "read_notes"]

_log = logging.getLogger("plarv.worker")

_FILE = "hung.jsonl"
_LOOK_S = 0.5


class Watchdog:
    """Watches what the loop's thread says it is doing.

    ``enter`` and ``leave`` cost one attribute each.
    """

    def __init__(
        self, state_dir: Path, hang_s: float, *, restart: Optional[Callable[[], None]] = None
    ) -> None:
        self._file = state_dir / _FILE
        self._hang_s = hang_s
        self._restart = restart or _begin_anew
        self._doing: Optional[LeftOut] = None
        self._clock: Optional[int] = None

    def enter(self, doing: LeftOut) -> None:
        """A detector is called now."""
        self._doing = doing

    def leave(self) -> None:
        """It has returned."""
        self._doing = None

    def start(self) -> None:
        """Watches the thread that calls this."""
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        threading.Thread(target=self._watch, name="argus-watchdog", daemon=True).start()

    def _watch(self) -> None:
        assert self._clock is not None
        seen: Optional[LeftOut] = None
        since = 0.0
        while True:
            time.sleep(_LOOK_S)
            try:
                doing, spent = self._doing, time.clock_gettime(self._clock)
            except OSError:
                return  # the thread has ended
            if doing is None or doing is not seen:
                seen, since = doing, spent
            elif spent - since >= self._hang_s:
                self._end(doing)
                seen = None

    def _end(self, note: LeftOut) -> None:
        _log.critical(
            "detector %s hangs on run %s at offset %d of partition %d: the worker begins anew "
            "without it for that run",
            note.detector, note.run_id, note.offset, note.partition,
        )  # fmt: skip
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "ab") as file:
            file.write(to_json(note) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._restart()


def read_notes(state_dir: Path) -> List[LeftOut]:
    """What the last process noted on disk and nobody has published yet."""
    try:
        lines = (state_dir / _FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    notes: List[LeftOut] = []
    for line in lines:
        try:
            notes.append(from_json(line))
        except (ValueError, json.JSONDecodeError):
            _log.warning("%s holds a line that is no note", state_dir / _FILE)
    return notes


def forget_notes(state_dir: Path) -> None:
    """The notes are in the topic now."""
    (state_dir / _FILE).unlink(missing_ok=True)


def _begin_anew() -> None:
    logging.shutdown()
    os.execv(sys.executable, sys.orig_argv)

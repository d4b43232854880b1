"""Reads scalars that cannot be read without waiting, in a thread that nobody waits for."""

from __future__ import annotations

import math
import os
import queue
import threading
from typing import Any, Callable, List, Optional, Tuple

__all__ = ["BackgroundReader", "PendingRead", "Unreadable"]

_MAX_WAITING = 256

Unreadable = Callable[[int, str], None]


class PendingRead:
    """One scalar that the background thread will read."""

    __slots__ = ("_done", "_index", "_refuse", "_value")

    def __init__(self, index: int, refuse: Unreadable) -> None:
        self._index = index
        self._refuse = refuse
        self._value = math.nan
        self._done = ""

    def finish(self, value: Any) -> None:
        """Read it, in the background thread: this is where the device is waited for."""
        try:
            self._value = float(value)
            self._done = "read"
        except Exception:  # noqa: BLE001 - anybody's objects come here
            self._done = "failed"

    def poll(self, values: List[Optional[float]]) -> bool:
        """Whether it is done; then its value stands at its place in ``values``."""
        if self._done == "read":
            values[self._index] = self._value
        elif self._done == "failed":
            self._refuse(self._index, "unreadable")
        return bool(self._done)


Job = Tuple[PendingRead, Any]


class BackgroundReader:
    """One thread that waits so that nobody else does. Begins at first use, anew after a fork."""

    def __init__(self) -> None:
        self._jobs: Optional[queue.Queue[Optional[Job]]] = None
        self._pid = -1

    def submit(self, value: Any, index: int, refuse: Unreadable) -> Optional[PendingRead]:
        """``None`` where too many wait already, or no thread can be started."""
        jobs = self._jobs if self._pid == os.getpid() else None
        if jobs is None:
            jobs = self._begin()
        if jobs is None:
            return None
        part = PendingRead(index, refuse)
        try:
            # A copy on the device: the script may change its loss in place right after.
            kept = value.clone() if hasattr(value, "clone") else value
            jobs.put_nowait((part, kept))
        except queue.Full:
            return None
        return part

    def _begin(self) -> Optional[queue.Queue[Optional[Job]]]:
        """A queue and a thread that reads it; None where no thread can be started."""
        jobs: queue.Queue[Optional[Job]] = queue.Queue(_MAX_WAITING)
        thread = threading.Thread(target=_read_all, args=(jobs,), name="argus-scalars", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # interpreter shutdown, or no more threads
            return None
        self._jobs, self._pid = jobs, os.getpid()
        return jobs

    def close(self) -> None:
        """Let the thread go when it has read what is there; of a full queue it is let off one."""
        jobs, self._jobs = self._jobs, None
        while jobs is not None and self._pid == os.getpid():
            try:
                jobs.put_nowait(None)
                return
            except queue.Full:
                pass
            try:
                jobs.get_nowait()
            except queue.Empty:  # the thread was quicker
                pass


def _read_all(jobs: queue.Queue[Optional[Job]]) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        part, value = job
        part.finish(value)
        del job, part, value  # do not keep a device tensor until the next one comes

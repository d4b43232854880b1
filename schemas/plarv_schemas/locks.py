"""A lock that a process holds on a file, and loses when it dies."""

from __future__ import annotations

import fcntl  # POSIX only, like pread; here, since a lock may be taken on a thread beside a fork
import os
from pathlib import Path

__all__ = ["FileLock"]


class FileLock:
    """An advisory lock (flock); two in one process exclude each other too. Never waits."""

    __slots__ = ("_path", "_descriptor")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._descriptor >= 0

    def acquire(self) -> bool:
        """Takes the lock if nobody has it; whether it is ours now. OSError: no file can be made."""
        if self.held:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Gives it back."""
        if self.held:
            os.close(self._descriptor)
            self._descriptor = -1

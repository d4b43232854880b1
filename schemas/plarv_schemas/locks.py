"""A lock that a process holds on a file, and loses when it dies."""

from __future__ import annotations

import errno
import fcntl  # POSIX only, like pread; here, since a lock may be taken on a thread beside a fork
import os
import weakref
from pathlib import Path

__all__ = ["FileLock"]

_live: weakref.WeakSet[FileLock] = weakref.WeakSet()
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


class FileLock:
    """An advisory lock (flock); two in one process exclude each other too. Never waits.

    A forked child does not have it, and does not keep it from being given back.
    """

    __slots__ = ("__weakref__", "_descriptor", "_path", "held")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self.held = False  # by this object
        _live.add(self)

    def acquire(self) -> bool:
        """Takes the lock if nobody has it; whether it is ours now.

        OSError: no file can be made, or the file system has no locks.
        """
        if self.held:
            return True
        # known to a child before it is locked; a lock around both would be one that a fork waits on
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno in _TAKEN:
                return False
            raise
        self.held = True
        return True

    def release(self) -> None:
        """Gives it back."""
        descriptor, self._descriptor, self.held = self._descriptor, -1, False
        if descriptor >= 0:
            os.close(descriptor)


def _let_go() -> None:
    """In a forked child: the file stays locked as long as any copy of its descriptor is open."""
    for lock in list(_live):
        lock.release()


os.register_at_fork(after_in_child=_let_go)

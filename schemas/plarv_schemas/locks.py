"""A lock that a process holds on a file, and loses when it dies."""

from __future__ import annotations

import errno
import fcntl  # POSIX only, like pread; here, since a lock may be taken on a thread beside a fork
import os
import threading
import weakref
from pathlib import Path

__all__ = ["FileLock"]

_held: weakref.WeakSet[FileLock] = weakref.WeakSet()
_forking = threading.RLock()  # so that a fork beside an acquire() sees all descriptors
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


class FileLock:
    """An advisory lock (flock); two in one process exclude each other too. Never waits.

    A forked child does not have it, and does not keep it from being given back.
    """

    __slots__ = ("__weakref__", "_descriptor", "_path")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._descriptor >= 0

    def acquire(self) -> bool:
        """Takes the lock if nobody has it; whether it is ours now.

        OSError: no file can be made, or the file system has no locks.
        """
        if self.held:
            return True
        with _forking:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in _TAKEN:
                    return False
                raise
            self._descriptor = descriptor
            _held.add(self)
        return True

    def release(self) -> None:
        """Gives it back."""
        if self.held:
            os.close(self._descriptor)
            self._descriptor = -1


def _let_go() -> None:
    """In a forked child: the file stays locked as long as any copy of its descriptor is open."""
    _forking.release()
    for lock in list(_held):
        lock.release()


os.register_at_fork(
    before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_let_go
)

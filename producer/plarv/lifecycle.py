"""Ends that nobody calls: interpreter exit, and fork."""

from __future__ import annotations

import atexit
import os
import time
from typing import Any, Protocol, Set

from plarv.faults import Guard

__all__ = ["CLOSED", "forget", "watch"]


class _ClosedWriter:
    """In a writer's place where nothing may be written: no room, ever."""

    position = 1
    limit = 0
    record = 0
    buffer = b""


CLOSED = _ClosedWriter()


class _Watched(Protocol):
    def _at_exit(self, begun: float) -> None: ...

    def _after_fork(self) -> None: ...


# Strong references: an Argus that the script dropped still has a journal to end. complete() forgets
# it.
_live: Set[Any] = set()
_hooked = False


def watch(argus: _Watched) -> None:
    """Ends ``argus`` at interpreter exit, and makes its copies in forked children inert."""
    global _hooked
    _live.add(argus)
    if not _hooked:
        _hooked = True
        atexit.register(_end_all)
        os.register_at_fork(after_in_child=_disarm_all)


def forget(argus: _Watched) -> None:
    """``argus`` has ended."""
    _live.discard(argus)


def _end_all() -> None:
    begun = time.monotonic()  # the bound is on all of them together
    for argus in list(_live):
        with Guard("interpreter exit"):
            argus._at_exit(begun)


def _disarm_all() -> None:
    for argus in list(_live):
        with Guard("fork"):
            argus._after_fork()
    _live.clear()

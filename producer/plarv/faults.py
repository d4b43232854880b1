"""The one place where our own faults end: swallowed, logged once a cause, counted.

Production swallows, tests do not: with ``plarv.faults.RERAISE = True`` a fault is raised instead.
"""

from __future__ import annotations

import logging
from typing import Dict, Optional

__all__ = ["RERAISE", "Faults", "Guard"]

RERAISE = False

_log = logging.getLogger("plarv")
_MAX_CAUSES = 64


class Faults:
    """Counts of what went wrong or was lost, by cause. Taken in by any thread, printed at the
    end.
    """

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts: Dict[str, int] = {}

    def count(self, cause: str, error: Optional[BaseException] = None, *, times: int = 1) -> None:
        """``times`` more of ``cause``; the first of an ``error`` is logged with its traceback."""
        if error is not None:
            cause = f"{cause} ({type(error).__name__})"
        if cause not in self.counts and len(self.counts) >= _MAX_CAUSES:
            cause = "other faults"
        seen = self.counts.get(cause, 0)
        self.counts[cause] = seen + times
        if error is not None:
            if seen == 0:
                _log.debug("argus: %s", cause, exc_info=error)
            if RERAISE:
                raise error

    def describe(self) -> str:
        """All counts in one line; '' where there are none."""
        return "; ".join(f"{count} x {cause}" for cause, count in sorted(self.counts.items()))


class Guard:
    """``with guard:`` lets nothing out but what ends a process, and counts it under its cause."""

    __slots__ = ("cause", "failures", "faults")

    def __init__(self, cause: str, faults: Optional[Faults] = None) -> None:
        self.cause = cause
        self.faults = Faults() if faults is None else faults
        self.failures = 0

    def __enter__(self) -> None:
        """Enter."""

    def __exit__(self, kind: object, error: Optional[BaseException], traceback: object) -> bool:
        """Swallow and count, or in a test raise."""
        if not isinstance(error, Exception):
            return False
        self.failures += 1
        self.faults.count(self.cause, error)
        return True

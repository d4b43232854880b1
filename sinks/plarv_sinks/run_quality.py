"""The quality of a run's data, over its attempts."""

from __future__ import annotations

from plarv_schemas.events import StepEvent
from plarv_sinks.quality_fold import ADQI, QualityFold

__all__ = ["RunQuality"]


class RunQuality:
    """Judges the newest attempt alone: one that failed before says nothing about the data.

    >>> quality = RunQuality()
    >>> for step in range(100):
    ...     quality.add(StepEvent("run", "a", step, 0, step, loss=2.0), attempt=1)
    >>> quality.add(StepEvent("run", "b", 0, 0, 0, loss=2.0), attempt=2)
    >>> quality.score().total is None
    True
    """

    __slots__ = ("_fold", "_attempt")

    def __init__(self) -> None:
        self._fold = QualityFold()
        self._attempt = 0

    def add(self, event: StepEvent, attempt: int) -> None:
        """Takes one step; those of an attempt that was left behind are passed over."""
        if attempt > self._attempt:
            self._fold, self._attempt = QualityFold(), attempt
        if attempt == self._attempt:
            self._fold.add(event)

    def score(self) -> ADQI:
        """Of the newest attempt, so far."""
        return self._fold.score()

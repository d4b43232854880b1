"""A loss that leaps out of its own past."""

from __future__ import annotations

import math
from typing import Optional

from plarv.local.past import Past
from plarv.local.report import CheckResult
from plarv_schemas.events import Level

__all__ = ["LossSpike"]

_MIN_SEEN = 12
_WARN = 8.0
_CRITICAL = 20.0
_NOISE_FLOOR = 0.01  # of the loss's magnitude: a loss that hardly moves has some noise yet
_LEARNT = 64  # steps in a row after which the new height is normal
_RECENT = 9
_OF_LARGEST = 0.4
_LEARNT_SHARE = 0.05  # of the first losses: below it, noise is a matter of factors
_LEAP = 30.0  # times the largest of the last few, which alone counts there


class LossSpike:
    """Fires where the loss lies far above its last few values, by the noise of its own past.

    The score is (loss - m) / sigma, m the median of the last 9 losses and sigma the largest of 1.48
    times the median of the last 48 distances |loss - m|, 0.4 times the largest of them upwards, and
    1% of the loss. It warns from 8 on and is critical from 20 on, and at once where the loss is not
    finite. A loss below 5% of the run's first ones has nearly been learnt, and varies by factors:
    there it must also be 30 times the largest of the last 9.

    >>> check = LossSpike()
    >>> for step in range(30): check.take(2.0 + 0.1 * (step % 3))
    >>> check.take(40.0); check.result().level
    'critical'
    """

    key = "loss_spike"

    def __init__(self) -> None:
        self._recent = Past(_RECENT)
        self._distances = Past()
        self._rises = Past()
        self._score = 0.0
        self._loss: Optional[float] = None
        self._ill = 0
        self._first: Optional[float] = None  # the median of the run's first losses

    @property
    def is_finite(self) -> bool:
        """Whether the latest loss was a number, or there was none."""
        return self._loss is None or math.isfinite(self._loss)

    @property
    def fell(self) -> bool:
        """Whether the loss is far below what it was: small gradients are then no wonder."""
        recent = self._recent
        return self._loss is not None and len(recent) > 0 and self._loss < 0.3 * recent.largest

    def take(self, loss: float) -> None:
        """The loss of a step."""
        self._loss = loss
        if not math.isfinite(loss):
            self._score = 1e9
            return
        recent = self._recent
        distance = loss - recent.median if len(recent) else 0.0
        self._score = self._score_of(distance, loss)
        self._ill = self._ill + 1 if self._score >= _WARN else 0
        if self._ill > _LEARNT:
            recent.clear()
            self._ill = 0
        if self._ill == 0:
            if len(recent) == _RECENT:
                self._first = recent.median if self._first is None else self._first
                self._distances.add(abs(distance))
                self._rises.add(max(0.0, distance))
            recent.add(loss)

    def result(self) -> CheckResult:
        """What is known of the latest loss."""
        if self._loss is None:
            return CheckResult("ok", 0.0, _WARN, (), "no loss was given")
        if not math.isfinite(self._loss):
            return CheckResult("critical", 1e9, _WARN, (), "the loss is not finite")
        level: Level = "ok"
        if self._score >= _WARN:
            level = "critical" if self._score >= _CRITICAL else "warn"
        message = f"the loss {self._loss:.4g} is {self._score:.1f} sigma above its past"
        return CheckResult(level, self._score, _WARN, (), message if level != "ok" else "")

    def _score_of(self, distance: float, loss: float) -> float:
        if len(self._distances) < _MIN_SEEN or self._is_learnt_noise(loss):
            return 0.0
        sigma = max(
            1.48 * self._distances.median,
            _OF_LARGEST * self._rises.largest,
            _NOISE_FLOOR * abs(loss - distance),
            1e-12,
        )
        return min(max(0.0, distance / sigma), 1e9)

    def _is_learnt_noise(self, loss: float) -> bool:
        first = self._first
        return first is not None and (
            loss < _LEARNT_SHARE * first and loss < _LEAP * self._recent.largest
        )

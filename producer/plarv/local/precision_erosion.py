"""Updates that round to nothing."""

from __future__ import annotations

from typing import List, Optional, Sequence

from plarv.local.past import Ledger, Past
from plarv.local.report import CheckResult

__all__ = ["PrecisionErosion"]

_MIN_SEEN = 8
_WARN_SHARE = 0.5
_WARN_RISE = 0.25
_COARSE = 0.5  # share of float32 weights that suddenly lie on the grid of a half type


class PrecisionErosion:
    """Fires where far more updates are lost to rounding than before at a like learning rate.

    The score is the share of a layer's sampled weights that had a gradient and did not change, or
    of float32 weights that lie on the grid of bfloat16 or float16, whichever rose more. It warns
    where that is at least half, and 0.25 (critical: 0.5) above its largest value of the past. Not
    judged: the first steps, and steps whose learning rate is below half of what the past had.
    """

    key = "precision_erosion"

    def __init__(self) -> None:
        self._lost = Ledger()
        self._coarse = Ledger()
        self._rates = Past()

    def take(
        self,
        step: int,
        layers: Sequence[str],
        shares: List[float],
        learning_rate: Optional[float],
    ) -> None:
        """Per tensor first the shares of unchanged weights, then those on a half type's grid."""
        smaller = False
        if learning_rate is not None:
            smaller = len(self._rates) > 0 and learning_rate < 0.5 * self._rates.median
            self._rates.add(learning_rate)
        count = len(layers)
        for layer, lost, coarse in zip(layers, shares[:count], shares[count:]):
            past = self._lost.past(layer)
            warn = critical = 2.0
            if len(past) >= _MIN_SEEN and not smaller and past.largest <= 1.0 - _WARN_RISE:
                warn = max(_WARN_SHARE, past.largest + _WARN_RISE)
                critical = max(0.75, past.largest + 2.0 * _WARN_RISE)
            if lost == lost:
                self._lost.judge(step, layer, lost, lost, (warn, critical))
            past = self._coarse.past(layer)
            limit = 2.0
            if len(past) >= _MIN_SEEN and past.largest < 1.0 - _COARSE:
                limit = past.largest + _COARSE
            if coarse == coarse:
                self._coarse.judge(step, layer, coarse, coarse, (limit, 0.9 if limit < 1 else 2.0))

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        lost = self._lost.result(step, "{:.0%} of the updates round to nothing")
        if lost.level == "ok":
            what = "{:.0%} of the float32 weights hold no more than a half type's digits"
            coarse = self._coarse.result(step, what)
            if coarse.level != "ok":
                return coarse
        return lost

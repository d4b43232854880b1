"""Layers that answer every sample alike."""

from __future__ import annotations

from typing import List

from plarv.local.past import Ledger
from plarv.local.report import CheckResult

__all__ = ["RepresentationCollapse"]

_MIN_SEEN = 4
_WARN = 30.0
_CRITICAL = 300.0
_SMALL = 0.02  # a share of variance above this is no collapse, however far it has fallen
_FLOOR = 1e-9


class RepresentationCollapse:
    """Fires where a layer's variance between samples vanishes, against the layer's own past.

    Observed is the share of variance over the batch in the mean square of the outputs, 0 to 1. The
    score says how many times smaller it is than its own median: it warns from 30 on and is
    critical from 300 on, both below a share of 0.02 only. All-zero outputs are dead, not collapsed.
    """

    key = "representation_collapse"

    def __init__(self) -> None:
        self._ledger = Ledger()

    def take(self, step: int, layer: str, share: float) -> None:
        """One observation; NaN for a layer that is silent."""
        past = self._ledger.past(layer)
        score = 1.0
        if len(past) >= _MIN_SEEN and share < _SMALL:
            score = min(past.median, 3.0 * past.smallest) / max(share, _FLOOR)
        self._ledger.judge(step, layer, share, score, (_WARN, _CRITICAL))

    def suspects(self) -> List[str]:
        """Layers to look at again at once."""
        return self._ledger.suspects()

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        what = "the outputs' variance over the batch is {:.3g} times smaller than it was"
        return self._ledger.result(step, what)

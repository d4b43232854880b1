"""Activations that stick to their limit."""

from __future__ import annotations

from typing import List

from plarv.local.past import Ledger
from plarv.local.report import CheckResult

__all__ = ["ActivationSaturation"]

_MIN_SEEN = 4
_WARN_ABOVE_USUAL = 0.25
_CRITICAL_ABOVE_USUAL = 0.5


class ActivationSaturation:
    """Fires where a layer's values clump at their largest, against the layer's own past.

    The score is the fraction of sampled values within 2% of the largest magnitude in the sample: a
    few thousandths for a bell, near 1 for a tanh that is driven into its ends. It warns 0.25 above
    the layer's own past and is critical 0.5 above it.
    """

    key = "activation_saturation"

    def __init__(self) -> None:
        self._ledger = Ledger()

    def take(self, step: int, layer: str, clumped: float) -> None:
        """One observation."""
        past = self._ledger.past(layer)
        warn = critical = 2.0
        if len(past) >= _MIN_SEEN:
            usual = max(past.median, 0.9 * past.largest)
            warn = min(1.0, usual + _WARN_ABOVE_USUAL)
            critical = min(1.0, usual + _CRITICAL_ABOVE_USUAL)
            if usual > 0.8:
                warn = critical = 2.0  # it always was: a mask, a one-hot code
        self._ledger.judge(step, layer, clumped, clumped, (warn, critical))

    def suspects(self) -> List[str]:
        """Layers to look at again at once."""
        return self._ledger.suspects()

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        return self._ledger.result(step, "{:.0%} of the outputs lie at the largest value")

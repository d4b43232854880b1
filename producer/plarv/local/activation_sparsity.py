"""Neurons that died."""

from __future__ import annotations

from typing import List

from plarv.local.past import Ledger
from plarv.local.report import CheckResult

__all__ = ["ActivationSparsity"]

_ABSOLUTE = 0.54  # the published SDK's limit, for a layer whose neurons are nearly all alive
_MIN_SEEN = 4
_SILENT = 1e-3  # an RMS below this part of the layer's own means that all of it is dead


class ActivationSparsity:
    """Fires where half of a layer's living neurons died, against the layer's own past.

    The score is the fraction of sampled neurons without any activity in the sampled rows; with b
    the median of the layer's past it warns from max(0.54, b + (1 - b) / 2) on, and is critical from
    b + 0.8 (1 - b) on. A ReLU layer that is naturally 60% silent thus warns from 80% on.
    """

    key = "activation_sparsity"

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._sizes = Ledger()

    def take(self, step: int, layer: str, dead: float, size: float) -> None:
        """``dead``: fraction without activity; ``size``: RMS of the layer's activations."""
        sizes = self._sizes.past(layer)
        if len(sizes) >= _MIN_SEEN and size < _SILENT * sizes.median:
            dead = 1.0
        else:
            sizes.add(size)
        past = self._ledger.past(layer)
        warn = critical = 2.0
        if len(past) >= _MIN_SEEN:
            usual = max(past.median, 0.9 * past.largest)
            warn = max(_ABSOLUTE, usual + 0.5 * (1.0 - usual))
            critical = max(warn, usual + 0.8 * (1.0 - usual))
            if usual > 0.97:
                warn = critical = 2.0  # it was never alive
        self._ledger.judge(step, layer, dead, dead, (warn, critical))

    def suspects(self) -> List[str]:
        """Layers to look at again at once."""
        return self._ledger.suspects()

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        return self._ledger.result(step, "{:.0%} of the neurons are dead")

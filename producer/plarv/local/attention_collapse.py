"""Attention that looks at a single token."""

from __future__ import annotations

from plarv.local.past import Ledger
from plarv.local.report import CheckResult

__all__ = ["AttentionCollapse"]

_MIN_SEEN = 4
_WARN = 0.85
_CRITICAL = 0.95
_FALL = 0.35  # of its own median: sharp attention that was learnt slowly is no collapse


class AttentionCollapse:
    """Fires where all heads of a layer put their weight on one token, against its own past.

    Observed is the entropy of a few sampled queries' weights, divided by its largest (the logarithm
    of the keys they may see), as the mean over heads. The score is one minus that: it warns from
    0.85 on and is critical from 0.95 on, where the entropy is below 35% of its own median too.
    """

    key = "attention_collapse"

    def __init__(self) -> None:
        self._ledger = Ledger()

    def take(self, step: int, layer: str, entropy: float) -> None:
        """``entropy`` from 0 (one token) to 1 (all alike)."""
        past = self._ledger.past(layer)
        fell = len(past) >= _MIN_SEEN and entropy < _FALL * past.median
        limits = (_WARN, _CRITICAL) if fell else (2.0, 2.0)
        self._ledger.judge(step, layer, entropy, 1.0 - entropy, limits)

    def suspects(self) -> bool:
        """Whether a layer should be looked at again at once."""
        return bool(self._ledger.suspects())

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        return self._ledger.result(step, "attention is {:.0%} of the way to a single token")

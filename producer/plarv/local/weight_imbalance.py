"""Layers whose weights grow out of proportion."""

from __future__ import annotations

import math
from typing import Dict, List, Sequence, Tuple

from plarv.local.past import Ledger
from plarv.local.report import CheckResult

__all__ = ["WeightImbalance"]

_MIN_SEEN = 8
_WARN = 3.0
_CRITICAL = 8.0
_MIN_GROWTH = 0.02  # a step, beyond the layer's neighbours
_GROWTH_FOLD = 5.0  # over its own fastest growth
_FLOOR = 0.1  # of the layers' middle RMS: below it growth is that of a fresh layer


class WeightImbalance:
    """Fires where a layer's weight norm outgrows its own past and the other layers.

    The score is norm / its own median, divided by the same of the middle layer (at least 1); or,
    where larger, 3 times its growth a step over five times the fastest of its own past and over 2%
    more than its neighbours'. It warns from 3 on, is critical from 8 on. Norms of layers with
    tiny weights (an adapter that starts at zero) count from a tenth of the middle RMS.
    """

    key = "weight_imbalance"

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._growths = Ledger()
        self._last: Dict[str, Tuple[int, float]] = {}

    def take(
        self, step: int, layers: Sequence[str], norms: List[float], sizes: Sequence[int]
    ) -> None:
        """One norm a tensor, with its layer and number of elements."""
        norm_of, size_of = _by_layer(layers, norms, sizes)
        middle = _middle([norm / math.sqrt(size_of[layer]) for layer, norm in norm_of.items()])
        seen = {
            layer: max(norm, _FLOOR * middle * math.sqrt(size_of[layer]))
            for layer, norm in norm_of.items()
        }
        growths = {layer: self._growth(step, layer, norm) for layer, norm in seen.items()}
        folds = {layer: self._fold(layer, norm) for layer, norm in seen.items()}
        usual_growth = max(0.0, _middle(list(growths.values()))) if len(seen) > 2 else 0.0
        usual_fold = max(1.0, _middle(list(folds.values()))) if len(seen) > 2 else 1.0
        for layer, norm in seen.items():
            sudden = self._sudden(layer, growths[layer], usual_growth)
            score = max(folds[layer] / usual_fold, sudden)
            if not math.isfinite(norm_of[layer]):
                score = math.inf
            self._ledger.judge(step, layer, norm, score, (_WARN, _CRITICAL))
            if math.isfinite(norm):
                self._last[layer] = (step, norm)

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        what = "its weights grow {:.3g} times out of proportion (or are not finite)"
        return self._ledger.result(step, what)

    def _growth(self, step: int, layer: str, norm: float) -> float:
        before_step, before = self._last.get(layer, (step, norm))
        if norm <= 0.0 or before <= 0.0 or not math.isfinite(norm):
            return 0.0
        return math.log(norm / before) / max(1, step - before_step)

    def _fold(self, layer: str, norm: float) -> float:
        past = self._ledger.past(layer)
        return norm / past.median if len(past) >= _MIN_SEEN and past.median > 0.0 else 1.0

    def _sudden(self, layer: str, growth: float, usual: float) -> float:
        past = self._growths.past(layer)
        score = 0.0
        if len(past) >= _MIN_SEEN and growth - usual > _MIN_GROWTH:
            score = _WARN * growth / max(_MIN_GROWTH, _GROWTH_FOLD * past.largest)
        if score < _WARN:
            past.add(growth)
        return score


def _by_layer(
    layers: Sequence[str], norms: Sequence[float], sizes: Sequence[int]
) -> Tuple[Dict[str, float], Dict[str, int]]:
    squares: Dict[str, float] = {}
    counts: Dict[str, int] = {}
    for layer, norm, size in zip(layers, norms, sizes):
        squares[layer] = squares.get(layer, 0.0) + norm * norm
        counts[layer] = counts.get(layer, 0) + max(1, size)
    return {layer: math.sqrt(square) for layer, square in squares.items()}, counts


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(value for value in values if math.isfinite(value))
    return ordered[len(ordered) // 2] if ordered else 0.0

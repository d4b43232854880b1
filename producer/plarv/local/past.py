"""A layer's own past, and whom to believe: the window, the level, how long a fault was seen."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Deque, Dict, List, Tuple

from plarv.local.report import CheckResult
from plarv_schemas.events import LEVELS

__all__ = ["Ledger", "Past"]

_WINDOW = 48
_LEARNT = 64  # observations in a row after which what looked ill is the layer's normal
_STALE_STEPS = 12  # a layer that was not seen for so long says nothing any more
_MAX_SCORE = 1e9


class Past:
    """The last ``window`` values of a series, with their order at hand. O(window) to add.

    >>> past = Past(3)
    >>> for value in (1.0, 5.0, 2.0, 4.0): past.add(value)
    >>> past.median, past.smallest, past.largest
    (4.0, 2.0, 5.0)
    """

    __slots__ = ("_order", "_sorted", "_window")

    def __init__(self, window: int = _WINDOW) -> None:
        self._window = window
        self._order: Deque[float] = deque()
        self._sorted: List[float] = []

    def __len__(self) -> int:
        return len(self._order)

    def add(self, value: float) -> None:
        """One more; NaN leaves no trace."""
        if value != value:
            return
        if len(self._order) >= self._window:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(value)
        insort(self._sorted, value)

    def clear(self) -> None:
        """Forgets all."""
        self._order.clear()
        self._sorted.clear()

    @property
    def median(self) -> float:
        """The upper median; there must be a value."""
        return self._sorted[len(self._sorted) // 2]

    @property
    def smallest(self) -> float:
        """The least."""
        return self._sorted[0]

    @property
    def largest(self) -> float:
        """The greatest."""
        return self._sorted[-1]

    def quantile(self, part: float) -> float:
        """The value below which ``part`` of the window lies."""
        return self._sorted[min(len(self._sorted) - 1, int(part * len(self._sorted)))]


class _Layer:
    __slots__ = ("ill", "level", "past", "score", "seen", "threshold")

    def __init__(self) -> None:
        self.past = Past()
        self.ill = 0
        self.level = 0
        self.score = 0.0
        self.threshold = 0.0
        self.seen = 0


class Ledger:
    """Level, score and past of each layer for one check.

    A layer is shown where it is critical, or ill in two observations running. What is ill does not
    enter the past, until it has been ill for 64 observations: then it is the layer's normal.
    """

    def __init__(self) -> None:
        self._layers: Dict[str, _Layer] = {}

    def past(self, layer: str) -> Past:
        """The layer's healthy values."""
        return self._of(layer).past

    def judge(
        self, step: int, layer: str, value: float, score: float, limits: Tuple[float, float]
    ) -> None:
        """One observation: ``value`` is for the past, ``score`` meets (warn, critical)."""
        found = self._of(layer)
        warn, critical = limits
        level = 2 if score >= critical else 1 if score >= warn else 0
        found.ill = found.ill + 1 if level else 0
        if found.ill > _LEARNT:
            found.past.clear()
            found.ill = level = 0
        found.level = level if level == 2 or found.ill >= 2 else 0
        found.score, found.threshold, found.seen = min(score, _MAX_SCORE), warn, step
        if not found.ill:
            found.past.add(value)

    def suspects(self) -> List[str]:
        """Layers whose latest observation was ill, shown or not: look at them again soon."""
        return [name for name, layer in self._layers.items() if layer.ill]

    def result(self, step: int, what: str) -> CheckResult:
        """The worst layer's score; ``what`` names the score's unit, with a place for it."""
        fresh = [
            (layer.level, layer.score / layer.threshold if layer.threshold else 0.0, name)
            for name, layer in self._layers.items()
            if step - layer.seen <= _STALE_STEPS
        ]
        if not fresh:
            return CheckResult(message="nothing seen yet")
        level, _, name = max(fresh)
        worst = self._layers[name]
        ill = sorted((each for each in fresh if each[0]), reverse=True)
        layers = tuple(dict.fromkeys(_plain(each[2]) for each in ill))
        message = what.format(worst.score) if level else ""
        return CheckResult(LEVELS[level], worst.score, worst.threshold, layers, message)

    def _of(self, layer: str) -> _Layer:
        found = self._layers.get(layer)
        if found is None:
            found = self._layers[layer] = _Layer()
        return found


def _plain(name: str) -> str:
    """The layer's name without the side of it that was looked at."""
    return name.partition("|")[0]

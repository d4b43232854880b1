"""Moments and counters that no step of the optimizer can have made."""

from __future__ import annotations

import math
from typing import Dict, List, Sequence

from plarv.local.findings import Finding, Findings
from plarv.local.past import Ledger
from plarv.local.report import CheckResult

__all__ = ["OptimizerHealth"]

_MIN_SEEN = 8
_WARN = 30.0  # times the largest norm of the window, in units of a gradient
_CRITICAL = 300.0
_FALL = 1e4
_SIGNIFICANT = 1e-3  # of the largest norm of its kind
_LEARNING = 3  # comparisons in which changes are only noted
_USUAL = 8  # changes in a row after which code is known to do it
_SHOWN = "{:.0f} times what its past explains"


class OptimizerHealth:
    """Fires on optimizer state that was changed between two steps or is not what steps make.

    Exact: state tensors (all of them, or a part in turns for large models) whose checksum changed
    between two steps; second moments below zero; state that is not finite; step counters that did
    not go on by one. Against its own past: norms above 30 times (critical: 300) the largest of the
    window, or 10,000 times below its smallest; second moments count by their root.
    """

    key = "optimizer_health"

    def __init__(self) -> None:
        self._findings = Findings()
        self._norms = Ledger()
        self._compared = 0
        self._in_a_row: Dict[str, int] = {}
        self._counters: Dict[str, float] = {}

    def take_changed(self, step: int, layers: Sequence[str], changed: List[float]) -> None:
        """Which state tensors changed between the end of a step and the start of the next."""
        self._compared += 1
        hit = {layer for layer, flag in zip(layers, changed) if flag}
        for layer in set(layers):
            if layer not in hit:
                self._in_a_row[layer] = 0
                continue
            self._in_a_row[layer] = self._in_a_row.get(layer, 0) + 1
            if self._compared > _LEARNING and self._in_a_row[layer] <= _USUAL:
                self._find(step, layer, "state changed without a step")

    def take_minima(self, step: int, layers: Sequence[str], minima: List[float]) -> None:
        """The least element of each second moment."""
        for layer, least in zip(layers, minima):
            if least < 0.0:
                self._find(step, layer, "second moments are negative")

    def take_norms(self, step: int, key: str, layers: Sequence[str], norms: List[float]) -> None:
        """The norms of the state tensors that are called ``key``, in units of a gradient."""
        squares: Dict[str, float] = {}
        for layer, norm in zip(layers, norms):
            squares[layer] = squares.get(layer, 0.0) + norm * norm
        of_layer = {layer: math.sqrt(square) for layer, square in squares.items()}
        largest = max((norm for norm in of_layer.values() if math.isfinite(norm)), default=0.0)
        for layer, norm in of_layer.items():
            if not math.isfinite(norm):
                self._find(step, layer, f"{key} is not finite")
                continue
            past = self._norms.past(f"{layer}|{key}")
            score = 0.0
            if len(past) >= _MIN_SEEN and past.smallest > 0.0:
                if norm > _SIGNIFICANT * largest:
                    score = norm / past.largest
                if norm * _FALL < past.smallest and past.median > _SIGNIFICANT * largest:
                    score = _CRITICAL
            self._norms.judge(step, f"{layer}|{key}", norm, score, (_WARN, _CRITICAL))

    def take_counters(self, step: int, counters: Dict[str, float], *, stepped: bool) -> None:
        """Step counters; ``stepped``: whether a step of the optimizer lies before this look."""
        for name, value in counters.items():
            known = self._counters.get(name)
            if known is not None and value != known and not (stepped and value == known + 1.0):
                message = f"step counter went from {known:.0f} to {value:.0f}"
                self._find(step, name.partition("|")[0], message)
        self._counters = counters

    def forget_counters(self) -> None:
        """Steps may have been taken that nobody saw."""
        self._counters = {}

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        found = self._findings.result(step, 1.0)
        if found.level == "critical":
            return found
        return self._norms.result(step, "a moment's norm is " + _SHOWN)

    def _find(self, step: int, layer: str, message: str) -> None:
        self._findings.add(layer, Finding(step, "critical", 1.0, message))

"""Gradients that no longer reach a layer."""

from __future__ import annotations

import math
from typing import Dict, List, NamedTuple, Sequence, Set

from plarv.local.past import Ledger, Past
from plarv.local.report import CheckResult
from plarv_schemas.events import Level

__all__ = ["GradientFlow", "StepContext"]

_MIN_SEEN = 8
_WARN = 100.0
_CRITICAL = 1e4
_VANISHED = 1e3  # the whole gradient, against its own past
_INSIGNIFICANT = 1e-5  # of the whole gradient: rounding noise (a bias before a BatchNorm)
_NONE = 1e9


class StepContext(NamedTuple):
    """What a gradient is judged by, beside itself."""

    trainable: Set[str]  # layers that should get one
    idle: Set[str]  # layers that saw no data in this step (an expert without tokens)
    loss_is_finite: bool = True
    loss_fell: bool = False
    scaled: bool = False  # a GradScaler looks for overflows by causing some


class _Run:
    """Steps in a row without gradient, and the longest such that ended well."""

    __slots__ = ("length", "longest")

    def __init__(self) -> None:
        self.length = 0
        self.longest = 0


class GradientFlow:
    """Fires where a layer's share of the gradient vanishes or explodes against its own past.

    The score is how many times smaller the layer's share of the global norm is than its own median
    (or its norm larger than its own largest): warn from 100 on, critical from 10,000 on and where
    it is zero, each for longer than such a gap ever lasted in this run. Gradients that are not
    finite are critical at the second step, or at once with the loss. Silent for layers that saw no
    data and for those that have less than 1e-5 of the gradient.
    """

    key = "gradient_flow"

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._norms = Ledger()
        self._totals = Past()
        self._runs: Dict[str, _Run] = {}
        self._broken = 0
        self._vanished = 0
        self._whole = CheckResult()

    def take(
        self, step: int, layers: Sequence[str], norms: List[float], context: StepContext
    ) -> None:
        """The norms of the step's gradients, one a tensor."""
        squares: Dict[str, float] = dict.fromkeys(context.trainable, 0.0)
        for layer, norm in zip(layers, norms):
            squares[layer] = squares.get(layer, 0.0) + norm * norm
        broken = [layer for layer, square in squares.items() if not math.isfinite(square)]
        self._whole = CheckResult(threshold=_WARN)
        if broken:
            self._not_finite(broken, context)
            return
        self._broken = 0
        total = math.sqrt(math.fsum(squares.values()))
        if not self._vanishes(total, context):
            for layer, square in squares.items():
                if layer in context.trainable and layer not in context.idle:
                    self._judge(step, layer, math.sqrt(square), total)

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        if self._whole.level != "ok":
            return self._whole
        return self._ledger.result(step, "its gradient changed {:.3g}-fold against its past")

    def _not_finite(self, broken: List[str], context: StepContext) -> None:
        self._broken += 1
        patience = 16 if context.scaled else 1
        if not context.loss_is_finite or self._broken > patience:
            message = "gradients are not finite"
            self._whole = CheckResult("critical", _NONE, _WARN, tuple(broken), message)
        elif not context.scaled:
            message = "gradients are not finite, with a finite loss"
            self._whole = CheckResult("warn", _NONE, _WARN, tuple(broken), message)

    def _vanishes(self, total: float, context: StepContext) -> bool:
        past = self._totals
        if len(past) >= _MIN_SEEN and total * _VANISHED < past.smallest and not context.loss_fell:
            self._vanished += 1
            if self._vanished >= 2:
                fold = min(_NONE, past.median / total) if total > 0.0 else _NONE
                level: Level = "critical" if fold >= _CRITICAL else "warn"
                layers = tuple(sorted(context.trainable))
                message = f"the whole gradient is {fold:.3g} times smaller than it was"
                self._whole = CheckResult(level, fold, _VANISHED, layers, message)
            return True
        self._vanished = 0
        past.add(total)
        return False

    def _judge(self, step: int, layer: str, norm: float, total: float) -> None:
        past = self._ledger.past(layer)
        share = norm / total if total > 0.0 else 0.0
        score = 0.0
        if len(past) >= _MIN_SEEN and past.median > _INSIGNIFICANT:
            score = min(past.median, 3.0 * past.smallest) / share if share > 0.0 else _NONE
        elif share == 0.0:
            return  # it never had one
        run = self._runs.setdefault(layer, _Run())
        if score >= _WARN:
            run.length += 1
            if run.length <= (10 if "expert" in layer.lower() else 1) + 2 * run.longest:
                return
        else:
            run.longest = max(run.longest, run.length)
            run.length = 0
            score = max(score, self._explosion(layer, norm, share))
        self._ledger.judge(step, layer, share, score, (_WARN, _CRITICAL))

    def _explosion(self, layer: str, norm: float, share: float) -> float:
        past = self._norms.past(layer)
        score = 0.0
        if len(past) >= _MIN_SEEN and share > 0.01 and past.largest > 0.0:
            score = norm / past.largest
        if score < _WARN:
            past.add(norm)
        return score

"""A gradient that narrows into few directions, and representations or attention that collapse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Dict, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.detectors.local_evidence import in_layers, local_score
from plarv_processors.windows import RobustWindow
from plarv_schemas.events import LEVELS, LOCAL_CHECKS, Level, StepEvent, Verdict, VerdictState

__all__ = ["Canalization"]

_ATTENTION = LOCAL_CHECKS.index("attention_collapse")
_REPRESENTATION = LOCAL_CHECKS.index("representation_collapse")
_LAST = max(_ATTENTION, _REPRESENTATION)
_CRITICAL = LEVELS.index("critical")


class Canalization:
    """Fires when far fewer weights carry the gradient than before.

    ``(L1 / L2)^2`` is the gradient's participation: n for n equal entries, 1 for a single one. It
    falls by nature, and slowly; so the baseline moves with it (once the window is full one value in
    ``thin`` enters) and only a clear and lasting fall below it counts.

    - *narrowed* (warn): below the baseline's median by ``fall_ratio`` and by ``fall_z`` robust
      standard deviations of its logarithm, ``patience`` values in a row, or ``sparse_points`` of
      them over ``sparse_steps`` steps. Critical when the fall is ``severe_ratio`` in as many.
    - *representation_collapse*, *attention_collapse* (warn): that local check is critical in
      ``local_reports`` reports in a row.
    - *confirmed* (critical): the fall and one of these checks together.

    Both norms may come every few steps only, and from a sample of the weights; a repeat is the
    stale value of a skipped step. The baseline takes nothing in while a value lies that low.

    Cost: O(1) a step, 64 doubles. Source: the participation ratio of localisation theory; RankMe
    and sigma-Reparam for the local checks. No public log carries L1 norms: in 15 traced healthy
    runs of a small transformer (AdamW to plain SGD) the worst fall below the baseline was 17%.

    >>> detector = Canalization()
    >>> for step in range(120):
    ...     l1 = (100.0 + step % 5) * (1.0 if step < 80 else 0.4)
    ...     event = StepEvent("r", "s", step, 0, step, grad_l1_norm=l1, grad_l2_norm=1.0)
    ...     for found in detector.update(event):
    ...         print(found.step, found.onset_step, found.kind, found.level, found.state)
    99 80 narrowed warn opened
    """

    name: ClassVar[str] = "canalization"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: traced healthy runs under five optimizers, and faults put into them."""

        window: int = 64  # values of the participation
        thin: int = 4  # one value in so many enters a full window: it spans 256 of them
        min_history: int = 40  # values; the first ones of a run move by themselves
        fall_ratio: float = 3.0  # times below the median; healthy runs reach 1.2
        fall_z: float = 8.0  # robust standard deviations
        severe_ratio: float = 10.0  # times below the median
        patience: int = 20  # values in a row
        sparse_points: int = 8  # values in a row, when they span sparse_steps
        sparse_steps: int = 200  # a value in 20 steps needs 11 of them
        calm_window: int = 10  # values, or local reports, in a row, to resolve
        local_reports: int = 5  # local reports in a row
        adopt_after: int = 500  # values after which a level that stays is the new normal
        floor: float = 0.05  # smallest scale of log(participation), 5%

        def __post_init__(self) -> None:
            if not 8 <= self.min_history <= self.window:
                raise ValueError("min_history must be between 8 and window")
            if not self.severe_ratio >= self.fall_ratio > 1:
                raise ValueError("severe_ratio >= fall_ratio must be above 1")
            if not (self.fall_z > 0 and self.floor > 0):
                raise ValueError("fall_z and floor must be above 0")
            if not 1 <= self.sparse_points <= self.patience < self.adopt_after:
                raise ValueError("sparse_points <= patience < adopt_after must hold, from 1")
            if min(self.thin, self.calm_window, self.local_reports, self.sparse_steps) < 1:
                raise ValueError("thin, calm_window, local_reports, sparse_steps must be >= 1")

    _derived = ("_log_fall",)
    __slots__ = (
        "config", "version", "_log_fall", "_past", "_seen", "_l1", "_low", "_low_since", "_severe",
        "_calm", "_attention", "_representation", "_local_since", "_kind", "_critical", "_onset",
        "_watched", "_last",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._log_fall = math.log(self.config.fall_ratio)
        self._past = RobustWindow(self.config.window)  # log participation
        self._seen = 0  # values that were not low
        self._l1 = 0.0  # to know a repeat
        self._last = 0.0  # log participation
        self._low = 0  # low values in a row
        self._low_since = 0  # step of the first of them
        self._severe = 0  # of these, at the end, by ``severe_ratio``
        self._calm = 0  # in a row towards a resolution: values, or local reports
        self._attention = 0  # local reports in a row with that check critical
        self._representation = 0
        self._local_since = 0
        self._kind: Optional[str] = None  # of the open verdict
        self._critical = False  # level of the open verdict
        self._onset = 0
        self._watched = 0  # values since the onset

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        if event.local_levels is not None:
            found = self._note_report(event)
            if found:
                return found
        l1, l2 = event.grad_l1_norm, event.grad_l2_norm
        if l1 is None or l2 is None or l1 == self._l1:
            return ()
        if not (l1 > 0.0 and l2 > 0.0 and l1 - l1 == 0.0 and l2 - l2 == 0.0):
            return ()
        self._l1 = l1
        self._last = x = 2.0 * (math.log(l1) - math.log(l2))
        past = self._past
        fall = past.median - x
        if fall >= self._log_fall and self._is_low(fall):
            return self._note_low(event, fall)
        self._low = self._severe = 0
        if self._kind == "narrowed" or self._kind == "confirmed":
            return self._note_calm(event)
        seen = self._seen + 1
        self._seen = seen
        if seen <= self.config.window or not seen % self.config.thin:
            past.push(x)
        return ()

    def _is_low(self, fall: float) -> bool:
        past, config = self._past, self.config
        return past.count >= config.min_history and fall >= config.fall_z * self._scale()

    def _note_low(self, event: StepEvent, fall: float) -> Tuple[Verdict, ...]:
        """One more value far below the baseline."""
        config = self.config
        if self._low == 0:
            self._low_since = event.step
        self._low += 1
        self._severe = self._severe + 1 if fall >= math.log(config.severe_ratio) else 0
        self._calm = 0
        if self._kind == "narrowed" or self._kind == "confirmed":
            self._watched += 1
            if self._watched >= config.adopt_after:
                return self._adopt(event)
        lasting = self._low >= config.patience or (
            self._low >= config.sparse_points
            and event.step - self._low_since >= config.sparse_steps
        )
        if not lasting:
            return ()
        if self._local_kind() is not None:
            return self._raise(event, "confirmed", True)
        return self._raise(event, "narrowed", self._severe >= min(self._low, config.patience))

    def _note_calm(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """A value that is not low while the fall is open."""
        self._watched += 1
        self._calm += 1
        if self._calm >= self.config.calm_window:
            return self._resolve(event)
        return ()

    def _note_report(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """What the local report says of representations and attention."""
        levels = event.local_levels or ()
        if len(levels) <= _LAST:
            return ()
        before = max(self._attention, self._representation)
        self._attention = self._attention + 1 if levels[_ATTENTION] >= _CRITICAL else 0
        self._representation = (
            self._representation + 1 if levels[_REPRESENTATION] >= _CRITICAL else 0
        )
        if before == 0:
            self._local_since = event.step
        kind = self._local_kind()
        if kind is not None:
            if self._kind == "narrowed":
                return self._raise(event, "confirmed", True)
            if self._kind is None:
                self._low_since = self._local_since
                return self._raise(event, kind, False)
        if self._kind is None or self._kind in ("narrowed", "confirmed"):
            return ()
        self._calm = 0 if self._attention or self._representation else self._calm + 1
        if self._calm >= self.config.calm_window:
            return self._resolve(event)
        return ()

    def _local_kind(self) -> Optional[str]:
        """The local check that has been critical long enough, if any."""
        if self._representation >= self.config.local_reports:
            return "representation_collapse"
        if self._attention >= self.config.local_reports:
            return "attention_collapse"
        return None

    def _raise(self, event: StepEvent, kind: str, critical: bool) -> Tuple[Verdict, ...]:
        """Opens a verdict or hardens the open one; nothing when it says as much already."""
        if self._kind is not None and (self._critical or not critical):
            return ()
        state: VerdictState = "opened" if self._kind is None else "escalated"
        if self._kind is None:
            self._onset = self._low_since
        if self._kind is None or self._kind not in ("narrowed", "confirmed"):
            self._watched = 0
        self._kind, self._critical, self._calm = kind, critical, 0
        return (self._verdict(event, "critical" if critical else "warn", state),)

    def _adopt(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The level has stayed for so long that it is the new normal."""
        resolved = self._resolve(event)
        self._past.clear()
        self._seen = 0
        return resolved

    def _resolve(self, event: StepEvent) -> Tuple[Verdict, ...]:
        resolved = self._verdict(event, "ok", "resolved")
        self._kind = None
        self._critical = False
        self._low = self._severe = self._calm = self._watched = 0
        self._attention = self._representation = 0
        return (resolved,)

    def _scale(self) -> float:
        return max(self._past.scale, self.config.floor)

    def _verdict(self, event: StepEvent, level: Level, state: VerdictState) -> Verdict:
        past = self._past
        reports = max(self._attention, self._representation)
        local = self._kind in ("representation_collapse", "attention_collapse")
        return verdict(
            self,
            event,
            kind=self._kind or "narrowed",
            level=level,
            state=state,
            onset_step=self._onset,
            score=float(reports) if local else max(past.median - self._last, 0.0) / self._scale(),
            threshold=float(self.config.local_reports) if local else self.config.fall_z,
            evidence=self._evidence(event),
            message=self._message(state, reports, local) + self._where(event, state),
        )

    def _evidence(self, event: StepEvent) -> Dict[str, float]:
        evidence = {
            "participation": _exp(self._last),
            "median": _exp(self._past.median),
            "scale": self._scale(),
            "low": float(self._low),
            "severe": float(self._severe),
            "representation_reports": float(self._representation),
            "attention_reports": float(self._attention),
        }
        if self._kind != "narrowed":
            check = _REPRESENTATION if self._representation >= self._attention else _ATTENTION
            evidence.update(local_score(event, check))
        if event.grad_l1_norm is not None and event.grad_l2_norm is not None:
            evidence["grad_l1_norm"] = event.grad_l1_norm
            evidence["grad_l2_norm"] = event.grad_l2_norm
        return evidence

    def _message(self, state: VerdictState, reports: int, local: bool) -> str:
        now, median = _exp(self._last), _exp(self._past.median)
        if state == "resolved":
            return f"gradient participation {now:.4g}, the fault of step {self._onset} is over"
        if local:
            check = str(self._kind).replace("_", " ")
            return f"the local check for {check} is critical in {reports} reports in a row"
        what = (
            f"gradient participation (L1/L2)^2 {now:.4g} is {median / max(now, 1e-300):.3g} "
            f"times below its median {median:.4g} for {self._low} values since step {self._onset}"
        )
        if self._kind == "confirmed":
            what += f"; a local collapse check has been critical in {reports} reports in a row"
        return what

    def _where(self, event: StepEvent, state: VerdictState) -> str:
        return "" if state == "resolved" or self._kind == "narrowed" else in_layers(event)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))

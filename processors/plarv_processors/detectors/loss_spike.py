"""A loss that jumps: one step is the batch's doing, several in a row are an instability."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.windows import RobustWindow
from plarv_schemas.events import Level, StepEvent, Verdict, VerdictState

__all__ = ["LossSpike"]


class LossSpike:
    """Fires when the loss jumps far above its own recent past.

    ``z = (x - median) / max(scale, floor)`` over the last ``window`` losses, where x is log(loss)
    while all losses are positive and the loss itself otherwise. ``z >= jump_z`` and a rise of at
    least ``jump_ratio`` opens *transient* (warn): in 10 of 15 public GPT runs such one-step jumps
    were the batch's, at the same step in each run. When ``confirm_high`` of the next
    ``confirm_window`` losses stay high it escalates to *confirmed* (critical). The window takes no
    loss while the verdict is open, so that the spike never becomes its own baseline; only jumps
    that come again within ``recur_within`` losses are let in.

    A loss that is not positive (a policy-gradient surrogate) has no ratio; there a jump must also
    leave the range of the window by its whole width.

    Cost: O(1) a step on average, 64 doubles. Source: llm.c's and OLMo's z-score rules, with the
    confirmation that takes their false alarms on 104 public healthy runs from 21 to 4.

    >>> detector = LossSpike()
    >>> losses = [2.0 + 0.01 * (step % 5) for step in range(60)] + [9.0] + [2.0] * 9
    >>> for step, loss in enumerate(losses):
    ...     for found in detector.update(StepEvent("run", "s", step, 0, step, loss=loss)):
    ...         print(found.step, found.kind, found.level, found.state)
    60 transient warn opened
    63 transient ok resolved
    """

    name: ClassVar[str] = "loss_spike"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: candidate rule of the replay over 104 healthy and 78 failing public runs."""

        window: int = 64  # losses
        min_history: int = 20  # losses before it may fire; a run of 100 points is still watched
        jump_z: float = 8.0  # robust standard deviations; 7 fires on 13 of 15 healthy GPT runs
        jump_ratio: float = 1.25  # times the median; smaller rises are not worth a page
        high_z: float = 3.0  # still high, for the confirmation
        high_ratio: float = 1.10  # times the median, for the confirmation
        confirm_window: int = 5  # losses after the jump
        confirm_high: int = (
            3  # of these that must stay high: +3 points of delay, 21 -> 4 false alarms
        )
        calm_window: int = 10  # losses in a row that are not high, to resolve a confirmed spike
        # losses: a jump so soon after another belongs to the run's own noise
        recur_within: int = 12
        adopt_after: int = 300  # losses after which a level that stays is the new normal
        log_floor: float = 0.01  # smallest scale of log(loss), 1%
        raw_floor: float = 0.05  # smallest scale of a raw loss, as a share of the window's range

        def __post_init__(self) -> None:
            if not 8 <= self.min_history <= self.window:
                raise ValueError("min_history must be between 8 and window")
            if not 1 <= self.confirm_high <= self.confirm_window:
                raise ValueError("confirm_high must be between 1 and confirm_window")
            if not (self.jump_z >= self.high_z > 0 and self.jump_ratio >= self.high_ratio > 1):
                raise ValueError("a jump must ask for more than staying high: jump_* >= high_* > 0")
            if self.calm_window < 1 or self.adopt_after < 1 or self.recur_within < 0:
                raise ValueError("calm_window and adopt_after must be at least 1, recur_within 0")
            if not (self.log_floor > 0.0 and self.raw_floor > 0.0):
                raise ValueError("log_floor and raw_floor must be positive")

    __slots__ = (
        "config", "version", "_past", "_log", "_kind", "_onset", "_jump_z", "_watched", "_high",
        "_calm", "_ended_at",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._past = RobustWindow(self.config.window)
        self._log = True  # whether all losses so far were positive
        self._kind: Optional[str] = None  # of the open verdict
        self._onset = 0
        self._jump_z = 0.0  # at the onset
        self._watched = 0  # losses since the onset
        self._high = 0  # of these, still high
        self._calm = 0  # in a row, not high
        self._ended_at = -self.config.recur_within - 1  # count of the window, at the last end

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        loss = event.loss
        if loss is None or loss - loss != 0.0:  # absent, NaN or Inf: not this detector's matter
            return ()
        config = self.config
        past = self._past
        if self._log:
            if loss > 0.0:
                x = math.log(loss)
            else:
                self._leave_log_domain()
                x = loss
        else:
            x = loss
        if past.count < config.min_history:
            past.push(x)
            return ()
        rise = x - past.median
        if self._kind is None:
            if rise <= 0.0 or not self._jumped(rise, x):
                past.push(x)
                return ()
            self._kind, self._onset = "transient", event.step
            self._jump_z = rise / self._scale()
            self._watched = self._high = self._calm = 0
            opened = self._verdict(event, loss, "warn", "opened")
            if past.count - self._ended_at <= config.recur_within:
                past.push(x)  # an oscillation is another detector's: let the scale learn it
            return (opened,)
        return self._follow(event, loss, rise)

    def _follow(self, event: StepEvent, loss: float, rise: float) -> Tuple[Verdict, ...]:
        """After the onset: confirm, resolve, or wait."""
        config = self.config
        high = rise >= config.high_z * self._scale() and (
            not self._log or rise >= math.log(config.high_ratio)
        )
        self._watched += 1
        self._high += high
        self._calm = 0 if high else self._calm + 1
        if self._kind == "transient":
            if self._high >= config.confirm_high:
                self._kind = "confirmed"
                return (self._verdict(event, loss, "critical", "escalated"),)
            if self._watched - self._high <= config.confirm_window - config.confirm_high:
                return ()
        elif self._watched >= config.adopt_after:
            self._past.clear()
        elif self._calm < config.calm_window:
            return ()
        resolved = self._verdict(event, loss, "ok", "resolved")
        self._kind = None
        self._ended_at = self._past.count
        return (resolved,)

    def _jumped(self, rise: float, x: float) -> bool:
        config, past = self.config, self._past
        if rise < config.jump_z * self._scale():
            return False
        if self._log:
            return rise >= math.log(config.jump_ratio)
        return x - past.high >= past.high - past.low > 0.0

    def _scale(self) -> float:
        past = self._past
        floor = (
            self.config.log_floor if self._log else self.config.raw_floor * (past.high - past.low)
        )
        return max(past.scale, floor)

    def _leave_log_domain(self) -> None:
        """The first loss that is not positive: logarithms end here, and the past starts anew."""
        self._log = False
        self._past.clear()

    def _verdict(self, event: StepEvent, loss: float, level: Level, state: VerdictState) -> Verdict:
        median = math.exp(self._past.median) if self._log else self._past.median
        kind = self._kind or "transient"
        what = {
            "opened": f"loss {loss:.4g} is {self._jump_z:.1f} sigma above its median {median:.4g}",
            "escalated": f"loss {loss:.4g} stays high: {self._high} of the {self._watched} losses "
            f"after step {self._onset}, median before it {median:.4g}",
            "resolved": f"loss {loss:.4g}, the jump of step {self._onset} is over",
        }[state]
        return verdict(
            self,
            event,
            kind=kind,
            level=level,
            state=state,
            onset_step=self._onset,
            score=self._jump_z,
            threshold=self.config.jump_z,
            evidence={
                "loss": loss,
                "median": median,
                "scale": self._scale(),
                "high": float(self._high),
                "watched": float(self._watched),
            },
            message=what,
        )

"""A gradient that explodes: with the loss it is an instability, alone only worth a warning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.detectors.local_evidence import in_layers, local_score
from plarv_processors.windows import RobustWindow
from plarv_schemas.events import LEVELS, LOCAL_CHECKS, Level, StepEvent, Verdict, VerdictState

__all__ = ["GradientExplosion"]

_FLOW = LOCAL_CHECKS.index("gradient_flow")
_CRITICAL = LEVELS.index("critical")


class GradientExplosion:
    """Fires when the gradient norm leaves its own recent past upwards.

    ``z = (log g - median) / max(scale, floor)`` over the last ``window`` gradients. ``z >= jump_z``
    and more than ``jump_ratio`` times the median opens *gradient_only* (warn): isolated jumps of
    7.8 -> 11140 at an unmoved loss are on record, and harmless. It becomes *sustained* (warn) when
    half of the gradients after it stay high, and *confirmed* (critical) when

    - the loss is at least ``proof_ratio`` times its median at the same time, or
    - the loss is high (``loss_z``, ``loss_ratio``) at ``confirm_high`` points with a high gradient,
      so that one bad batch, which lifts both for one step, confirms nothing, or
    - the local gradient check turned critical with it.

    A loss below ``solved_share`` of the run's first one supports nothing: there is nothing to lose.
    Together with a loss that proves it a jump of ``joint_z`` is enough: early gradients are widely
    spread. In the first ``min_history`` points only ``early_ratio`` with ``early_loss_ratio``
    counts.

    The gradient often leads the loss (BLOOM-176B: by four steps), so the warning stays open, and
    both windows frozen, for ``calm_window`` points. A norm of 0.0 was not computed, and an exact
    repeat is the stale value of a skipped step: neither is read. When the logging interval grows by
    more than ``gap_factor`` the past says nothing about the next point and starts anew.

    Cost: O(1) a step on average, 96 doubles. Source: ZClip's and AdaGC's norms against their own
    past; the confirmation is ours, from 74 public runs with gradients.

    >>> detector = GradientExplosion()
    >>> for step in range(60):
    ...     grad = 1.0 + 0.01 * (step % 7) if step < 50 else 5.0 ** (step - 48)
    ...     loss = 2.0 + 0.01 * (step % 5) if step < 54 else 9.0
    ...     event = StepEvent("r", "s", step, 0, step, loss=loss, grad_norm=grad)
    ...     for found in detector.update(event):
    ...         print(found.step, found.kind, found.level, found.state)
    50 gradient_only warn opened
    54 confirmed critical escalated
    """

    name: ClassVar[str] = "gradient_explosion"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: the replay over 99 public runs, 74 with gradients."""

        window: int = 64  # gradients
        loss_window: int = 32  # losses
        min_history: int = 20  # gradients before a jump alone may fire
        early_history: int = 5  # gradients before the early rule may fire; 5 runs died by step 11
        jump_z: float = 12.0  # robust standard deviations
        jump_ratio: float = 8.0  # times the median
        joint_z: float = (
            4.0  # instead of jump_z when the loss proves it; criteo's scale is 0.8 nats
        )
        early_ratio: float = (
            30.0  # times the median; healthy runs reach 7.9 in their first 20 points
        )
        early_loss_ratio: float = 10.0  # times the median loss, with early_ratio
        proof_ratio: float = 2.0  # times the median loss; the worst bad batch of 15 GPT runs: 1.5
        proof_z: float = 8.0  # and that many robust standard deviations
        loss_z: float = 3.0  # the loss is high
        solved_share: float = 0.01  # of the first loss; jumps below it (1e-8 -> 1e-6) prove nothing
        loss_ratio: float = 1.05  # and that many times its median
        confirm_high: int = 2  # points where gradient and loss are high
        high_z: float = 3.0  # the gradient is still high
        high_ratio: float = 2.0  # and that many times its median
        sustained_after: int = 20  # gradients after which half of them high is *sustained*
        calm_window: int = 10  # gradients in a row that are not high, to resolve
        adopt_after: int = 300  # gradients after which a level that stays is the new normal
        gap_factor: int = 8  # times the interval between two gradients
        log_floor: float = 0.10  # smallest scale of log(gradient), 10%
        loss_floor: float = 0.01  # smallest scale of log(loss), 1%
        raw_floor: float = 0.05  # smallest scale of a raw loss, as a share of the window's range

        def __post_init__(self) -> None:
            if not 8 <= self.min_history <= self.window:
                raise ValueError("min_history must be between 8 and window")
            if not 2 <= self.early_history <= self.loss_window:
                raise ValueError("early_history must be between 2 and loss_window")
            if not (self.jump_z >= self.joint_z >= self.high_z > 0):
                raise ValueError("a jump must ask for more than staying high: *_z")
            if not (self.early_ratio >= self.jump_ratio >= self.high_ratio > 1):
                raise ValueError("a jump must ask for more than staying high: *_ratio")
            if not 0 <= self.solved_share < 1:
                raise ValueError("solved_share must be in [0, 1)")
            if not (self.proof_ratio >= self.loss_ratio > 1 and self.proof_z >= self.loss_z > 0):
                raise ValueError("a proof must ask for more than a high loss: proof_* >= loss_*")
            if min(self.confirm_high, self.sustained_after, self.calm_window, self.gap_factor) < 1:
                raise ValueError(
                    "confirm_high, sustained_after, calm_window, gap_factor must be at least 1"
                )
            if not (self.early_loss_ratio > 1.0 and self.adopt_after >= 1):
                raise ValueError("early_loss_ratio must be above 1 and adopt_after at least 1")
            if not (self.log_floor > 0.0 and self.loss_floor > 0.0 and self.raw_floor > 0.0):
                raise ValueError("log_floor, loss_floor and raw_floor must be positive")

    _derived = ("_log_ratio",)
    __slots__ = (
        "config", "version", "_log_ratio", "_grads", "_losses", "_first", "_log", "_last", "_step",
        "_stride", "_gaps", "_flow", "_kind", "_onset", "_score", "_threshold", "_watched", "_high",
        "_calm", "_support",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._log_ratio = math.log(self.config.jump_ratio)
        self._grads = RobustWindow(self.config.window, refresh=16)
        self._losses = RobustWindow(self.config.loss_window, refresh=16)
        self._first = 0.0  # loss
        self._log = True  # whether all losses so far were positive
        self._last = 0.0  # gradient, to know a repeat
        self._step = 0  # of that gradient
        self._stride = 1  # usual distance of two gradients, steps
        self._gaps = 0  # far longer distances in a row
        self._flow = False  # whether the local check was critical before the onset
        self._kind: Optional[str] = None  # of the open verdict
        self._onset = 0
        self._score = 0.0  # at the onset: robust standard deviations, or times the median
        self._threshold = 0.0  # that it passed
        self._watched = 0  # gradients since the onset
        self._high = 0  # of these, still high
        self._calm = 0  # in a row, not high
        self._support = 0  # points where gradient and loss were high

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        if self._kind is not None:
            return self._follow(event)
        grad = event.grad_norm
        if grad is not None and grad > 0.0 and grad != self._last and grad - grad == 0.0:
            grads = self._grads
            x = math.log(grad)
            rise = x - grads.median
            step = event.step
            if step - self._step > self.config.gap_factor * self._stride:
                self._note_gap(step)
            elif rise >= self._log_ratio and self._jumped(event, rise):
                return self._open(event, grad, rise)
            else:
                self._gaps = 0
                if step > self._step:
                    self._stride = step - self._step
            self._last = grad
            self._step = step
            grads.push(x)
        loss = event.loss
        if loss is not None and loss - loss == 0.0:
            if self._log:
                if loss > 0.0:
                    if self._first == 0.0:
                        self._first = loss
                    self._losses.push(math.log(loss))
                    if event.local_levels is None:
                        return ()
                else:
                    self._leave_log_domain(loss)
            else:
                self._losses.push(loss)
        if event.local_levels is not None:
            self._flow = _flow_critical(event)
        return ()

    def _jumped(self, event: StepEvent, rise: float) -> bool:
        config, grads = self.config, self._grads
        if grads.count < config.min_history:
            return (
                grads.count >= config.early_history
                and rise >= math.log(config.early_ratio)
                and self._loss_proves(event.loss, config.early_loss_ratio)
            )
        z = rise / max(grads.scale, config.log_floor)
        return z >= config.jump_z or (z >= config.joint_z and self._loss_proves(event.loss))

    def _open(self, event: StepEvent, grad: float, rise: float) -> Tuple[Verdict, ...]:
        config = self.config
        early = self._grads.count < config.min_history
        if early:
            self._score, self._threshold = _exp(rise), config.early_ratio
        else:
            self._score = rise / max(self._grads.scale, config.log_floor)
            loud = self._score >= config.jump_z
            self._threshold = config.jump_z if loud else config.joint_z
        self._onset, self._last, self._step = event.step, grad, event.step
        self._watched = self._high = self._calm = 0
        self._support = int(self._loss_is_high(event.loss))
        proven = (
            early or self._loss_proves(event.loss) or (_flow_critical(event) and not self._flow)
        )
        self._kind = "confirmed" if proven else "gradient_only"
        return (self._verdict(event, "critical" if proven else "warn", "opened"),)

    def _follow(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """After the onset: confirm, resolve, or wait."""
        config = self.config
        if self._kind != "confirmed" and _flow_critical(event) and not self._flow:
            self._kind = "confirmed"
            return (self._verdict(event, "critical", "escalated"),)
        grad = event.grad_norm
        if grad is None or not grad > 0.0 or grad - grad != 0.0 or grad == self._last:
            return ()
        self._last, self._step = grad, event.step
        rise = math.log(grad) - self._grads.median
        scale = max(self._grads.scale, config.log_floor)
        high = rise >= config.high_z * scale and rise >= math.log(config.high_ratio)
        self._watched += 1
        self._high += high
        self._calm = 0 if high else self._calm + 1
        if high and self._loss_is_high(event.loss):
            self._support += 1
        if self._kind != "confirmed" and high:
            if self._support >= config.confirm_high or self._loss_proves(event.loss):
                self._kind = "confirmed"
                return (self._verdict(event, "critical", "escalated"),)
        if self._kind == "gradient_only" and self._watched >= config.sustained_after:
            if 2 * self._high >= self._watched:
                self._kind = "sustained"
                return (self._verdict(event, "warn", "escalated"),)
        return self._maybe_resolve(event)

    def _maybe_resolve(self, event: StepEvent) -> Tuple[Verdict, ...]:
        if self._watched >= self.config.adopt_after:
            self._grads.clear()
            self._losses.clear()
        elif self._calm < self.config.calm_window:
            return ()
        resolved = self._verdict(event, "ok", "resolved")
        self._kind = None
        return (resolved,)

    def _loss_rise(self, loss: Optional[float]) -> Tuple[float, float]:
        """How far the loss is above its median, and that in robust standard deviations."""
        losses = self._losses
        if loss is None or loss - loss != 0.0 or losses.count < self.config.early_history:
            return 0.0, 0.0
        if not self._log:
            rise = loss - losses.median
            floor = self.config.raw_floor * (losses.high - losses.low)
        elif loss > self.config.solved_share * self._first:
            rise = math.log(loss) - losses.median
            floor = self.config.loss_floor
        else:
            return 0.0, 0.0
        scale = max(losses.scale, floor)
        return rise, rise / scale if scale > 0.0 else 0.0

    def _loss_is_high(self, loss: Optional[float]) -> bool:
        rise, z = self._loss_rise(loss)
        if self._log:
            return z >= self.config.loss_z and rise >= math.log(self.config.loss_ratio)
        return z >= self.config.loss_z and rise >= self._losses.high - self._losses.median

    def _loss_proves(self, loss: Optional[float], alone_ratio: float = math.inf) -> bool:
        """Whether the loss alone shows an instability. One that is not positive has no ratio."""
        config = self.config
        rise, z = self._loss_rise(loss)
        if not self._log:
            return False
        clear = z >= config.proof_z and rise >= math.log(config.proof_ratio)
        return clear or rise >= math.log(alone_ratio)

    def _note_gap(self, step: int) -> None:
        """A far longer interval: once is a hole in the log, twice is a new logging interval."""
        self._gaps += 1
        if self._gaps > 1:
            self._grads.clear()
            self._losses.clear()
            self._stride = step - self._step
            self._gaps = 0

    def _leave_log_domain(self, loss: float) -> None:
        """The first loss that is not positive: logarithms end here, and the past starts anew."""
        self._log = False
        self._losses.clear()
        self._losses.push(loss)

    def _verdict(self, event: StepEvent, level: Level, state: VerdictState) -> Verdict:
        grads, losses = self._grads, self._losses
        grad, median = self._last, _exp(grads.median)
        evidence = {
            "grad_norm": grad,
            "median": median,
            "scale": max(grads.scale, self.config.log_floor),
            "high": float(self._high),
            "watched": float(self._watched),
            "support": float(self._support),
            "history": float(grads.count),
            "loss_z": self._loss_rise(event.loss)[1],
            "local_critical": float(_flow_critical(event)),
            **local_score(event, _FLOW),
        }
        loss_text = _agreement(event)
        if event.loss is not None and losses.count:
            loss_median = _exp(losses.median) if self._log else losses.median
            evidence.update(loss=event.loss, loss_median=loss_median)
            loss_text = f", loss {event.loss:.4g} (median {loss_median:.4g}){loss_text}"
        what = {
            "opened": f"gradient norm {grad:.4g} is {grad / median:.3g} times its median "
            f"{median:.4g}{loss_text}",
            "escalated": f"gradient norm {grad:.4g}, median before {median:.4g}, high at "
            f"{self._high} of {self._watched} points since step {self._onset}{loss_text}",
            "resolved": f"gradient norm {grad:.4g}, the explosion of step {self._onset} is over",
        }[state]
        return verdict(
            self,
            event,
            kind=self._kind or "gradient_only",
            level=level,
            state=state,
            onset_step=self._onset,
            score=self._score,
            threshold=self._threshold,
            evidence=evidence,
            message=what,
        )


def _exp(x: float) -> float:
    """exp(x), kept between the smallest and the largest normal double."""
    return math.exp(min(max(x, -708.0), 709.0))


def _agreement(event: StepEvent) -> str:
    return f"; the local gradient check agrees{in_layers(event)}" if _flow_critical(event) else ""


def _flow_critical(event: StepEvent) -> bool:
    levels = event.local_levels
    return levels is not None and len(levels) > _FLOW and levels[_FLOW] >= _CRITICAL

"""NaN and Inf, open or masked: a loss scaler's lone skip is normal, a lost loss is not."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import ClassVar, Dict, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_schemas.events import Level, StepEvent, Verdict, VerdictState

__all__ = ["NonFinite"]

_KINDS = (
    "", "overflow_ahead", "grad_non_finite", "scaler_collapse", "masked_non_finite",
    "loss_non_finite", "dead",
)  # fmt: skip
_OVERFLOW, _GRAD, _SCALER, _MASKED, _LOSS, _DEAD = range(1, 7)  # hardest last
# What is kept of a rank, by its place in an array of doubles.
_BUSY, _KIND, _ONSET, _CALM, _OPEN, _LOST, _LOST_AT, _SKIPS, _SKIPS_AT, _SINCE_SKIP = range(10)
_SCALE, _SETTLED, _ZEROS, _SEEN, _LOSS_MEAN, _LOSS_MAX, _GRAD_MEAN, _GRAD_DEV, _GRAD_MAX = range(
    10, 19
)
_WIDTH = 19


class NonFinite:
    """Fires on a loss or a gradient norm that is NaN or Inf, and shortly before.

    By kind, each hardening into a later one:

    - *overflow_ahead* (warn): loss and gradient norm run away together. ``log(grad_norm)`` is
      ``overflow_z`` deviations and ``overflow_rise`` times above its running mean while the loss is
      ``overflow_loss_rise`` times above its own; or, which needs no history, the two leave
      everything they ever were, by ``overflow_rise`` and ``overflow_max_rise`` times.
    - *grad_non_finite* (warn): non-finite gradient norms under a finite loss. A lone one is a loss
      scaler at work and is silence; two within ``sporadic_window`` events are told, or
      ``scaled_skips`` in a row when the loss scale is known.
    - *scaler_collapse* (critical): ``collapse_skips`` skipped steps in a row, or a loss scale that
      halves that often in a row or falls below 1. A falling scale is a skipped step even where the
      gradient norm was logged finite (it is then the one before, repeated). The first search for
      a scale, before any step was taken, may take ``start_skips``.
    - *masked_non_finite* (critical): loss exactly 0.0 and a non-finite gradient norm, twice in a
      row: a trainer's filter put 0.0 in the place of NaN. Silence for a run that logs 0.0 with
      finite gradients (GRPO does).
    - *loss_non_finite* (critical): the loss itself, at once.
    - *dead* (critical): ``dead_losses`` such losses in a row.

    Resolved after ``calm`` events without any of it. The running means take nothing meanwhile.

    Cost: O(1) a step, 19 doubles a rank. Source: the loss scalers of PyTorch, Megatron and
    DeepSpeed; Hugging Face's ``logging_nan_inf_filter``; BLOOM's and tr8b-104B's chronicles.

    >>> detector = NonFinite()
    >>> losses = [2.0, 1.9, float("nan"), float("nan"), float("inf"), float("nan")]
    >>> for step, loss in enumerate(losses):
    ...     for found in detector.update(StepEvent("run", "s", step, 0, step, loss=loss)):
    ...         print(found.step, found.kind, found.level, found.state)
    2 loss_non_finite critical opened
    4 dead critical escalated
    """

    name: ClassVar[str] = "non_finite"
    scope: ClassVar[Scope] = "rank"
    counts_non_finite: ClassVar[bool] = True
    """NaN and Inf are what it is about, so the law that they leave no trace is not for it."""

    @dataclass(frozen=True)
    class Config:
        """Defaults: no verdict on 54 healthy public runs, every NaN of 11 runs at its step."""

        dead_losses: int = 3  # in a row; one or two can be a bad batch, skipped by the trainer
        masked_losses: int = 2  # in a row, 0.0 with a non-finite gradient norm
        collapse_skips: int = 5  # steps in a row; tr8b-104B skipped five, then never recovered
        scaled_skips: int = (
            3  # in a row, to be told where the scale is known; DeepSpeed often does 2
        )
        start_skips: int = 40  # Megatron starts at 2**32 and may halve down to 1
        sporadic_window: int = (
            16  # events; apex skips one in 2,000, Time-MoE's faulty run two in 10
        )
        calm: int = 16  # events without a finding, to resolve
        adopt_after: int = 64  # events after which a level that stays high is the new normal
        min_history: int = 20  # events before deviations count
        memory: int = 32  # events, of the running means
        overflow_z: float = 12.0  # deviations of log(grad_norm)
        overflow_rise: float = 8.0  # times; benign spikes under a normal loss reach 1,500
        overflow_loss_rise: float = 2.0  # times the running mean
        overflow_max_rise: float = 10.0  # times the largest loss so far; 0 of 104 healthy runs
        deviation_floor: float = 0.1  # of log(grad_norm)

        def __post_init__(self) -> None:
            if not 1 <= self.masked_losses <= self.dead_losses:
                raise ValueError("masked_losses must be between 1 and dead_losses")
            if not 1 <= self.scaled_skips <= self.collapse_skips <= self.start_skips:
                raise ValueError("skips must rise: 1 <= scaled <= collapse <= start")
            if min(self.calm, self.sporadic_window, self.adopt_after) < 1:
                raise ValueError("calm, sporadic_window and adopt_after must be at least 1")
            if not 2 <= self.min_history or not 2 <= self.memory:
                raise ValueError("min_history and memory must be at least 2")
            rises = (self.overflow_rise, self.overflow_loss_rise, self.overflow_max_rise)
            if not all(rise > 1.0 for rise in rises):
                raise ValueError("a rise must be more than 1 time")
            if not (self.overflow_z > 0.0 and self.deviation_floor > 0.0):
                raise ValueError("overflow_z and deviation_floor must be positive")

    __slots__ = ("config", "version", "_ranks", "_loss_rise", "_grad_rise", "_max_rise")
    _derived = ("_loss_rise", "_grad_rise", "_max_rise")  # from the config, so in no snapshot

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._ranks: Dict[int, array[float]] = {}
        self._loss_rise = math.log(self.config.overflow_loss_rise)
        self._grad_rise = math.log(self.config.overflow_rise)
        self._max_rise = math.log(self.config.overflow_max_rise)

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        loss, grad, scale = event.loss, event.grad_norm, event.loss_scale
        state = self._ranks.get(event.rank)
        if state is None:
            if loss is None and grad is None:
                return ()
            state = self._ranks[event.rank] = _fresh()
        if loss is not None and loss - loss != 0.0:
            return self._lost(event, state, _LOSS)
        if grad is not None and grad - grad != 0.0:
            return self._skipped(event, state)
        if scale is not None and scale != state[_SCALE] and scale - scale == 0.0:
            if scale < state[_SCALE]:
                return self._skipped(event, state)
            state[_SCALE] = scale
        if state[_BUSY]:
            self._recover(state, loss, grad)
        if loss is not None and grad is not None:
            if loss > 0.0 and grad > 0.0:
                return self._watch(event, state, math.log(loss), math.log(grad))
            if loss == 0.0:
                state[_ZEROS] = 1.0
        elif loss is None and grad is None:
            return ()
        return self._rest(event, state) if state[_KIND] else ()

    def _recover(self, state: array[float], loss: Optional[float], grad: Optional[float]) -> None:
        """What a finite event ends; on the healthy path there is none of it to look at."""
        if loss is not None:
            state[_LOST] = 0.0
        if grad is not None:
            state[_SETTLED] = 1.0
        elif loss is None:
            return
        state[_SKIPS] = 0.0
        state[_SINCE_SKIP] += 1.0
        calm = state[_SINCE_SKIP] > self.config.sporadic_window and not state[_LOST]
        if calm and state[_SETTLED] and not state[_KIND]:
            state[_BUSY] = 0.0

    def _lost(self, event: StepEvent, state: array[float], kind: int) -> Tuple[Verdict, ...]:
        """A loss that is not there: NaN, Inf, or 0.0 in its place."""
        config, scale = self.config, event.loss_scale
        if scale is not None and scale - scale == 0.0:
            state[_SCALE] = scale
        state[_BUSY] = 1.0
        if state[_LOST] == 0.0:
            state[_LOST_AT] = event.step
        state[_LOST] += 1.0
        lost = state[_LOST]
        limit = config.masked_losses if kind == _MASKED else 1
        if lost < limit:
            return ()
        if lost >= config.dead_losses:
            kind, limit = _DEAD, config.dead_losses
        return self._found(event, state, kind, state[_LOST_AT], lost, limit)

    def _skipped(self, event: StepEvent, state: array[float]) -> Tuple[Verdict, ...]:
        """A step that the loss scaler skipped, or that a scaler would have skipped."""
        config = self.config
        loss, grad, scale, before = event.loss, event.grad_norm, event.loss_scale, state[_SCALE]
        skipped = state[_BUSY] = 1.0
        if scale is not None and scale - scale == 0.0:
            if 0.0 < scale < before:  # a sparse log shows several halvings at once
                skipped = max(1.0, float(round(math.log2(before) - math.log2(scale))))
            state[_SCALE] = scale
        if loss is not None:
            if loss == 0.0 and grad is not None and grad - grad != 0.0 and not state[_ZEROS]:
                found = self._lost(event, state, _MASKED)
                if found or state[_KIND] >= _MASKED:
                    return found
            else:
                state[_LOST] = 0.0
        if state[_SKIPS] == 0.0:
            state[_SKIPS_AT] = event.step
        state[_SKIPS] += skipped
        skips, since = state[_SKIPS], state[_SINCE_SKIP]
        state[_SINCE_SKIP] = 0.0
        state[_CALM] = 0.0
        if scale is not None and scale < 1.0 <= before:
            return self._found(
                event, state, _SCALER, state[_SKIPS_AT], before / max(scale, 1e-300), 1
            )
        if not state[_SETTLED]:
            kind, limit = _GRAD, config.start_skips
        elif skips >= config.collapse_skips:
            kind, limit = _SCALER, config.collapse_skips
        elif scale is None and since <= config.sporadic_window:
            kind, limit = _GRAD, 1
        else:
            kind, limit = _GRAD, config.scaled_skips
        if skips < limit:
            return ()
        return self._found(event, state, kind, state[_SKIPS_AT], skips, limit)

    def _watch(
        self, event: StepEvent, state: array[float], loss: float, grad: float
    ) -> Tuple[Verdict, ...]:
        """Looks for a runaway in the logarithms of loss and gradient norm, or learns from them."""
        config, seen = self.config, state[_SEEN]
        rise = grad - state[_GRAD_MEAN]
        high = loss - state[_LOSS_MEAN] >= self._loss_rise and seen >= 2.0
        if high and rise >= self._grad_rise:
            sigmas = rise / max(state[_GRAD_DEV], config.deviation_floor)
            if (seen >= config.min_history and sigmas >= config.overflow_z) or (
                loss - state[_LOSS_MAX] >= self._max_rise
                and grad - state[_GRAD_MAX] >= self._grad_rise
            ):
                times = math.exp(min(rise, 709.0))
                return self._found(event, state, _OVERFLOW, event.step, times, config.overflow_rise)
        if state[_BUSY] and state[_KIND]:
            if high and state[_KIND] == _OVERFLOW:
                state[_CALM] = -1.0  # its rest adds one
            return self._rest(event, state)
        _learn(state, loss, grad, rise, config.memory, config.deviation_floor)
        return ()

    def _found(
        self,
        event: StepEvent,
        state: array[float],
        kind: int,
        onset: float,
        score: float,
        threshold: float,
    ) -> Tuple[Verdict, ...]:
        """Opens or hardens the verdict; what is no harder than the open one says nothing."""
        before = state[_KIND]
        state[_CALM] = 0.0
        if kind <= before:
            return ()
        state[_KIND] = kind
        if not before:
            state[_ONSET], state[_OPEN], state[_BUSY] = onset, 0.0, 1.0
        level: Level = "critical" if kind >= _SCALER else "warn"
        return (
            self._verdict(
                event, state, level, "escalated" if before else "opened", score, threshold
            ),
        )

    def _rest(self, event: StepEvent, state: array[float]) -> Tuple[Verdict, ...]:
        """An event without a finding while a verdict is open."""
        config = self.config
        state[_CALM] += 1.0
        state[_OPEN] += 1.0
        adopted = state[_KIND] == _OVERFLOW and state[_OPEN] >= config.adopt_after
        if state[_CALM] < config.calm and not adopted:
            return ()
        resolved = self._verdict(event, state, "ok", "resolved", state[_CALM], config.calm)
        state[_KIND] = 0.0
        if adopted:
            state[_SEEN] = 0.0
        return (resolved,)

    def _verdict(
        self,
        event: StepEvent,
        state: array[float],
        level: Level,
        verdict_state: VerdictState,
        score: float,
        threshold: float,
    ) -> Verdict:
        kind, onset = int(state[_KIND]), int(state[_ONSET])
        evidence = {
            "lost_in_a_row": state[_LOST],
            "skipped_in_a_row": state[_SKIPS],
            "calm": state[_CALM],
        }
        if kind == _OVERFLOW and state[_SEEN]:
            evidence["usual_loss"] = math.exp(state[_LOSS_MEAN])
            evidence["usual_grad_norm"] = math.exp(state[_GRAD_MEAN])
            evidence["grad_deviation"] = max(state[_GRAD_DEV], self.config.deviation_floor)
            evidence["largest_loss"] = math.exp(state[_LOSS_MAX])
            evidence["largest_grad_norm"] = math.exp(state[_GRAD_MAX])
        for column in ("loss", "grad_norm", "loss_scale"):
            value = getattr(event, column)
            if value is not None:
                evidence[column] = value
        if verdict_state == "resolved":
            calm = f"{state[_CALM]:.0f} events"
            message = f"finite and calm for {calm} after {_KINDS[kind]} at step {onset}"
        else:
            message = _message(kind, event, state)
        return verdict(
            self,
            event,
            kind=_KINDS[kind],
            level=level,
            state=verdict_state,
            onset_step=onset,
            score=score,
            threshold=float(threshold),
            evidence=evidence,
            message=message,
            rank=event.rank,
        )


def _fresh() -> array[float]:
    state = array("d", bytes(8 * _WIDTH))
    state[_SINCE_SKIP] = math.inf
    state[_BUSY] = 1.0
    return state


def _learn(
    state: array[float], loss: float, grad: float, rise: float, memory: int, floor: float
) -> None:
    """Takes the logarithms of one healthy step into the running means and maxima."""
    seen = state[_SEEN] + 1.0
    state[_SEEN] = seen
    if seen == 1.0:
        state[_LOSS_MEAN] = state[_LOSS_MAX] = loss
        state[_GRAD_MEAN] = state[_GRAD_MAX] = grad
        state[_GRAD_DEV] = 0.0
        return
    weight = 1.0 / seen if seen < memory else 1.0 / memory
    deviation = state[_GRAD_DEV]
    if seen > 8.0:  # an outlier counts as four deviations
        limit = 4.0 * (deviation if deviation > floor else floor)
        rise = limit if rise > limit else (-limit if rise < -limit else rise)
    state[_GRAD_MEAN] += weight * rise
    state[_GRAD_DEV] = deviation + weight * (1.2533 * abs(rise) - deviation)
    state[_LOSS_MEAN] += weight * (loss - state[_LOSS_MEAN])
    if loss > state[_LOSS_MAX]:
        state[_LOSS_MAX] = loss
    if grad > state[_GRAD_MAX]:
        state[_GRAD_MAX] = grad


def _message(kind: int, event: StepEvent, state: array[float]) -> str:
    """What was found, in one sentence."""
    loss, grad, skips = event.loss, event.grad_norm, f"{state[_SKIPS]:.0f}"
    where = f"on rank {event.rank}"
    if kind == _OVERFLOW:
        usual = math.exp(state[_LOSS_MEAN]), math.exp(state[_GRAD_MEAN])
        return (
            f"loss {loss:.4g} and grad_norm {grad:.4g} {where} run away from their usual "
            f"{usual[0]:.4g} and {usual[1]:.4g}: an overflow is likely next"
        )
    scale = "" if event.loss_scale is None else f", loss scale {event.loss_scale:g}"
    if kind == _GRAD and grad is not None and grad - grad != 0.0:
        return f"grad_norm is {grad} {where} under a finite loss, {skips} in a row now{scale}"
    if kind == _GRAD:
        return f"{skips} steps in a row were skipped {where}{scale}"
    if kind == _SCALER:
        return f"{skips} steps in a row were skipped {where}{scale}: the weights stand still"
    if kind == _MASKED:
        times = f"{state[_LOST]:.0f} times in a row"
        return f"loss 0.0 with grad_norm {grad} {where}, {times}: it stands for a NaN"
    if kind == _LOSS:
        return f"loss is {loss} {where}"
    return f"loss is not finite {where}, {state[_LOST]:.0f} times in a row: the run is dead"

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
_KIND, _ONSET, _CALM, _OPEN, _LOST, _LOST_AT, _SKIPS, _SKIPS_AT, _SINCE_SKIP, _SCALE, _SETTLED, _ZEROS = range(12)  # fmt: skip
_SEEN, _LOSS_MEAN, _LOSS_MAX, _GRAD_MEAN, _GRAD_DEV, _GRAD_MAX = range(12, 18)
_WIDTH = 18


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

    Cost: O(1) a step, 18 doubles a rank. Source: the loss scalers of PyTorch, Megatron and
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

    @dataclass(frozen=True)
    class Config:
        """Defaults: no verdict on 54 healthy public runs, every NaN of 11 runs at its step."""

        dead_losses: int = 3  # in a row; one or two can be a bad batch, skipped by the trainer
        masked_losses: int = 2  # in a row, 0.0 with a non-finite gradient norm
        collapse_skips: int = 5  # steps in a row; tr8b-104B skipped five, then never recovered
        scaled_skips: int = 3  # in a row, to be told where the scale is known; DeepSpeed often does 2
        start_skips: int = 40  # Megatron starts at 2**32 and may halve down to 1
        sporadic_window: int = 16  # events; apex skips one in 2,000, Time-MoE's faulty run two in 10
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
            if not min(self.overflow_rise, self.overflow_loss_rise, self.overflow_max_rise) > 1.0:
                raise ValueError("a rise must be more than 1 time")
            if not (self.overflow_z > 0.0 and self.deviation_floor > 0.0):
                raise ValueError("overflow_z and deviation_floor must be positive")

    __slots__ = ("config", "version", "_ranks")

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._ranks: Dict[int, "array[float]"] = {}

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        loss, grad, scale = event.loss, event.grad_norm, event.loss_scale
        state = self._ranks.get(event.rank)
        if state is None:
            state = self._ranks[event.rank] = array("d", bytes(8 * _WIDTH))
        if loss is not None and loss - loss != 0.0:
            return self._lost(event, state, _LOSS)
        if (grad is not None and grad - grad != 0.0) or (
            scale is not None and scale < state[_SCALE]
        ):
            return self._skipped(event, state, loss, grad, scale)
        if grad is None:
            if loss is None:
                return ()
        else:
            state[_SETTLED] = 1.0
        if scale is not None:
            state[_SCALE] = scale
            state[_SETTLED] = 1.0
        if state[_SKIPS]:
            state[_SKIPS] = 0.0
        state[_SINCE_SKIP] += 1.0
        if loss is not None:
            state[_LOST] = 0.0
            if grad is not None and grad > 0.0:
                if loss > 0.0:
                    return self._watch(event, state, loss, grad)
                if loss == 0.0:
                    state[_ZEROS] = 1.0
        return self._settle(event, state) if state[_KIND] else ()

    def _lost(self, event: StepEvent, state: "array[float]", kind: int) -> Tuple[Verdict, ...]:
        """A loss that is not there: NaN, Inf, or 0.0 in its place."""
        if state[_LOST] == 0.0:
            state[_LOST_AT] = event.step
        state[_LOST] += 1.0
        if kind == _MASKED and state[_LOST] < self.config.masked_losses:
            return ()
        if state[_LOST] >= self.config.dead_losses:
            kind = _DEAD
        return self._found(event, state, kind, int(state[_LOST_AT]))

    def _skipped(
        self,
        event: StepEvent,
        state: "array[float]",
        loss: Optional[float],
        grad: Optional[float],
        scale: Optional[float],
    ) -> Tuple[Verdict, ...]:
        """A step that a loss scaler skipped, or would have."""
        config = self.config
        before = state[_SCALE]
        halvings = 1.0
        if scale is not None and scale - scale == 0.0:
            if 0.0 < scale < before:
                halvings = max(1.0, float(round(math.log2(before / scale))))
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
        sporadic = scale is None and 0.0 < state[_SINCE_SKIP] <= config.sporadic_window
        first = state[_SKIPS] == 0.0 and not state[_OPEN]
        state[_SKIPS] += halvings
        skips = state[_SKIPS]
        kind = 0
        if scale is not None and scale < 1.0 <= before:
            kind = _SCALER
        elif not state[_SETTLED]:
            kind = _GRAD if skips >= config.start_skips else 0
        elif skips >= config.collapse_skips:
            kind = _SCALER
        elif skips >= config.scaled_skips or (sporadic and not first) or state[_KIND]:
            kind = _GRAD
        state[_SINCE_SKIP] = 0.0
        if not kind:
            return ()
        return self._found(event, state, kind, int(state[_SKIPS_AT]))

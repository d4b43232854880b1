"""Validation that worsens while training improves: the run memorises what it should generalise."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import ClassVar, List, Optional, Sequence, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.windows import kendall_s, kendall_thresholds, median
from plarv_schemas.events import Level, StepEvent, Verdict, VerdictState

__all__ = ["GeneralizationGap"]

_FADE = 0.99  # of a swing's size an evaluation: the noise of the first ones is not that of the last


class GeneralizationGap:
    """Fires when the validation loss rises, evaluation by evaluation, and the training loss falls.

    Over the evaluations after the best one, the last ``window`` at most: Mann-Kendall (exact,
    one-sided) says that val_loss rises, ``p < val_p``, and that the mean training loss between the
    evaluations falls, ``p < train_p``. The best one itself is left out, since it was chosen for
    being low. The rise must be worth a word, too: ``min_rise`` of the best, ``min_swing`` times the
    largest rise that came and went before, and as Theil-Sen slope x evaluations ``noise_z`` times
    the noise from one evaluation to the next. That opens *overfitting* (warn); ``critical_rise``
    above the best after ``critical_evaluations`` makes it critical. It resolves when validation is
    back within half of ``min_rise`` of the best, which stays as it is meanwhile.

    An evaluation counts only with training losses since the one before it, so a run without
    training losses is no matter of this detector. Noise that is independent from evaluation to
    evaluation is silent; validation that drifts up for eight evaluations and down again is told
    apart only later.

    Cost: an addition a step, 6 us an evaluation that is worse than the best; 2 x 16 doubles.
    Source: Mann-Kendall in place of SageMaker's and AutoTrainer's fixed ratios of the two losses.

    >>> detector = GeneralizationGap()
    >>> for step in range(40):
    ...     event = StepEvent("run", "s", step, 0, step, loss=2.0 - 0.04 * step)
    ...     if step % 2:
    ...         event = event._replace(val_loss=2.1 - 0.05 * step + 0.0024 * step * step)
    ...     for found in detector.update(event):
    ...         print(found.step, found.kind, found.level, found.state)
    21 overfitting warn opened
    27 overfitting critical escalated
    """

    name: ClassVar[str] = "generalization_gap"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: silent on 60 simulated runs of 200 evaluations (3% noise) and in public."""

        window: int = 16  # evaluations
        min_evaluations: int = 5  # after the best: the fewest with which p < 0.01 can be had
        val_p: float = 0.01  # that a rise this steady comes of noise
        train_p: float = 0.05
        noise_z: float = 5.0  # standard deviations of the noise between evaluations
        min_rise: float = 0.03  # of the best validation loss
        min_swing: float = 1.5  # times the largest rise that came and went
        critical_rise: float = 0.20  # of the best validation loss
        critical_evaluations: int = 8  # after the best

        def __post_init__(self) -> None:
            if not 4 <= self.min_evaluations <= self.critical_evaluations <= self.window <= 64:
                raise ValueError("4 <= min_evaluations <= critical_evaluations <= window <= 64")
            if not (0.0 < self.val_p < 0.5 and 0.0 < self.train_p < 0.5):
                raise ValueError("val_p and train_p must lie in (0, 0.5)")
            if not (0.0 < self.min_rise <= self.critical_rise and self.noise_z >= 0.0):
                raise ValueError("0 < min_rise <= critical_rise, noise_z >= 0")
            if not self.min_swing >= 0.0:
                raise ValueError("min_swing must not be negative")

    __slots__ = (
        "config", "version", "_vals", "_trains", "_total", "_count", "_best", "_best_step",
        "_after", "_level", "_onset", "_highest", "_swing", "_rising", "_falling",
    )  # fmt: skip
    _derived: ClassVar[Tuple[str, ...]] = ("_rising", "_falling")

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._vals = array("d")  # of the last evaluations, oldest first
        self._trains = array("d")  # mean training loss before each of these
        self._total = 0.0  # of the training losses since the last evaluation
        self._count = 0
        self._best: Optional[float] = None  # validation loss
        self._best_step = 0
        self._after = 0  # evaluations since the best
        self._highest = 0.0  # validation loss of the present rise above the best
        self._swing = 0.0  # the largest such rise that came and went
        self._level: Level = "ok"
        self._onset = 0  # step of the best evaluation when the verdict opened
        self._rising = kendall_thresholds(self.config.window, self.config.val_p)
        self._falling = kendall_thresholds(self.config.window, self.config.train_p)

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        loss = event.loss
        if loss is not None and loss - loss == 0.0:
            self._total += loss
            self._count += 1
        val = event.val_loss
        if val is None or val - val != 0.0 or not self._count:
            return ()
        train = self._total / self._count
        self._total, self._count = 0.0, 0
        if train - train != 0.0:  # the sum went beyond a double
            return ()
        vals, trains = self._vals, self._trains
        if len(vals) >= self.config.window:
            del vals[0], trains[0]
        vals.append(val)
        trains.append(train)
        best = self._best
        if best is None:
            best = self._highest = val
        self._watch_swing(val, best)
        if val < best or self._best is None:
            self._best, self._best_step, self._after = val, event.step, 0
            return self._resolve(event, val) if self._level != "ok" else ()
        self._after += 1
        return self._judge(event, val, best)

    def _watch_swing(self, val: float, best: float) -> None:
        """Remembers the largest rise above the best that came and went: the run's own noise."""
        swing = self._highest - best
        self._swing *= _FADE
        if val - best > swing:
            self._highest = val
        elif val - best < 0.5 * swing:
            self._highest = val
            self._swing = max(self._swing, swing)

    def _judge(self, event: StepEvent, val: float, best: float) -> Tuple[Verdict, ...]:
        config = self.config
        rise = val - best
        needed = min(config.min_swing * self._swing, config.critical_rise * abs(best))
        if rise < max(config.min_rise * abs(best), needed):
            if self._level != "ok" and rise <= 0.5 * config.min_rise * abs(best):
                return self._resolve(event, val)
            return ()
        if self._level == "critical":
            return ()
        count = min(self._after, len(self._vals))
        far = rise >= config.critical_rise * abs(best) and count >= config.critical_evaluations
        if count < config.min_evaluations or (self._level == "warn" and not far):
            return ()
        vals, trains = self._vals, self._trains
        first = len(vals) - count
        if val <= vals[first] or (self._level == "ok" and trains[-1] >= trains[first]):
            return ()  # what the tests below would find, at once
        s = kendall_s(vals[first:])
        if s < self._rising[count]:
            return ()
        if self._level == "ok" and not (
            -kendall_s(trains[first:]) >= self._falling[count]
            and self._rise_to_noise(vals[first:]) >= config.noise_z
        ):
            return ()
        state: VerdictState = "escalated"
        if self._level == "ok":
            state, self._onset = "opened", self._best_step
        self._level = "critical" if far else "warn"
        return (self._verdict(event, state, val, rise, s, count),)

    def _rise_to_noise(self, vals: Sequence[float]) -> float:
        """What the evaluations rose by in all, in standard deviations of a single one."""
        count = len(vals)
        slopes = sorted(
            (vals[later] - vals[earlier]) / (later - earlier)
            for earlier in range(count)
            for later in range(earlier + 1, count)
        )
        known = self._vals
        steps = [known[at] - known[at - 1] for at in range(1, len(known))]
        centre = median(sorted(steps))
        noise = 1.4826 * median(sorted(abs(step - centre) for step in steps)) / 2.0**0.5
        rise = median(slopes) * (count - 1)
        return rise / noise if noise > 0.0 else (float("inf") if rise > 0.0 else 0.0)

    def _resolve(self, event: StepEvent, val: float) -> Tuple[Verdict, ...]:
        self._level = "ok"
        best = self._best if self._best is not None else val
        self._after = 0  # the evaluations up to here have been judged
        return (self._verdict(event, "resolved", val, val - best, 0, 0),)

    def _verdict(
        self, event: StepEvent, state: VerdictState, val: float, rise: float, s: int, count: int
    ) -> Verdict:
        best = self._best if self._best is not None else val
        trains: List[float] = self._trains[-max(count, 1) :].tolist()
        share = rise / abs(best) if best != 0.0 else 0.0
        if state == "resolved":
            message = (
                f"val_loss {val:.4g} is back at its best, {best:.4g} of step {self._best_step}"
            )
        else:
            message = (
                f"val_loss rose in {count} evaluations to {val:.4g}, {share:.1%} above its best "
                f"{best:.4g} of step {self._best_step}, while the training loss fell from "
                f"{trains[0]:.4g} to {trains[-1]:.4g}"
            )
        return verdict(
            self,
            event,
            kind="overfitting",
            level=self._level,
            state=state,
            onset_step=self._onset,
            score=share,
            threshold=self.config.critical_rise
            if self._level == "critical"
            else self.config.min_rise,
            evidence={
                "val_loss": val,
                "best_val_loss": best,
                "best_step": float(self._best_step),
                "kendall_s": float(s),
                "kendall_threshold": float(self._rising[count]),
                "evaluations": float(count),
                "train_loss_first": trains[0],
                "train_loss_last": trains[-1],
            },
            message=message,
        )

"""A loss that swings up and down from step to step, or ever further: past the edge of stability."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import ClassVar, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.windows import median
from plarv_schemas.events import Level, StepEvent, Verdict, VerdictState

__all__ = ["LossOscillation"]


class LossOscillation:
    """Fires when the loss alternates, or when its swings grow while it gains nothing.

    log(loss) is read in blocks of ``block``. Of each block are kept its mean, its swing (the mean
    step between neighbours, its trend taken out) and its autocorrelation at lag 1. The swing of
    several blocks is their (lower) median, so that one jump, a spike or a restart, moves none. No
    swing below ``swing_floor`` counts.

    - *period_two* (warn): the autocorrelation is ``alternating`` or less on average over ``recent``
      blocks, or ``weakly_alternating`` over twice as many, and the swing is ``onset_ratio`` times
      the calmest it was: what alternates from its first steps on (two data sets in turn) does so
      by design.
    - *growing* (warn): the swing of the ``recent`` blocks is ``growth`` times that of up to
      ``history`` before, and their mean loss is not lower.
    - Either becomes *growing* (critical) when the swing reaches ``runaway`` times that of the
      ``recent`` blocks from the opening on, still without gain.

    Resolved when nothing alternates and the swing is back within ``calm_ratio`` of what it was, or
    after ``adopt_blocks``: then it is the new normal. A loss of exactly 0 is passed over; one below
    0 is no loss to minimise, and from there on there is silence.

    Cost: O(1) a step on average, 64 doubles. Source: the edge of stability (Cohen et al. 2021):
    being there is normal, so only a change counts.

    >>> detector = LossOscillation()
    >>> for step in range(800):
    ...     swing = 0.2 * (-1) ** step if step >= 400 else 0.01 * (step % 3)
    ...     for found in detector.update(StepEvent("run", "s", step, 0, step, loss=2.0 + swing)):
    ...         print(found.step, found.kind, found.level, found.state)
    447 period_two warn opened
    """

    name: ClassVar[str] = "loss_oscillation"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: silent on 54 healthy public runs of every cadence."""

        block: int = 16  # losses
        warmup: int = 32  # losses passed over: the first descent is no swing
        recent: int = 4  # blocks that are judged, 64 losses
        history: int = 16  # blocks before them, 256 losses
        alternating: float = -0.7  # autocorrelation over recent blocks; healthy runs reach -0.52
        weakly_alternating: float = -0.5  # over twice as many; healthy runs reach -0.38
        swing_floor: float = 0.01  # of the loss; full-batch descent hovers below it at the edge
        onset_ratio: float = 1.5  # times the calmest swing
        growth: float = 2.25  # times the swing before; without gain, healthy runs reach 1.95
        runaway: float = 2.0  # times the swing of the opening
        calm_ratio: float = 1.25  # times the swing before
        adopt_blocks: int = 64  # blocks, 1,024 losses

        def __post_init__(self) -> None:
            if self.block < 8 or self.recent < 2 or self.history < self.recent or self.warmup < 0:
                raise ValueError("8 <= block, 2 <= recent <= history and 0 <= warmup")
            if not -1.0 <= self.alternating <= self.weakly_alternating < 0.0:
                raise ValueError("-1 <= alternating <= weakly_alternating < 0")
            ratios = (self.onset_ratio, self.growth, self.runaway, self.calm_ratio)
            if not all(ratio > 1.0 for ratio in ratios):
                raise ValueError("ratios must be more than 1")
            if not self.swing_floor >= 0.0 or self.adopt_blocks < 1:
                raise ValueError("swing_floor must not be negative, adopt_blocks at least 1")

    __slots__ = (
        "config", "version", "_off", "_passed", "_block", "_means", "_swings", "_lags",
        "_calmest", "_kind", "_level", "_onset", "_open", "_before", "_mean_before", "_at_opening",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._off = False  # whether the loss was seen below zero
        self._passed = 0  # losses of the warm-up
        self._block = array("d")  # log(loss) in the unfinished block
        self._means = array("d")  # of the blocks, oldest first
        self._swings = array("d")
        self._lags = array("d")  # autocorrelations at lag 1
        self._calmest = math.inf  # lowest median swing of the recent blocks
        self._kind: Optional[str] = None  # of the open verdict
        self._level: Level = "ok"
        self._onset = 0
        self._open = 0  # blocks since the opening
        self._before = 0.0  # swing before it
        self._mean_before = 0.0  # log(loss) before it
        self._at_opening = 0.0  # swing at it

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        loss = event.loss
        if loss is None or loss - loss != 0.0 or self._off:
            return ()
        if loss <= 0.0:
            return self._switch_off(event) if loss < 0.0 else ()
        if self._passed < self.config.warmup:
            self._passed += 1
            return ()
        block = self._block
        block.append(math.log(loss))
        if len(block) < self.config.block:
            return ()
        return self._finish_block(event)

    def _finish_block(self, event: StepEvent) -> Tuple[Verdict, ...]:
        config = self.config
        mean, swing, lag = _measure(self._block)
        del self._block[:]
        for kept, value, most in (
            (self._means, mean, config.recent + config.history),
            (self._swings, swing, config.recent + config.history),
            (self._lags, lag, 2 * config.recent),
        ):
            kept.append(value)
            if len(kept) > most:
                kept.pop(0)
        swings, recent = self._swings, config.recent
        if len(swings) < 2 * recent:
            return ()
        now = sorted(swings[-recent:])[(recent - 1) // 2]  # one jump lifts one block
        if self._kind is not None:
            return self._follow(event, now)
        self._before = median(sorted(swings[:-recent]))
        self._mean_before = _average(self._means[:-recent])
        self._calmest = min(self._calmest, self._before)
        if now < config.swing_floor:
            return ()
        if now >= config.onset_ratio * self._calmest and self._alternates():
            return self._found(event, "period_two", now)
        if now >= config.growth * self._before and not self._gains():
            return self._found(event, "growing", now)
        return ()

    def _alternates(self) -> bool:
        config, lags = self.config, self._lags
        return (
            _average(lags[-config.recent :]) <= config.alternating
            or _average(lags) <= config.weakly_alternating
        )

    def _gains(self) -> bool:
        return _average(self._means[-self.config.recent :]) < self._mean_before

    def _found(self, event: StepEvent, kind: str, now: float) -> Tuple[Verdict, ...]:
        self._kind, self._level, self._onset = kind, "warn", event.step
        self._open, self._at_opening = 0, now
        return (self._verdict(event, now, "opened"),)

    def _follow(self, event: StepEvent, now: float) -> Tuple[Verdict, ...]:
        """A block after the opening: worse, calm again, or the new normal."""
        config = self.config
        self._open += 1
        if self._open < config.recent:  # until all recent blocks are later than the change
            self._at_opening = max(self._at_opening, now)
        elif (
            self._level == "warn" and now >= config.runaway * self._at_opening and not self._gains()
        ):
            self._kind, self._level = "growing", "critical"
            return (self._verdict(event, now, "escalated"),)
        usual = now <= config.calm_ratio * self._before or self._open >= config.adopt_blocks
        if not usual or self._alternates():
            return ()
        resolved = self._verdict(event, now, "resolved")
        self._close()
        return (resolved,)

    def _close(self) -> None:
        self._kind, self._level = None, "ok"
        self._calmest = math.inf
        for kept in (self._means, self._swings, self._lags):
            del kept[: -self.config.recent]

    def _switch_off(self, event: StepEvent) -> Tuple[Verdict, ...]:
        self._off = True
        if self._kind is None:
            return ()
        resolved = self._verdict(event, self._before, "resolved")
        self._close()
        return (resolved,)

    def _verdict(self, event: StepEvent, now: float, state: VerdictState) -> Verdict:
        kind, lag = self._kind or "growing", _average(self._lags)
        mean = _average(self._means[-self.config.recent :])
        swings = f"loss swings by {now:.2%} from step to step, {self._before:.2%} before"
        if state == "resolved":
            what = f"{swings} step {self._onset}"
        elif kind == "period_two":
            what = (
                f"loss alternates by {now:.2%} from step to step (autocorrelation {lag:.2f}): the "
                "learning rate is past the edge of stability"
            )
        else:
            level, level_before = (math.exp(min(x, 709.0)) for x in (mean, self._mean_before))
            what = f"{swings}, and gains nothing: {level:.4g} against {level_before:.4g}"
        growing = kind == "growing"
        return verdict(
            self,
            event,
            kind=kind,
            level="ok" if state == "resolved" else self._level,
            state=state,
            onset_step=self._onset,
            score=now / max(self._before, 1e-12) if growing else -lag,
            threshold=self.config.growth if growing else -self.config.weakly_alternating,
            evidence={
                "swing": now,
                "swing_before": self._before,
                "swing_at_opening": self._at_opening,
                "swing_calmest": self._calmest if self._calmest < math.inf else now,
                "autocorrelation": lag,
                "log_loss": mean,
                "log_loss_before": self._mean_before,
            },
            message=what,
        )


def _measure(block: array[float]) -> Tuple[float, float, float]:
    """Mean, mean step between neighbours about their trend, and autocorrelation at lag 1."""
    size = len(block)
    total = 0.0
    for x in block:
        total += x
    mean = total / size
    trend = (block[-1] - block[0]) / (size - 1)
    swing = variance = covariance = 0.0
    last = block[0]
    before = last - mean
    for x in block:
        residual = x - mean
        variance += residual * residual
        covariance += residual * before
        swing += abs(x - last - trend)
        last, before = x, residual
    # The first loss has no neighbour: it was compared with itself.
    first = block[0] - mean
    covariance -= first * first
    swing = (swing - abs(trend)) / (size - 1)
    return mean, swing, covariance / variance if variance > 0.0 else 0.0


def _average(values: array[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else 0.0

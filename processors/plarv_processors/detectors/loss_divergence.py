"""A loss that leaves its best level for good."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.windows import RobustWindow
from plarv_schemas.events import Level, StepEvent, Verdict, VerdictState

__all__ = ["LossDivergence"]


class LossDivergence:
    """Fires when the loss goes up from the best level it had and stays there.

    x is log(loss), best the lowest median of ``window`` accepted x, noise the mean step between
    two of them. A loss is *up* when x is above ``best + max(rise, noise_factor x noise)``, *far up*
    with ``far_rise`` in place of ``rise``. The median of the last ``last`` is up when half of these
    are, and that is how it is counted; where a share of the losses is up at any time (the two
    peaks of a mix-up loss), half of the rest is asked for on top.

    - *rising* (warn): the median of the last ``last`` is up, or of the last ``far_last`` far up.
    - *diverged* (critical): the first holds for ``last_points`` losses, or the second for
      ``far_points``, or ``huge_points`` in a row are ``huge_rise`` up; and there was a level to
      leave. There was, if the loss had come down to it by ``rise``, stayed for ``stay_points`` and
      left within ``abrupt_points`` (by ``descent``, and it may leave slowly), or if it stood there
      from the start for ``settled_points`` and left within ``abrupt_points``. What grows from its
      first steps on (a flow's balance loss, an adversary's) is only ever *rising*.

    Resolved when none of the last ``last`` is up and ``calm_points`` in a row were not. Nothing up
    is ever learnt from, and nothing at all while a verdict is open. A loss of exactly 0 is passed
    over; one below 0 is no loss to minimise but a policy-gradient surrogate, and from there on
    there is silence.

    Cost: O(1) a step, 11 doubles. Source: the best-median rule of the replay over public runs, its
    medians of 20 counted instead of sorted, and faster where the rise is larger.

    >>> detector = LossDivergence()
    >>> losses = [1.0 + 3.0 * 0.9**step for step in range(60)] + [1.0 + 0.1 * k for k in range(40)]
    >>> for step, loss in enumerate(losses):
    ...     for found in detector.update(StepEvent("run", "s", step, 0, step, loss=loss)):
    ...         print(found.step, found.kind, found.level, found.state)
    72 rising warn opened
    77 diverged critical escalated
    """

    name: ClassVar[str] = "loss_divergence"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: silent on 54 healthy public runs; critical in 19 of 21 that rose for long."""

        window: int = 11  # losses, of the median whose lowest value is the best level
        rise: float = 0.35  # of log(loss), 42%: up
        last: int = 20  # losses; up when half of them are
        last_points: int = 10  # losses in a row for which that holds
        far_rise: float = 0.50  # of log(loss), 65%: far up
        far_last: int = 11  # losses; far up when half of them are
        far_points: int = 6  # losses in a row for which that holds
        huge_rise: float = 2.3  # of log(loss), ten times
        huge_points: int = 3  # losses in a row; a batch's spike is over by then
        noise_factor: float = 3.0  # a two-peaked mix-up loss (ViT) swings by 0.4 around its level
        noise_memory: int = 32  # losses
        usual_memory: int = 128  # losses, of the share that is up without any fault
        usual_share: float = 0.1  # from which on it counts; a divergence begins below it
        negligible: float = 0.01  # of the first level: what a loss near zero may rise by
        stay_points: int = 8  # losses at the best level, once it came down to it
        descent: float = 0.7  # of log(loss), half: came down far, so that it may also leave slowly
        settled_points: int = 64  # losses at the best level, if it never came down
        abrupt_points: int = 24  # losses from the first that was up, to have left abruptly
        calm_points: int = 20  # losses

        def __post_init__(self) -> None:
            if not (3 <= self.window and 2 <= self.far_last <= self.last <= 64):
                raise ValueError("window must be at least 3 and 2 <= far_last <= last <= 64")
            if not 0.0 < self.rise <= self.far_rise <= self.huge_rise:
                raise ValueError("rises must be positive and not fall from rise to huge_rise")
            points = (self.last_points, self.far_points, self.huge_points, self.calm_points)
            if min(*points, self.stay_points, self.settled_points, self.abrupt_points) < 1:
                raise ValueError("numbers of points must be at least 1")
            if not (self.noise_factor >= 0.0 and self.negligible >= 0.0 and self.descent >= 0.0):
                raise ValueError("noise_factor, negligible and descent must not be negative")
            if not 0.0 <= self.usual_share <= 1.0:
                raise ValueError("usual_share must be a share")
            if self.noise_memory < 2 or self.usual_memory < 2:
                raise ValueError("memories must be at least 2")

    __slots__ = (
        "config", "version", "_past", "_off", "_first", "_best", "_noise", "_before",
        "_limit", "_far_limit", "_huge_limit", "_stay", "_stay_best", "_share", "_up", "_far_up",
        "_held", "_far_held", "_huge", "_calm", "_kind", "_onset", "_since",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._past = RobustWindow(self.config.window, refresh=4)
        self._off = False  # whether the loss was seen below zero
        self._first = 0.0  # log of the first loss
        self._best = math.inf  # of log(loss), as all that follow
        self._noise = 0.0  # mean step between two accepted losses
        self._before = 0.0  # the last accepted loss
        self._limit = math.inf  # up is above it
        self._far_limit = math.inf
        self._huge_limit = math.inf
        self._stay = 0  # losses accepted at the best level
        self._stay_best = math.inf  # that level
        self._share = 0.0  # of losses that are up where no verdict is open
        self._up = 0  # bits, the newest lowest: which of the last losses were up
        self._far_up = 0
        self._held = 0  # losses in a row
        self._far_held = 0
        self._huge = 0
        self._calm = 0
        self._kind: Optional[str] = None  # of the open verdict
        self._onset = 0
        self._since = 0  # losses

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        loss = event.loss
        if loss is None or loss - loss != 0.0 or self._off:
            return ()
        if loss <= 0.0:
            return self._switch_off(event, loss) if loss < 0.0 else ()
        x = math.log(loss)
        if self._kind is None:
            if x < self._limit:
                self._learn(x)
                if not self._up:
                    return ()
        elif x < self._limit and not self._up:
            return self._rest(event, loss)
        return self._follow(event, loss, x)

    def _learn(self, x: float) -> None:
        """Takes a loss that is not up into the best level and the noise."""
        config, past = self.config, self._past
        past.push(x)
        count = past.count
        if count == 1:
            self._first = x
        else:
            step = abs(x - self._before)
            weight = 1.0 / count if count < config.noise_memory else 1.0 / config.noise_memory
            self._noise += weight * (step - self._noise)
        self._before = x
        self._stay += 1
        if self._share:
            self._share = (
                self._share * (1.0 - 1.0 / config.usual_memory) if self._share > 1e-3 else 0.0
            )
        if count >= config.window and count % 4 == 0:
            self._set_limits()

    def _set_limits(self) -> None:
        config = self.config
        best = min(self._best, self._past.median)
        self._best = best
        if best < self._stay_best - config.rise:
            self._stay_best, self._stay = best, 0
        noise = config.noise_factor * self._noise
        # Near zero the logarithm makes much of little: a rise must count beside the first level.
        least = math.log1p(math.exp(min(self._first - best, 700.0)) * config.negligible)
        self._limit = best + max(config.rise, noise, least)
        self._far_limit = best + max(config.far_rise, noise * config.far_rise / config.rise, least)
        self._huge_limit = best + max(config.huge_rise, 2.0 * noise, least)

    def _follow(self, event: StepEvent, loss: float, x: float) -> Tuple[Verdict, ...]:
        """A loss that is up, or one after such a loss."""
        config = self.config
        up = x >= self._limit
        if up and not self._up and self._kind is None:
            self._onset, self._since = event.step, 0
        self._since += 1
        usual = self._share
        if up and self._kind is None:
            self._share = usual + (1.0 - usual) / config.usual_memory
        half = 0.5 + 0.5 * usual if usual >= config.usual_share else 0.5
        self._up = (self._up << 1 | up) & ((1 << config.last) - 1)
        self._far_up = (self._far_up << 1 | (x >= self._far_limit)) & ((1 << config.far_last) - 1)
        self._held = self._held + 1 if bin(self._up).count("1") >= half * config.last else 0
        far = bin(self._far_up).count("1") > half * config.far_last
        self._far_held = self._far_held + 1 if far else 0
        self._huge = self._huge + 1 if x >= self._huge_limit else 0
        self._calm = 0 if up else self._calm + 1
        if self._kind == "diverged":
            return self._rest(event, loss) if not up else ()
        sure = (
            self._held >= config.last_points
            or self._far_held >= config.far_points
            or self._huge >= config.huge_points
        )
        if sure and self._left_a_level():
            before, self._kind = self._kind, "diverged"
            return (self._verdict(event, loss, "critical", "escalated" if before else "opened"),)
        if self._kind is None and (self._held or self._far_held or sure):
            self._kind = "rising"
            return (self._verdict(event, loss, "warn", "opened"),)
        return self._rest(event, loss) if self._kind and not up else ()

    def _left_a_level(self) -> bool:
        """Whether there was a level to leave: see the class."""
        config = self.config
        abrupt = self._since <= config.abrupt_points
        descent = self._first - self._best
        if descent >= max(config.rise, config.noise_factor * self._noise):
            return self._stay >= config.stay_points and (abrupt or descent >= config.descent)
        return self._stay >= config.settled_points and abrupt

    def _rest(self, event: StepEvent, loss: float) -> Tuple[Verdict, ...]:
        """A loss that is not up while a verdict is open."""
        if not self._up:
            self._calm += 1
        if self._calm < self.config.calm_points:
            return ()
        return (self._resolve(event, loss),)

    def _resolve(self, event: StepEvent, loss: float) -> Verdict:
        resolved = self._verdict(event, loss, "ok", "resolved")
        self._kind = None
        self._up = self._far_up = self._held = self._far_held = self._huge = 0
        return resolved

    def _switch_off(self, event: StepEvent, loss: float) -> Tuple[Verdict, ...]:
        self._off = True
        return () if self._kind is None else (self._resolve(event, loss),)

    def _verdict(self, event: StepEvent, loss: float, level: Level, state: VerdictState) -> Verdict:
        best = math.exp(min(self._best, 709.0))
        rise = math.log(loss) - self._best if loss > 0.0 else 0.0
        kind = self._kind or "rising"
        since = f"since step {self._onset}"
        what = {
            "rising": f"loss {loss:.4g} rises from its best level {best:.4g} {since}",
            "diverged": f"loss {loss:.4g} left its best level {best:.4g} {since} and stays above",
        }[kind]
        if self._off:
            what = f"loss {loss:.4g} is below zero: it is no longer judged"
        elif state == "resolved":
            what = f"loss {loss:.4g} is back near its best level {best:.4g}"
        return verdict(
            self,
            event,
            kind=kind,
            level=level,
            state=state,
            onset_step=self._onset,
            score=rise,
            threshold=self._limit - self._best,
            evidence={
                "loss": loss,
                "best": best,
                "noise": self._noise,
                "up_of_last": float(bin(self._up).count("1")),
                "held": float(self._held),
                "far_up_of_last": float(bin(self._far_up).count("1")),
                "far_held": float(self._far_held),
                "huge_in_a_row": float(self._huge),
                "stay": float(self._stay),
            },
            message=what,
        )

"""What a run of the demo is to do, and what it leaves behind."""

from __future__ import annotations

import math
import statistics
from typing import List, NamedTuple, Sequence

__all__ = ["Curve", "Plan", "typical_loss"]


class Plan(NamedTuple):
    """A run that goes well, and a fault that it cannot survive by itself."""

    steps: int = 700
    injury_step: int = 280  # from here on the schedule is multiplied
    injury_factor: float = 60.0
    learning_rate: float = 8e-4
    warmup_steps: int = 50
    batch: int = 16  # texts a step
    context: int = 32  # characters a text
    width: int = 96
    seed: int = 7
    time_limit_s: float = 35.0  # a slow machine does fewer steps after the injury

    def rate(self, step: int) -> float:
        """What the schedule asks for: a warm-up, then level, then the injury."""
        healthy = self.learning_rate * min(1.0, (step + 1) / self.warmup_steps)
        return healthy * self.injury_factor if step >= self.injury_step else healthy

    @property
    def least_steps(self) -> int:
        """Made however slow the machine is."""
        return min(self.steps, self.injury_step + 160)


class Curve(NamedTuple):
    """What a run left: one loss and one learning rate a step."""

    losses: List[float]
    rates: List[float]  # as the optimizer used them
    parameters: int
    seconds: float
    writes: str  # what the network writes afterwards
    stopped: str  # why it was stopped, or ""

    @property
    def final_loss(self) -> float:
        """The median of the last 20 losses; NaN where one of them is not a number."""
        return typical_loss(self.losses)


def typical_loss(losses: Sequence[float], last: int = 20) -> float:
    """The median of the last losses; NaN where one of them is not a number, or there is none.

    >>> typical_loss([9.0] * 50 + [2.0] * 20)
    2.0
    """
    ending = losses[-last:]
    if not ending or any(math.isnan(loss) for loss in ending):
        return math.nan
    return statistics.median(ending)

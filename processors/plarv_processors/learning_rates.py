"""The learning rates of the last steps: whether one that rose is the cause, and what to lower it
to.
"""

from __future__ import annotations

from array import array
from typing import Any, Dict, Optional, Tuple

__all__ = ["LearningRates"]

_KEPT = 64


class LearningRates:
    """The last 64 learning rates of a run.

    >>> rates = LearningRates()
    >>> for step in range(100):
    ...     rates.observe(0.06 if step >= 90 else 0.001)
    >>> rates.lowered(factor=0.5, jump=2.0, held=8)
    ({'lr': 0.001}, 'the learning rate had risen 60-fold, from 0.001 to 0.06: set it back to 0.001')
    """

    __slots__ = ("_rates", "_next")

    def __init__(self) -> None:
        self._rates = array("d")
        self._next = 0

    def observe(self, rate: Optional[float]) -> None:
        """Takes in the rate of one step; None and non-finite ones are passed over."""
        if rate is None or rate - rate != 0.0:
            return
        if len(self._rates) < _KEPT:
            self._rates.append(rate)
            return
        at = self._next
        self._rates[at] = rate
        self._next = at + 1 if at + 1 < _KEPT else 0

    def now(self) -> Optional[float]:
        """The newest one."""
        return self._rates[self._next - 1] if self._rates else None

    def before(self, jump: float, held: int) -> Optional[float]:
        """The rate before the newest rise by ``jump`` from one step to the next; None without one.

        It must have been held for ``held`` steps (give or take ``jump``), so that the first steps
        of a warm-up, each a multiple of the last, are no jump.
        """
        rates = self._rates
        ordered = rates[self._next :] + rates[: self._next]
        for at in range(len(ordered) - 1, held, -1):
            earlier = ordered[at - 1]
            if earlier > 0.0 and ordered[at] >= jump * earlier:
                past = ordered[at - 1 - held : at - 1]
                return earlier if min(past) * jump >= earlier >= max(past) / jump else None
        return None

    def jumped(self, jump: float, held: int) -> bool:
        """Whether the newest is at least ``jump`` times what it was before it rose."""
        now, before = self.now(), self.before(jump, held)
        return now is not None and before is not None and now >= jump * before

    def lowered(self, factor: float, jump: float, held: int) -> Tuple[Dict[str, Any], str]:
        """The parameters of a SET_LR, and why it is that rate: back to what it was where it had
        jumped, else ``factor`` of what it is.
        """
        now, before = self.now(), self.before(jump, held)
        if now is None or not now > 0.0:
            return {"factor": factor}, f"lower the learning rate to {factor:g} of what it is"
        if before is not None and now >= jump * before:
            return {"lr": before}, (
                f"the learning rate had risen {now / before:.3g}-fold, from {before:.4g} to "
                f"{now:.4g}: set it back to {before:.4g}"
            )
        return {"lr": now * factor}, f"lower the learning rate from {now:.4g} to {now * factor:.4g}"

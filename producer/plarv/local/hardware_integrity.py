"""Weights that nobody changed, and that changed."""

from __future__ import annotations

from collections import deque
from typing import Deque, Dict, List, Sequence

from plarv.local.findings import Finding, Findings
from plarv.local.report import CheckResult

__all__ = ["HardwareIntegrity"]

_LEARNING = 6  # comparisons, up to two a step, in which edits are only noted
_RECENT = 8
_WIDESPREAD = 0.5


class _Edits:
    """When a layer was changed between steps."""

    __slots__ = ("recent", "steps")

    def __init__(self) -> None:
        self.recent: Deque[bool] = deque(maxlen=_RECENT)
        self.steps: Deque[int] = deque(maxlen=4)

    def is_usual(self, step: int) -> bool:
        """Whether code edits it on most steps, or every so many steps."""
        if self.recent and 2 * sum(self.recent) >= len(self.recent):
            return True
        places = [*self.steps, step]
        gaps = {after - before for before, after in zip(places, places[1:])}
        return len(places) >= 4 and len(gaps) == 1


class HardwareIntegrity:
    """Fires where the checksum of weights changed between two steps of the optimizer.

    Exact: one flipped bit is enough. Silent where code is seen to do it: on most of the last eight
    steps, every so many steps, or to more than half of the weights at once through torch itself (a
    checkpoint that is loaded). The score is the number of tensors of the layer that changed.
    """

    key = "hardware_integrity"

    def __init__(self) -> None:
        self._findings = Findings()
        self._edits: Dict[str, _Edits] = {}
        self._compared = 0

    def take(self, step: int, layers: Sequence[str], changed: List[float], by_code: int) -> None:
        """One comparison; ``by_code``: tensors of these that torch knows to have been written."""
        self._compared += 1
        all_at_once = len(changed) >= 3 and by_code > _WIDESPREAD * len(changed)
        hit: Dict[str, int] = {}
        for layer, flag in zip(layers, changed):
            hit[layer] = hit.get(layer, 0) + (1 if flag else 0)
        for layer, count in hit.items():
            edits = self._edits.setdefault(layer, _Edits())
            if count:
                usual = edits.is_usual(step) or self._compared <= _LEARNING or all_at_once
                if not usual:
                    self._findings.add(layer, _finding(step, count))
                edits.steps.append(step)
            edits.recent.append(count > 0)

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        return self._findings.result(step, 1.0)


def _finding(step: int, count: int) -> Finding:
    what = "tensor" if count == 1 else "tensors"
    return Finding(
        step, "critical", float(count), f"{count} {what} changed between two optimizer steps"
    )

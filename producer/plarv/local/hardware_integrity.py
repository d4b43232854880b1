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
_ONE_BIT = 1.0
_MANY = 3.0  # what says that more than one element changed
_WRITES = 64  # comparisons, of which two with a write show that code writes here


class _Edits:
    """When a layer was changed between steps."""

    __slots__ = ("recent", "steps", "writes")

    def __init__(self) -> None:
        self.recent: Deque[bool] = deque(maxlen=_RECENT)
        self.steps: Deque[int] = deque(maxlen=4)
        self.writes: Deque[bool] = deque(maxlen=_WRITES)

    def is_usual(self, step: int) -> bool:
        """Whether code edits it on most steps, or every so many steps."""
        if self.recent and 2 * sum(self.recent) >= len(self.recent):
            return True
        places = [*self.steps, step]
        gaps = {after - before for before, after in zip(places, places[1:])}
        return len(places) >= 4 and len(gaps) == 1


class HardwareIntegrity:
    """Fires where the checksum of weights changed between two steps of the optimizer.

    Exact: one flipped bit is enough. Code that edits weights is no fault, and torch knows of a
    tensor whether it was written or replaced, which no flipped bit does. So a change of more than a
    bit is code's in a written tensor, where several elements changed or code wrote to the layer
    before; any change is, where most of the weights changed at once (a checkpoint that is loaded
    through ``.data``), or the layer does so on most steps or every so many. The score is the number
    of tensors of the layer that changed.
    """

    key = "hardware_integrity"

    def __init__(self) -> None:
        self._findings = Findings()
        self._edits: Dict[str, _Edits] = {}
        self._compared = 0

    def take(
        self, step: int, layers: Sequence[str], changed: List[float], written: Sequence[bool]
    ) -> None:
        """One comparison of tensors.

        ``changed``: 0 for a tensor that is what it was, 1 where a single bit changed, 2 where a
        single element did, 3 for more; ``written``: what torch knows to be written or replaced.
        """
        self._compared += 1
        many = sum(1 for change in changed if change >= _MANY)
        all_at_once = len(changed) >= 3 and many > _WIDESPREAD * len(changed)
        code_works = any(write and change >= _MANY for write, change in zip(written, changed))
        hit: Dict[str, int] = dict.fromkeys(layers, 0)
        wrote = {layer for layer, write in zip(layers, written) if write}
        for layer, change, write in zip(layers, changed, written):
            is_codes = write and change > _ONE_BIT and (code_works or self._is_written(layer))
            if change and not is_codes and not (all_at_once and change >= _MANY):
                hit[layer] += 1
        for layer, count in hit.items():
            edits = self._edits.setdefault(layer, _Edits())
            if count:
                if not edits.is_usual(step) and self._compared > _LEARNING:
                    self._findings.add(layer, _finding(step, count))
                edits.steps.append(step)
            edits.recent.append(count > 0)
            edits.writes.append(layer in wrote)

    def result(self, step: int) -> CheckResult:
        """What is known at ``step``."""
        return self._findings.result(step, 1.0)

    def _is_written(self, layer: str) -> bool:
        edits = self._edits.get(layer)
        return edits is not None and sum(edits.writes) >= 2


def _finding(step: int, count: int) -> Finding:
    what = "tensor" if count == 1 else "tensors"
    return Finding(
        step, "critical", float(count), f"{count} {what} changed between two optimizer steps"
    )

"""Exact findings: what was seen once is enough, and stays on show for a few steps."""

from __future__ import annotations

from typing import Dict, NamedTuple, Tuple

from plarv.local.report import CheckResult
from plarv_schemas.events import LEVELS, Level

__all__ = ["Finding", "Findings"]

_SHOWN_STEPS = 5
_MAX_SCORE = 1e9


class Finding(NamedTuple):
    """What was found at a layer; ``score`` in the check's unit."""

    step: int
    level: Level
    score: float
    message: str


class Findings:
    """The latest finding of each layer.

    >>> findings = Findings()
    >>> findings.add("fc1", Finding(4, "critical", 1.0, "changed by nobody"))
    >>> findings.result(4, 1.0).layers, findings.result(20, 1.0).level
    (('fc1',), 'ok')
    """

    def __init__(self) -> None:
        self._found: Dict[str, Finding] = {}

    def add(self, layer: str, finding: Finding) -> None:
        """Replaces what was known of the layer, unless that is of the same step and worse."""
        known = self._found.get(layer)
        if known is None or _order(known) <= _order(finding) or known.step < finding.step:
            self._found[layer] = finding

    def result(self, step: int, threshold: float) -> CheckResult:
        """All that is still on show, worst first."""
        self._found = {
            layer: found for layer, found in self._found.items() if step - found.step < _SHOWN_STEPS
        }
        if not self._found:
            return CheckResult(threshold=threshold)
        ordered = sorted(self._found.items(), key=lambda each: _order(each[1]), reverse=True)
        worst = ordered[0][1]
        layers = tuple(layer for layer, _ in ordered if layer)
        score = min(worst.score, _MAX_SCORE)
        return CheckResult(worst.level, score, threshold, layers, worst.message)


def _order(finding: Finding) -> Tuple[int, float]:
    return LEVELS.index(finding.level), finding.score

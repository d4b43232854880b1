"""What the ten checks found at one step."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Tuple

from plarv_schemas.events import LEVELS, Level

__all__ = ["CheckResult", "LocalReport", "Scale", "Trend", "scale_of"]

Trend = str
Scale = str

# the largest fraction of the layers at which a fault is still called so
_SCALES: Tuple[Tuple[float, Scale], ...] = (
    (0.0, "none"),
    (0.1, "isolated"),
    (0.3, "moderate"),
    (0.6, "widespread"),
)
_MAX_LAYERS = 16


class CheckResult(NamedTuple):
    """One check: ``level`` is at least warn where ``score`` has reached ``threshold``.

    The unit of the two is the check's own and stands in ``message``. A check that could not look
    is ok with a score of 0, and its message says why.
    """

    level: Level = "ok"
    score: float = 0.0
    threshold: float = 0.0
    layers: Tuple[str, ...] = ()
    message: str = ""


class LocalReport(NamedTuple):
    """The report of one step; always safe to ignore.

    >>> ill = CheckResult("warn", 0.9, 0.54, ("net.2",), "90% of the neurons are dead")
    >>> report = LocalReport(7, {"activation_sparsity": ill}, num_layers=10)
    >>> report.worst_level, report.scale, report.top_affected_layers
    ('warn', 'isolated', ['net.2'])
    """

    step: int
    checks: Dict[str, CheckResult]
    num_layers: int = 0
    trend: Trend = "stable"
    notes: Tuple[str, ...] = ()

    @property
    def worst_level(self) -> Level:
        """The highest level of the ten."""
        return LEVELS[max((LEVELS.index(each.level) for each in self.checks.values()), default=0)]

    @property
    def any_warn(self) -> bool:
        """Whether a check warns or worse."""
        return self.worst_level != "ok"

    @property
    def any_critical(self) -> bool:
        """Whether a check is critical."""
        return self.worst_level == "critical"

    @property
    def top_affected_layers(self) -> List[str]:
        """Layers with a fault, worst first, at most 16."""
        return self._affected()[:_MAX_LAYERS]

    @property
    def affected_fraction(self) -> float:
        """Layers with a fault by all layers, 0 to 1. A loss spike is no layer's."""
        return min(1.0, len(self._affected()) / self.num_layers) if self.num_layers else 0.0

    @property
    def scale(self) -> Scale:
        """How much of the model is affected."""
        return scale_of(self.affected_fraction)

    def summary(self) -> str:
        """A few lines to read: the step, then a line a check that is not ok, then what was unseen.

        >>> LocalReport(3, {}).summary()
        'step 3: ok'
        """
        head = f"step {self.step}: {self.worst_level}"
        if self.any_warn:
            head += f", {self.trend}, {self.scale}"
        lines = [head]
        for key, check in self.checks.items():
            if check.level != "ok":
                where = f" [{', '.join(check.layers[:4])}]" if check.layers else ""
                lines.append(f"  {check.level} {key}: {check.message}{where}")
        lines.extend(f"  not seen: {note}" for note in self.notes)
        return "\n".join(lines)

    def to_dict(self) -> Dict[str, Any]:
        """All of it as JSON takes it."""
        return {
            "step": self.step,
            "worst_level": self.worst_level,
            "trend": self.trend,
            "scale": self.scale,
            "affected_fraction": self.affected_fraction,
            "top_affected_layers": self.top_affected_layers,
            "any_warn": self.any_warn,
            "any_critical": self.any_critical,
            "notes": list(self.notes),
            "checks": {
                key: {**check._asdict(), "layers": list(check.layers)}
                for key, check in self.checks.items()
            },
        }

    def _affected(self) -> List[str]:
        ill = [check for check in self.checks.values() if check.level != "ok"]
        ill.sort(key=lambda check: -LEVELS.index(check.level))
        return list(dict.fromkeys(layer for check in ill for layer in check.layers))


def scale_of(fraction: float) -> Scale:
    """The word for a fraction of the layers.

    >>> scale_of(0.05), scale_of(0.9)
    ('isolated', 'systemic')
    """
    return next((word for limit, word in _SCALES if fraction <= limit), "systemic")

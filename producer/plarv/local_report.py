"""A local report as columns: one level and one score a check, and the worst layers."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence

from plarv_schemas.events import LEVELS, LOCAL_CHECKS

__all__ = ["local_columns", "report_dict"]

_MAX_LAYERS = 8


def report_dict(report: Any) -> Mapping[str, Any]:
    """A report as a dict, or the ``to_dict()`` that was given. TypeError where it is no report."""
    to_dict = getattr(report, "to_dict", None)
    return _mapping(to_dict() if callable(to_dict) else report)


def local_columns(data: Mapping[str, Any]) -> Dict[str, Any]:
    """``local_levels``, ``local_scores``, ``local_layers`` of a report's ``to_dict()``.

    A check that the report does not have is ok with a score of NaN. TypeError where it is no
    report.
    """
    checks = _mapping(data.get("checks"))
    levels: List[int] = []
    scores: List[float] = []
    for name in LOCAL_CHECKS:
        check = _mapping(checks.get(name, {}))
        level = check.get("level", "ok")
        levels.append(LEVELS.index(level) if level in LEVELS else 0)
        score = check.get("score")
        scores.append(float(score) if isinstance(score, (int, float)) else float("nan"))
    layers: Sequence[object] = data.get("top_affected_layers") or ()
    return {
        "local_levels": tuple(levels),
        "local_scores": tuple(scores),
        "local_layers": tuple(str(layer) for layer in list(layers)[:_MAX_LAYERS]),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    if not hasattr(value, "get"):
        raise TypeError("local_report must be a LocalDetector's report or its to_dict()")
    found: Mapping[str, Any] = value
    return found

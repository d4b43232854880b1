"""What each finding asks for, and the harm it stands for."""

from __future__ import annotations

from typing import Mapping, Tuple

from plarv_schemas.events import ActionKind, Verdict

__all__ = ["LADDER", "RESPONSES", "harm_of", "is_undone_by_rollback", "response_to"]

LADDER: Tuple[ActionKind, ...] = (
    "WARN",
    "CHECKPOINT",
    "SET_LR",
    "RESET_OPTIMIZER",
    "ROLLBACK",
    "PAUSE",
    "HALT",
)
"""From mild to grave. Below it all is CONTINUE, which is no action."""

RESPONSES: Mapping[Tuple[str, str], Tuple[ActionKind, float]] = {
    ("non_finite", "loss_non_finite"): ("WARN", 1.5),
    ("non_finite", "dead"): ("PAUSE", 3.0),
    ("non_finite", "masked_non_finite"): ("PAUSE", 3.0),
    ("non_finite", "scaler_collapse"): ("PAUSE", 2.5),
    ("loss_spike", "confirmed"): ("SET_LR", 1.5),
    ("loss_divergence", "diverged"): ("SET_LR", 2.0),
    ("loss_oscillation", "growing"): ("SET_LR", 1.5),
    ("gradient_explosion", "confirmed"): ("SET_LR", 1.5),
    ("gradient_collapse", "vanished"): ("PAUSE", 2.5),
    ("optimizer_corruption", "confirmed"): ("RESET_OPTIMIZER", 2.0),
    ("optimizer_corruption", "poisoned_moments"): ("RESET_OPTIMIZER", 1.5),
    ("fleet_skew", "replica_disagreement"): ("PAUSE", 2.5),
    ("fleet_skew", "hardware"): ("PAUSE", 2.5),
}
"""(detector, kind) of a critical verdict -> (action, harm from 0 to 3).

Only confirmed or exact evidence is listed above CHECKPOINT. What is not listed asks for WARN (warn)
or CHECKPOINT (critical), so a detector of the user's own can never stop a run."""

_OF_THE_MACHINE = frozenset({"fleet_skew"})  # the old state would be corrupted by it anew

_HARM = {"warn": 0.5, "critical": 1.0}


def response_to(found: Verdict) -> Tuple[ActionKind, float]:
    """What ``found`` asks for, and its harm."""
    known = RESPONSES.get((found.detector, found.kind))
    if known is not None and found.level == "critical":
        return known
    return ("CHECKPOINT" if found.level == "critical" else "WARN"), _HARM.get(found.level, 0.0)


def harm_of(found: Verdict) -> float:
    """Its harm alone."""
    return response_to(found)[1]


def is_undone_by_rollback(found: Verdict) -> bool:
    """Whether going back to a checkpoint from before its onset leaves the fault behind."""
    return found.detector not in _OF_THE_MACHINE

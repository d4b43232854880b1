"""What ``step()`` returns: the newest decision that the engine has reached."""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Tuple

from plarv_schemas.events import Action, Verdict

__all__ = ["CONTINUE", "Decision"]


class Decision(NamedTuple):
    """The state of the run as the engine sees it, at ``step``.

    The engine reads the journal a moment after the loop wrote it, so ``step`` may be a little older
    than the step that returns it; None: it has not folded a step yet.

    >>> CONTINUE.action, CONTINUE.ok, CONTINUE.harm_pressure
    ('CONTINUE', True, 0.0)
    """

    step: Optional[int] = None
    action: str = "CONTINUE"  # the gravest thing asked for now, or CONTINUE
    harm_pressure: float = 0.0  # 0 to 3
    verdicts: Tuple[Verdict, ...] = ()  # open ones
    reason: str = ""  # of the newest action
    attempt: int = 0
    newest_action: Optional[Action] = None

    @property
    def ok(self) -> bool:
        """Whether nothing is open."""
        return self.action == "CONTINUE"

    def to_dict(self) -> Dict[str, Any]:
        """JSON values only."""
        return {
            "step": self.step,
            "action": self.action,
            "harm_pressure": self.harm_pressure,
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "reason": self.reason,
            "attempt": self.attempt,
            "newest_action": self.newest_action.to_dict() if self.newest_action else None,
        }


CONTINUE = Decision()
"""Nothing is known against the run."""

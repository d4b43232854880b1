"""Finds the GradScaler of a mixed-precision run, so that gradients can be reported unscaled."""

from __future__ import annotations

import weakref
from types import FrameType
from typing import Any, Optional

__all__ = ["LossScalerSearch"]

_MAX_FRAMES = 10
_MAX_LOOKS = 8


class LossScalerSearch:
    """Looks for the scaler among the callers of ``optimizer.step()`` and then keeps it, weakly.

    ``GradScaler.step(optimizer)`` calls ``optimizer.step()``, so a hook of the optimizer finds the
    scaler at most ten frames up. After eight optimizer steps without one the search ends: it costs
    nothing in runs that use none.
    """

    __slots__ = ("_looks_left", "_scaler")

    def __init__(self) -> None:
        self._looks_left = _MAX_LOOKS
        self._scaler: Optional[weakref.ref[Any]] = None

    @property
    def is_over(self) -> bool:
        """Whether looking again can change anything."""
        return self._scaler is not None or self._looks_left <= 0

    def use(self, scaler: object) -> None:
        """Take this scaler; what does not look like a GradScaler is ignored."""
        if _is_scaler(scaler):
            self._scaler = weakref.ref(scaler)

    def look(self, frame: Optional[FrameType]) -> bool:
        """Search the callers from ``frame`` on; True when a scaler was found now."""
        self._looks_left -= 1
        for _ in range(_MAX_FRAMES):
            if frame is None:
                return False
            code = frame.f_code
            # Names first: f_locals of a frame makes a copy of all its variables.
            if code.co_name in ("step", "_maybe_opt_step") and code.co_varnames[:1] == ("self",):
                caller = frame.f_locals.get("self")
                if _is_scaler(caller):
                    self._scaler = weakref.ref(caller)
                    return True
            frame = frame.f_back
        return False

    def scaler(self) -> Optional[Any]:
        """The scaler, or ``None`` without one that is enabled."""
        scaler = self._scaler() if self._scaler is not None else None
        return scaler if getattr(scaler, "_enabled", True) else None

    def scale(self) -> Optional[Any]:
        """The scaler's own 0-d tensor, which it changes in place, or ``None`` without one."""
        return getattr(self.scaler(), "_scale", None)


def _is_scaler(candidate: object) -> bool:
    return hasattr(candidate, "_per_optimizer_states") and hasattr(candidate, "_scale")

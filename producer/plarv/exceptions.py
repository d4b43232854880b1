"""Everything that Argus raises. ``step()`` raises interventions only."""

from __future__ import annotations

from typing import Any, Mapping, Optional

__all__ = [
    "ArgusApiError",
    "ArgusAuthenticationError",
    "ArgusCheckpoint",
    "ArgusConfigurationError",
    "ArgusConnectionError",
    "ArgusError",
    "ArgusHalt",
    "ArgusIntervention",
    "ArgusPause",
    "ArgusRateLimitError",
    "ArgusServerError",
]


class ArgusError(Exception):
    """Base of all of them."""


class ArgusConfigurationError(ArgusError, ValueError):
    """A wrong setting, found at construction.

    ``parameter``, ``rule`` and ``value`` say which one, what it must be, and what it was.

    >>> print(ArgusConfigurationError("mode", "must be 'MANUAL' or 'AUTO'", "FAST"))
    mode must be 'MANUAL' or 'AUTO', not 'FAST'
    """

    def __init__(self, parameter: str, rule: str = "", value: object = None) -> None:
        super().__init__(f"{parameter} {rule}, not {value!r}" if rule else parameter)
        self.parameter = parameter
        self.rule = rule
        self.value = value


class ArgusConnectionError(ArgusError):
    """The address could not be reached at construction."""


class ArgusApiError(ArgusError):
    """The service answered, and not with success: ``status_code`` and ``response``."""

    def __init__(
        self, message: str = "", status_code: Optional[int] = None, response: object = None
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.response = response


class ArgusAuthenticationError(ArgusApiError):
    """401 or 403: the key is wrong or may not do this."""


class ArgusRateLimitError(ArgusApiError):
    """429: too many requests."""


class ArgusServerError(ArgusApiError):
    """5xx: the service failed."""


class ArgusIntervention(ArgusError):
    """Base of what stops a step on purpose, in AUTO mode or by an operator's order.

    ``step`` is the step at which it was raised; ``response`` the action behind it, as a mapping
    (see ``Action.to_dict``), empty where there is none.
    """

    def __init__(
        self,
        message: str = "",
        step: Optional[int] = None,
        response: Optional[Mapping[str, Any]] = None,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.response: Mapping[str, Any] = response if response is not None else {}


class ArgusPause(ArgusIntervention):
    """The engine asks to pause. The run's next attempt may start once `argus resume RUN` lifts
    it.
    """


class ArgusCheckpoint(ArgusIntervention):
    """The engine asks for a checkpoint: save one and go on. Raised once, and only under
    ``Argus(mode="AUTO", raise_checkpoint=True)``: most loops catch pauses alone.
    """


class ArgusHalt(ArgusIntervention):
    """A hard stop, by an operator's order."""

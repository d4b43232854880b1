"""Argus: a real-time monitor for neural-network training.

>>> from plarv import Argus
>>> argus = Argus(silent=True)                      # the embedded engine, no account, no network
>>> argus.step(2.5, grad_norm=1.0).action
'CONTINUE'
>>> argus.complete()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plarv.exceptions import (
    ArgusApiError,
    ArgusAuthenticationError,
    ArgusCheckpoint,
    ArgusConfigurationError,
    ArgusConnectionError,
    ArgusError,
    ArgusHalt,
    ArgusIntervention,
    ArgusPause,
    ArgusRateLimitError,
    ArgusServerError,
)

if TYPE_CHECKING:
    from plarv.client import Argus
    from plarv.decision import Decision
    from plarv.fleet.actions import actions
    from plarv.integrations.huggingface import ArgusCallback as ArgusCallback
    from plarv.integrations.lightning import ArgusLightningCallback as ArgusLightningCallback

__version__ = "0.1.0"

__all__ = [
    "Argus",
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
    "Decision",
    "__version__",
    "actions",
]


def __getattr__(name: str) -> object:
    """``Argus``, ``Decision``, ``actions`` and the frameworks' callbacks are loaded at first use:
    importing plarv costs a few milliseconds. The callbacks are not in ``__all__``, for a star would
    import their frameworks. ImportError: the framework is not installed.
    """
    if name == "Argus":
        from plarv.client import Argus

        return Argus
    if name == "Decision":
        from plarv.decision import Decision

        return Decision
    if name == "actions":
        from plarv.fleet.actions import actions

        return actions
    if name == "ArgusCallback":
        from plarv.integrations.huggingface import ArgusCallback

        return ArgusCallback
    if name == "ArgusLightningCallback":
        from plarv.integrations.lightning import ArgusLightningCallback

        return ArgusLightningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The detectors, for those who write their own: what ``plarv_processors.detectors`` has, at first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from plarv_processors.detectors import BUILTIN, load, registered
    from plarv_processors.detectors.detector import Detector, fingerprint, verdict
    from plarv_schemas.events import Verdict

__all__ = ["BUILTIN", "Detector", "Verdict", "fingerprint", "load", "registered", "verdict"]

_HOMES = {
    "Detector": "plarv_processors.detectors.detector",
    "fingerprint": "plarv_processors.detectors.detector",
    "verdict": "plarv_processors.detectors.detector",
    "Verdict": "plarv_schemas.events",
}


def __getattr__(name: str) -> Any:
    """The name's value in its home; a built-in detector's class by its name too."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    registry = importlib.import_module("plarv_processors.detectors")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("BUILTIN", "load", "registered"):
        return getattr(registry, name)
    for detector in registry.BUILTIN:
        if detector.__name__ == name:
            return detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> List[str]:
    return sorted(__all__)

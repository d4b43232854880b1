"""A detector's formula, as its own docstring has it: the one place where it is written."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, Dict, List, Type

from plarv_processors.detectors.detector import Detector

__all__ = ["formula_of", "settings_of"]

_QUOTED = re.compile(r"``([^`]+)``")
_NAME = re.compile(r"[a-z_]+")
_ENDS = ("Cost:", ">>>", "Source:")


def formula_of(detector: Type[Detector]) -> str:
    """What it fires on and how: its docstring up to its cost. Empty: it has none.

    >>> from plarv_processors.detectors.loss_spike import LossSpike
    >>> print(formula_of(LossSpike).splitlines()[0])
    Fires when the loss jumps far above its own recent past.
    """
    text = inspect.cleandoc(detector.__doc__ or "")
    kept: List[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.lstrip().startswith(_ENDS):
            break
        kept.append(paragraph)
    return "\n\n".join(kept).strip()


def settings_of(detector: Detector) -> Dict[str, Any]:
    """The settings that the formula names, with the values they have.

    >>> from plarv_processors.detectors.loss_spike import LossSpike
    >>> settings_of(LossSpike())["jump_z"]
    8.0
    """
    config: Any = getattr(detector, "config", None)
    if not dataclasses.is_dataclass(config):
        return {}
    there = {field.name for field in dataclasses.fields(config)}
    quoted = " ".join(found.group(1) for found in _QUOTED.finditer(formula_of(type(detector))))
    names = (found.group() for found in _NAME.finditer(quoted))
    named = dict.fromkeys(name for name in names if name in there)
    return {name: getattr(config, name) for name in named}
